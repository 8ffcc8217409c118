"""Step 2: a reward model from preference pairs (Bradley-Terry). `deepspeed main.py --help` lists the flags."""

from remax.arguments import parse_step2
from remax.checkpoint import export, note
from remax.engines import TrainedReward, loading
from remax.evaluation import First
from remax.finetune import Ranking, finetune, total_steps
from remax.modeling import add_lora, check_length, load_config, quiet_libraries
from remax.reward_model import load_reward_model, prepare_pad_token, store_score_statistics
from remax.settings import finetune_engine, finetune_optimizer, finetune_settings
from utils.data.loaders import build_loaders
from utils.distributed import init_distributed, print0, rank, set_seed, shutdown, world_size
from utils.metrics import MetricsLogger
from utils.run import run_main, start_run
from utils.tokenizer import load_tokenizer


def main() -> None:
    args = parse_step2()
    quiet_libraries()
    check_length(load_config(args.model_name_or_path, "--model_name_or_path"), args.max_seq_len, "--max_seq_len")
    tokenizer = load_tokenizer(args.model_name_or_path)
    prepare_pad_token(tokenizer)
    init_distributed(args.local_rank)
    set_seed(args.seed)
    start_run(args.output_dir, args, "step2")
    for notice in args.notices:
        print0(notice)

    train_loader, eval_loader = build_loaders(
        stage=1,
        tokenizer=tokenizer,
        data_path=args.data_path,
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
    )
    config, settings = finetune_engine(args), finetune_settings(args)
    with loading(config):
        model = load_reward_model(
            args.model_name_or_path,
            "--model_name_or_path",
            dtype=config.torch_dtype,
            tokenizer=tokenizer,
            new_head=True,
            disable_dropout=args.disable_dropout,
            gradient_checkpointing=args.gradient_checkpointing,
            attn_implementation=args.attn_implementation,
        )
    if args.lora_dim:
        add_lora(model.hf, args.lora_dim, args.lora_module_name, args.only_optimize_lora, "--lora_module_name")
    steps = total_steps(settings, len(train_loader))
    engine = TrainedReward(model, config, finetune_optimizer(args, steps))

    metrics = MetricsLogger(
        args.output_dir,
        tensorboard_dir=args.tensorboard_dir,
        console_every=args.console_every,
        total_steps=steps,
        drop_after=-1,
    )
    results = finetune(Ranking(engine, First(eval_loader, args.max_eval_batches)), train_loader, settings, metrics)
    metrics.close()
    store_score_statistics(model, results["after"])
    export(model, tokenizer, args.output_dir, zero3=engine.zero3)
    note(args.output_dir, "results.json", results)
    print0(f"model written to {args.output_dir}")
    shutdown()


if __name__ == "__main__":
    run_main(main)
