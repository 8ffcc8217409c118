"""Step 1: supervised fine-tuning of a causal language model on the chosen answers. `deepspeed main.py --help` lists the
flags.
"""

from remax.arguments import parse_step1
from remax.assembly import build_supervised_task
from remax.checkpoint import export, note
from remax.evaluation import First
from remax.finetune import finetune, total_steps
from remax.modeling import check_length, load_config, quiet_libraries
from remax.settings import finetune_settings
from utils.data.loaders import build_loaders
from utils.distributed import init_distributed, print0, rank, set_seed, shutdown, world_size
from utils.metrics import MetricsLogger
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

    train_loader, eval_loader = build_loaders(
        stage=0,
        tokenizer=tokenizer,
        data_path=args.data_path,
        sft_only_data_path=args.sft_only_data_path,
        data_split=args.data_split,
        data_output_path=args.data_output_path,
        max_len=args.max_seq_len,
        train_batch_size=args.per_device_train_batch_size,
        eval_batch_size=args.per_device_eval_batch_size,
        seed=args.seed,
        data_seed=args.data_seed,
        rank=rank(),
        world_size=world_size(),
        num_proc=args.preprocessing_num_workers,
        columns=args.columns,
        overlong=args.overlong,
        train_on=args.train_on,
        record_in=args.output_dir,
    )
    settings = finetune_settings(args)
    steps = total_steps(settings, len(train_loader))
    task = build_supervised_task(args, tokenizer, First(eval_loader, args.max_eval_batches), steps)
    metrics = MetricsLogger(
        args.output_dir,
        tensorboard_dir=args.tensorboard_dir,
        console_every=args.console_every,
        total_steps=steps,
        drop_after=-1,
    )
    results = finetune(task, train_loader, settings, metrics)
    metrics.close()
    export(task.engine.model, tokenizer, args.output_dir, zero3=task.engine.zero3)
    note(args.output_dir, "results.json", results)
    print0(f"model written to {args.output_dir}")
    shutdown()


if __name__ == "__main__":
    run_main(main)
