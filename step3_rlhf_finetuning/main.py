"""Step 3: reinforcement learning with ReMax (or --algo reinforce, rloo, grpo, ppo). `deepspeed main.py --help` lists
the flags.
"""

from pathlib import Path

from remax.arguments import make_algorithm, parse_step3
from remax.assembly import (
    Tokenizers,
    build_engines,
    check_models,
    examine_engines,
    try_reward_functions,
)
from remax.checkpoint import export, export_and_exit, note
from remax.ema import WeightAverage
from remax.evaluation import PolicyEvaluation, evaluate_policy, write_answers
from remax.flags import Step3Arguments
from remax.modeling import quiet_libraries
from remax.sentinel import Sentinel, TrainingStopped
from remax.settings import trainer_settings
from remax.stage_data import load_data
from remax.trainer import Trainer
from remax.variance import VarianceMeter
from utils.distributed import init_distributed, print0, set_seed, shutdown, sum_across_ranks
from utils.metrics import MetricsLogger
from utils.run import run_main, start_run

CONSOLE = ("baseline", "kl", "entropy", "length", "ended", "grad_norm", "lr", "seconds_per_step")  # after the reward


def main() -> None:
    args = parse_step3()
    quiet_libraries()
    tokenizers = check_models(args)
    tokenizer = tokenizers.actor
    init_distributed(args.local_rank)
    set_seed(args.seed)
    output = start_run(args.output_dir, args, "step3")
    for notice in args.notices:
        print0(notice)

    data = load_data(args, tokenizer, output)
    try_reward_functions(args, tokenizer, data.evaluation)
    algorithm = make_algorithm(args, sum_across_ranks=sum_across_ranks)
    settings = trainer_settings(args)
    steps = settings.total_steps(len(data.train))
    actor, reference, reward, critic = build_engines(args, tokenizers, steps * settings.optimizer_steps(algorithm))
    if not args.skip_doctor:
        report = examine_engines(args, actor, reward, reference, tokenizer, data)
        print0(report.table())
        report.refuse_failures()
    metrics = MetricsLogger(
        output,
        tensorboard_dir=args.tensorboard_dir,
        console_every=args.logging_steps,
        total_steps=steps,
        console=("reward", *(f"reward/{name}" for name in reward.part_names), *CONSOLE),
        drop_after=-1,
    )

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
        evaluate=lambda: evaluate_policy(actor, reference, reward, data.evaluation, tokenizer, answers=data.answers),
        metrics=metrics,
        pad_id=tokenizer.pad_token_id,
        critic=critic,
        unsupervised=data.plain_text,
        average=WeightAverage(actor.model.hf, zero3=actor.zero3) if args.enable_ema else None,
        on_evaluation=after_evaluation,
        sentinel=Sentinel(len(tokenizer)),
        watchers=watchers,
    )
    try:
        results = trainer.train(data.train)
    except TrainingStopped as stopped:
        metrics.close()
        export_and_exit(stopped, actor.model, tokenizer, output / "actor_last", zero3=actor.zero3)
    metrics.close()
    save_final(args, output, trainer, tokenizers)
    note(output, "results.json", results)
    print0(f"best model (by evaluation {args.best_by}) in {output / 'actor'}")
    shutdown()


def save_final(args: Step3Arguments, output: Path, trainer: Trainer, tokenizers: Tokenizers) -> None:
    """The last actor (--save_at_final), its moving average (--enable_ema), and PPO's critic."""
    model, zero3 = trainer.actor.model, trainer.actor.zero3
    if args.save_at_final:
        export(model, tokenizers.actor, output / "actor_final", zero3=zero3)
        if trainer.critic is not None:
            export(trainer.critic.model, tokenizers.critic, output / "critic", zero3=trainer.critic.zero3)
    if trainer.average is not None:
        export(model, tokenizers.actor, output / "actor_ema", zero3=zero3, state=trainer.average.state())


if __name__ == "__main__":
    run_main(main)
