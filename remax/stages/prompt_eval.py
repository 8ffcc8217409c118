"""prompt_eval.py from its flags to the answers of one model, or of two, one under the other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from remax.cli.evaluation import PromptEvalArguments, read_prompts_file
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.pretrained import load_actor
from remax.evaluation.answers import Answer, answer_prompts, write_question
from remax.models.loading import check_length, load_config, quiet_libraries
from remax.models.policy import check_policy_config
from remax.stages.settings import sampling
from utils.data.chat import template_of
from utils.data.rows import read_rows
from utils.data.shapes import Form
from utils.data.tokens import encode_prompts
from utils.distributed import set_seed
from utils.files import write_rows
from utils.run import UserError
from utils.tokenizer import load_tokenizer

QUESTIONS = {
    "English": [
        "What makes a rainbow appear?",
        "Explain to a child why we have leap years.",
        "Name three cities that lie on the Danube.",
        "Write two lines of verse about an old lighthouse.",
        "How do I keep bread fresh for longer?",
    ],
    "Chinese": [
        "彩虹是怎么形成的?",
        "请向小朋友解释为什么会有闰年。",
        "请说出长江沿岸的三座城市。",
        "请写两行关于旧灯塔的诗。",
        "面包怎样保存才能更久不变干?",
    ],
    "Japanese": [
        "虹はどうして現れるのですか。",
        "うるう年がある理由を子どもに説明してください。",
        "四国にある県を三つ挙げてください。",
        "古い灯台についての短い詩を二行で書いてください。",
        "パンを長く新鮮に保つにはどうすればいいですか。",
    ],
}
FINETUNED = "--model_name_or_path_finetune"
Answers = dict[str, list[Answer]]  # of one model to one prompt, by the way of decoding


def run_prompt_eval(args: PromptEvalArguments) -> None:
    """Asks the models, prints their answers, and writes them to --output."""
    quiet_libraries()
    prompts = read_prompts(args)
    models = ("baseline", "finetune") if args.model_name_or_path_baseline else ("finetune",)
    tokenizers = {model: check_model(args, model, prompts) for model in models}
    answers: dict[str, list[Answers]] = {}
    for model in models:  # one after the other: both need not fit into memory together
        set_seed(args.seed)
        answers[model] = answers_of(args, model, tokenizers[model], prompts)
    for i, prompt in enumerate(prompts):
        print(show(f"{i + 1}/{len(prompts)}", prompt, {model: answers[model][i] for model in models}))
    if args.output:
        write(Path(args.output), prompts, answers)
        print(f"answers to {len(prompts)} prompts written to {args.output}")


def read_prompts(args: PromptEvalArguments) -> list[str]:
    """Prompts of the data set, of the text file, or the built-in ones; both models get those of the fine-tuned one."""
    tokenizer = load_tokenizer(args.model_name_or_path_finetune, FINETUNED)
    form = Form(template=template_of(tokenizer))
    if args.data_path:
        rows = read_rows(args.data_path, cache_dir=args.data_output_path, form=form)
        prompts = [row.prompt for row in rows if row.skipped is None]
    elif args.prompts_file:
        prompts = [write_question(line, form.template, FINETUNED) for line in read_lines(args.prompts_file)]
    else:
        return [write_question(question, form.template, FINETUNED) for question in QUESTIONS[args.language]]
    if not prompts:
        flag, name = ("--data_path", args.data_path) if args.data_path else ("--prompts_file", args.prompts_file)
        raise UserError(f"{flag} {name}: holds no prompt; expected at least one")
    return prompts[: args.num_prompts or None]


def read_lines(file: str) -> list[str]:
    """The lines of --prompts_file that are not empty."""
    return [line.strip() for line in read_prompts_file(file).splitlines() if line.strip()]


def check_model(args: PromptEvalArguments, model: str, prompts: list[str]) -> PreTrainedTokenizerBase:
    """The model's tokenizer, when the model is there and has room for the longest prompt and its answer."""
    name, flag = getattr(args, f"model_name_or_path_{model}"), f"--model_name_or_path_{model}"
    config = load_config(name, flag)
    check_policy_config(config, name, flag)
    tokenizer = load_tokenizer(name, flag)
    longest = max(len(ids) for ids in encode_prompts(tokenizer, prompts))
    check_length(config, longest + args.max_new_tokens, f"the longest prompt ({longest}) + --max_new_tokens", flag)
    return tokenizer


def answers_of(
    args: PromptEvalArguments, model: str, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> list[Answers]:
    name, flag = getattr(args, f"model_name_or_path_{model}"), f"--model_name_or_path_{model}"
    config = EngineConfig(dtype=args.dtype)
    actor, _ = load_actor(name, flag=flag, max_new_tokens=args.max_new_tokens, sampling=sampling(args), engine=config)
    samples, beams = args.num_return_sequences, args.num_beams
    return answer_prompts(actor, tokenizer, prompts, batch_size=args.batch_size, samples=samples, beams=beams)


def show(number: str, prompt: str, answers: dict[str, Answers]) -> str:
    """A prompt with the models' answers one under the other, for each way of decoding."""
    lines = ["", f"===== {number} =====", prompt.strip()]
    for kind in next(iter(answers.values())):
        found = [of_model[kind] for of_model in answers.values()]
        for k, row in enumerate(zip(*found, strict=True)):
            lines.append(f"--- {kind}" + (f" {k + 1}" if len(found[0]) > 1 else ""))
            for model, answer in zip(answers, row, strict=True):
                cut = "" if answer.ended else ", cut"
                lines.append(f"{model} ({answer.tokens} tokens{cut}): {answer.text.strip()}")
    return "\n".join(lines)


def write(path: Path, prompts: list[str], answers: dict[str, list[Answers]]) -> None:
    """A row for each prompt: {prompt, baseline: {greedy: [{text, tokens, ended}], ...}, finetune: {...}}."""
    rows: list[dict[str, Any]] = []
    for i, prompt in enumerate(prompts):
        found = {model: of_model[i].items() for model, of_model in answers.items()}
        as_dicts = {m: {way: [dataclasses.asdict(answer) for answer in all] for way, all in found[m]} for m in found}
        rows.append({"prompt": prompt, **as_dicts})
    write_rows(path, rows)
