"""Step 1: supervised fine-tuning of a causal language model on the chosen answers. `deepspeed main.py --help` lists the
flags.
"""

import sys
from pathlib import Path

from remax.arguments import parse_step1
from remax.assembly import build_supervised_task, finetune_loaders
from remax.checkpoint import export, note
from remax.finetune import finetune, total_steps
from remax.modeling import check_length, load_config, quiet_libraries
from remax.sentinel import TrainingStopped
from remax.settings import finetune_settings
from utils.distributed import init_distributed, print0, set_seed, shutdown
from utils.metrics import MetricsLogger
from utils.run import STOPPED, run_main, start_run
from utils.tokenizer import load_tokenizer


def main() -> None:
    args = parse_step1()
    quiet_libraries()
    check_length(load_config(args.model_name_or_path, "--model_name_or_path"), args.max_seq_len, "--max_seq_len")
    tokenizer = load_tokenizer(args.model_name_or_path, chat_template=args.chat_template)
    init_distributed(args.local_rank)
    set_seed(args.seed)
    start_run(args.output_dir, args, "step1")
    for notice in args.notices:
        print0(notice)

    train_loader, held_out = finetune_loaders(args, tokenizer, stage=0)
    settings = finetune_settings(args)
    steps = total_steps(settings, len(train_loader))
    task = build_supervised_task(args, tokenizer, held_out, steps)
    metrics = MetricsLogger(
        args.output_dir,
        tensorboard_dir=args.tensorboard_dir,
        console_every=args.console_every,
        total_steps=steps,
        drop_after=-1,
    )
    try:
        results = finetune(task, train_loader, settings, metrics)
    except TrainingStopped as stopped:
        metrics.close()
        last = Path(args.output_dir) / "last"
        export(task.engine.model, tokenizer, last, zero3=task.engine.zero3)
        print0(f"training stopped. {stopped}. The model as it is now: {last}")
        shutdown()
        sys.exit(STOPPED)
    metrics.close()
    export(task.engine.model, tokenizer, args.output_dir, zero3=task.engine.zero3)
    note(args.output_dir, "results.json", results)
    print0(f"model written to {args.output_dir}")
    shutdown()


if __name__ == "__main__":
    run_main(main)
