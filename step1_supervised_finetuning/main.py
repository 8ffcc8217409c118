"""Step 1: supervised fine-tuning of a causal language model on the chosen answers. `deepspeed main.py --help` lists the
flags.
"""

from remax.arguments import parse_step1
from remax.assembly import build_supervised_task
from remax.finetune import total_steps
from remax.finetune_stage import train_and_export
from remax.modeling import check_length, load_config, quiet_libraries
from remax.settings import finetune_settings
from remax.stage_data import finetune_loaders
from utils.distributed import init_distributed, print0, set_seed
from utils.run import run_main, start_run
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
    train_and_export(args, task, train_loader, settings, tokenizer)


if __name__ == "__main__":
    run_main(main)
