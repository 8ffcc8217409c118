"""Step 3: reinforcement learning with ReMax (or --algo reinforce, rloo, grpo, ppo). `deepspeed main.py --help` lists
the flags.
"""

import sys
from pathlib import Path

from remax.arguments import Step3Arguments, make_algorithm, parse_step3
from remax.assembly import build_engines, check_models
from remax.checkpoint import export, note
from remax.doctor import examine, held_out_pairs
from remax.ema import WeightAverage
from remax.evaluation import First, PolicyEvaluation, evaluate_policy, write_answers
from remax.modeling import quiet_libraries
from remax.sentinel import Sentinel, TrainingStopped
from remax.sequences import Prompts
from remax.settings import trainer_settings
from remax.trainer import Trainer
from remax.variance import VarianceMeter
from utils.data.loaders import build_answers_loader, build_loaders
from utils.data.text import plain_text_batches
from utils.distributed import init_distributed, print0, rank, set_seed, shutdown, sum_across_ranks, world_size
from utils.metrics import MetricsLogger
from utils.run import run_main, start_run

STOPPED = 3  # exit status: the sentinel saw no point in going on


def main() -> None:
    args = parse_step3()
    quiet_libraries()
    tokenizer, reward_tokenizer = check_models(args)
    init_distributed(args.local_rank)
    set_seed(args.seed)
    output = start_run(args.output_dir, args, "step3")
    for notice in args.notices:
        print0(notice)

    train_loader, eval_loader = build_loaders(
        stage=2,
        tokenizer=tokenizer,
        data_path=args.data_path,
        data_split=args.data_split,
        data_output_path=args.data_output_path,
        max_len=args.max_prompt_seq_len,
        train_batch_size=args.per_device_generation_batch_size,
        eval_batch_size=args.per_device_eval_batch_size,
        seed=args.seed,
        data_seed=args.data_seed,
        rank=rank(),
        world_size=world_size(),
        num_proc=args.preprocessing_num_workers,
        columns=args.columns,
        overlong=args.overlong,
        record_in=output,
    )
    answers_loader = build_answers_loader(
        tokenizer=tokenizer,
        data_path=args.data_path,
        data_output_path=args.data_output_path,
        max_len=args.max_prompt_seq_len + args.max_answer_seq_len,
        batch_size=args.per_device_eval_batch_size,
        rank=rank(),
        world_size=world_size(),
        num_proc=args.preprocessing_num_workers,
        columns=args.columns,
    )
    plain_text = None
    if args.unsupervised_dataset_name:
        plain_text = plain_text_batches(
            args.unsupervised_dataset_name,
            configuration=args.unsupervised_dataset_config_name,
            tokenizer=tokenizer,
            block=args.max_prompt_seq_len + args.max_answer_seq_len,
            batch_size=args.per_device_training_batch_size,
            seed=args.seed,
            data_output_path=args.data_output_path,
            rank=rank(),
            world_size=world_size(),
        )
    algorithm = make_algorithm(args, sum_across_ranks=sum_across_ranks)
    settings = trainer_settings(args)
    steps = settings.total_steps(len(train_loader))
    actor, reference, reward, critic = build_engines(
        args, tokenizer, reward_tokenizer, steps * settings.optimizer_steps(algorithm)
    )
    if not args.skip_doctor:
        prompts = next(iter(eval_loader))
        report = examine(
            actor,
            reward,
            tokenizer,
            reward_tokenizer,
            Prompts(prompts["input_ids"], prompts["lengths"]),
            reference=reference,
            pairs=held_out_pairs(
                args.data_path,
                tokenizer,
                max_len=args.max_prompt_seq_len + args.max_answer_seq_len,
                cache_dir=args.data_output_path,
            ),
            max_prompt_tokens=args.max_prompt_seq_len,
        )
        print0(report.table())
        report.refuse_failures()
    metrics = MetricsLogger(
        output,
        tensorboard_dir=args.tensorboard_dir,
        console_every=args.logging_steps,
        total_steps=steps,
        console=("reward", "baseline", "kl", "entropy", "length", "ended", "grad_norm", "lr", "seconds_per_step"),
        drop_after=-1,
    )
    held_out = First(eval_loader, args.max_eval_batches)
    held_out_answers = First(answers_loader, args.max_eval_batches) if answers_loader else None

    def after_evaluation(step: int, evaluation: PolicyEvaluation, best: bool) -> None:
        if args.save_answers:
            write_answers(output / "answers" / f"step_{step:06d}.jsonl", evaluation.answers)
        if args.print_answers:
            print0(evaluation.sample())
        if best:
            export(actor.model, tokenizer, output / "actor", zero3=actor.zero3)
            note(output / "actor", "evaluation.json", {"step": step, **evaluation.figures})

    watchers = []
    if args.log_variance:
        steps_between = args.log_variance_gradient_steps
        watchers.append(VarianceMeter(actor, algorithm.samples_per_prompt, algorithm.gamma, steps_between))
    trainer = Trainer(
        actor,
        reference,
        reward,
        algorithm,
        settings,
        evaluate=lambda: evaluate_policy(actor, reference, reward, held_out, tokenizer, answers=held_out_answers),
        metrics=metrics,
        pad_id=tokenizer.pad_token_id,
        critic=critic,
        unsupervised=plain_text,
        average=WeightAverage(actor.model.hf, zero3=actor.zero3) if args.enable_ema else None,
        on_evaluation=after_evaluation,
        sentinel=Sentinel(len(tokenizer)),
        watchers=watchers,
    )
    try:
        results = trainer.train(train_loader)
    except TrainingStopped as stopped:
        export(actor.model, tokenizer, output / "actor_last", zero3=actor.zero3)
        print0(f"training stopped. {stopped}. The model as it is now: {output / 'actor_last'}")
        shutdown()
        sys.exit(STOPPED)
    metrics.close()
    save_final(args, output, trainer, tokenizer, reward_tokenizer)
    note(output, "results.json", results)
    print0(f"best model (by evaluation reward) in {output / 'actor'}")
    shutdown()


def save_final(args: Step3Arguments, output: Path, trainer: Trainer, tokenizer, reward_tokenizer) -> None:
    """The last actor (--save_at_final), its moving average (--enable_ema), and PPO's critic."""
    model, zero3 = trainer.actor.model, trainer.actor.zero3
    if args.save_at_final:
        export(model, tokenizer, output / "actor_final", zero3=zero3)
        if trainer.critic is not None:
            export(trainer.critic.model, reward_tokenizer, output / "critic", zero3=trainer.critic.zero3)
    if trainer.average is not None:
        export(model, tokenizer, output / "actor_ema", zero3=zero3, state=trainer.average.state())


if __name__ == "__main__":
    run_main(main)
