"""rw_eval.py from its flags to the scores of a reward model."""

from __future__ import annotations

from pathlib import Path

from remax.cli.evaluation import RewardEvalArguments
from remax.engines.base import FrozenEngine
from remax.engines.deepspeed_config import DTYPES, EngineConfig
from remax.engines.scorer import Reward
from remax.evaluation.rows import describe_rows, encode_rows, report, scored_rows, show
from remax.evaluation.texts import score_texts
from remax.models.loading import check_length, load_config, quiet_libraries
from remax.models.reward_model import load_reward_model
from utils.data.chat import template_of
from utils.data.loaders import local_rank_zero_first
from utils.data.rows import TextRow, read_rows
from utils.data.shapes import Form, ask, finish
from utils.distributed import init_distributed, is_main, print0, shutdown, world_size
from utils.files import write_rows
from utils.run import UserError
from utils.tokenizer import load_tokenizer

EXAMPLES = [
    ask(
        "Why does ice float on water?",
        "Ice is less dense than water: as water freezes, its molecules settle into an open lattice that takes up more "
        "room, so the same mass of ice is larger and floats.",
        "Because it does. Ice ice ice.",
    ),
    ask(
        "Can you suggest a simple dinner for two?",
        "Sure! Spaghetti with garlic and oil is ready in fifteen minutes: while the pasta boils, warm sliced garlic "
        "in olive oil, then toss both with parsley and a little cheese.",
        "No. Dinner is a meal that people eat in the evening.",
    ),
]


def run_reward_eval(args: RewardEvalArguments) -> None:
    """Scores the answers of --data_path or of two built-in examples, prints figures, and writes to --output."""
    quiet_libraries()
    name, flag = args.model_name_or_path, "--model_name_or_path"
    config = load_config(name, flag)
    check_length(config, args.max_seq_len, "--max_seq_len")
    tokenizer = load_tokenizer(name)
    if world_size() > 1:
        init_distributed(args.local_rank)
    for notice in args.notices:
        print0(notice)
    if args.data_path:
        with local_rank_zero_first():
            form = Form(template=template_of(tokenizer))
            rows = read_rows(args.data_path, cache_dir=args.data_output_path, form=form)
    else:
        rows = [TextRow({}, finish(example, template_of(tokenizer))) for example in EXAMPLES]
    texts = encode_rows(rows, tokenizer, args.max_seq_len)
    data = args.data_path or "the built-in examples"
    print0(describe_rows(data, rows, texts, args.max_seq_len))
    if not texts.encoded:
        raise UserError(f"--data_path {data}: no row can be scored; expected answers, alone or in pairs")

    model = load_reward_model(name, flag, dtype=DTYPES[args.dtype], tokenizer=tokenizer)
    reward = Reward(FrozenEngine(model, EngineConfig(dtype=args.dtype)))
    scores = score_texts(reward, texts.encoded, batch_size=args.batch_size, pad_id=tokenizer.pad_token_id)  # (n,)
    if not scores.isfinite().all():
        count = int((~scores.isfinite()).sum())
        raise UserError(f"--dtype {args.dtype}: {count} of {len(scores)} scores are not finite numbers; try fp32")
    print0(report(rows, texts, scores, config) if args.data_path else show(rows, texts, scores))
    if args.output and is_main():
        write_rows(Path(args.output), scored_rows(rows, texts, scores))
        print0(f"scores of {len(rows)} rows written to {args.output}")
    shutdown()
