"""Step 3 from its flags to the trained policy."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from remax.checkpoint.ema import WeightAverage
from remax.checkpoint.export import export, export_and_exit, write_note
from remax.checks.examination import examine
from remax.checks.findings import Report
from remax.checks.generation import decode_serves
from remax.checks.rewards import held_out_pairs
from remax.cli.flags import Step3Arguments
from remax.cli.validate import make_algorithm
from remax.core.sequences import Prompts
from remax.evaluation.answers import write_answers
from remax.evaluation.policy import PolicyEvaluation, evaluate_policy
from remax.models.loading import quiet_libraries
from remax.report.stage import report_stage
from remax.rewards.composite import try_functions
from remax.stages import resume
from remax.stages.data import PromptData, columns_of, data_config, load_data
from remax.stages.models import Models, Tokenizer, Tokenizers, build_models, check_models, reward_functions
from remax.stages.planning import fit_to_memory
from remax.stages.settings import trainer_settings
from remax.training.loop import TrainState
from remax.training.sentinel import Sentinel
from remax.training.trainer import Trainer, Watcher
from remax.training.variance import VarianceMeter
from utils.data.batches import PromptBatch
from utils.distributed import device_memory, init_distributed, print0, set_seed, shutdown, sum_across_ranks, world_size
from utils.metrics import MetricsLogger
from utils.run import TrainingStopped, UserError, open_folder, start_run

CONSOLE = ("baseline", "kl", "entropy", "length", "ended", "grad_norm", "lr", "seconds_per_step")  # after the reward
SAMPLES = 8  # answers of an evaluation to look at: token by token, and in TensorBoard and Weights & Biases
OF_TOKENS = ("tokens", "kl", "advantage")  # what TensorBoard and Weights & Biases are not shown of them


def run_rlhf(args: Step3Arguments) -> None:
    """Reads models and data, examines them, trains, and writes the best policy to --output_dir/actor."""
    quiet_libraries()
    tokenizers = check_models(args)
    tokenizer = tokenizers.actor
    init_distributed(args.local_rank)
    fit_to_memory(args, world_size(), device_memory())
    set_seed(args.seed)
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    output = open_folder(args.output_dir)
    if resume.complete(args, output):
        print0(f"the run in {output} has come to its end: nothing is left to do")
        return shutdown()
    found = resume.find(args, output)
    for notice in args.notices:
        print0(notice)

    data = load_data(args, tokenizer, output)
    checkpoints = resume.checkpoints(args, output, found, best=output / "actor")
    try_reward_functions(args, tokenizer, data.evaluation)
    algorithm = make_algorithm(args, sum_across_ranks=sum_across_ranks)
    settings = trainer_settings(args)
    steps = settings.cadence.total_steps(len(data.train))
    if args.critic_warmup_steps >= steps:
        raise UserError(
            f"--critic_warmup_steps {args.critic_warmup_steps}: the run has {steps} steps, and the policy none"
        )
    models = build_models(args, tokenizers, steps * settings.optimizer_steps(algorithm))
    report = None
    if not (args.skip_doctor or found):  # the start was examined, and the actor is no longer its reference
        report = examine_models(args, models, tokenizer, data)
        print0(report.table())
        report.refuse_failures()
    actor, reward = models.actor, models.reward
    start_run(output, args, args.stage, found.step if found else None)
    metrics = MetricsLogger(
        output,
        tensorboard_dir=args.tensorboard_dir,
        wandb=vars(args) if "wandb" in args.reports else None,
        console_every=args.logging_steps,
        total_steps=steps,
        console=("reward", *(f"reward/{name}" for name in reward.part_names), *CONSOLE),
        drop_after=found.step if found else -1,
    )

    def measure() -> PolicyEvaluation:
        return evaluate_policy(
            actor,
            models.reference,
            reward,
            data.evaluation,
            tokenizer,
            answers=data.answers,
            close_ups=SAMPLES,
            weigh=algorithm.against_greedy,
        )

    def on_evaluation(step: int, evaluation: PolicyEvaluation, best: bool) -> None:
        write_answers(output / "close_ups" / f"step_{step:06d}.jsonl", evaluation.close_ups)
        if args.save_answers:
            write_answers(output / "answers" / f"step_{step:06d}.jsonl", evaluation.answers)
        if args.print_answers:
            print0(evaluation.sample())
        told = [{name: value for name, value in row.items() if name not in OF_TOKENS} for row in evaluation.close_ups]
        metrics.samples(step, told)
        if best:
            export(actor.model, tokenizer, output / "actor", zero3=actor.zero3)
            write_note(output / "actor", "evaluation.json", {"step": step, **evaluation.figures})

    watchers: list[Watcher] = []
    if args.log_variance:
        steps_between = args.log_variance_gradient_steps
        watchers.append(VarianceMeter(actor, algorithm.samples_per_prompt, algorithm.gamma, steps_between))
    trainer = Trainer(
        actor,
        models.reference,
        reward,
        algorithm,
        settings,
        measure=measure,
        metrics=metrics,
        pad_id=tokenizer.pad_token_id,
        critic=models.critic,
        judge=models.judge,
        unsupervised=data.plain_text,
        average=WeightAverage(actor.model.hf, zero3=actor.zero3) if args.enable_ema else None,
        on_evaluation=on_evaluation,
        sentinel=Sentinel(len(tokenizer), remark=metrics.remark),
        watchers=watchers,
        decode=tokenizer.decode,
        trusts_decode=decode_serves(actor, report),
    )
    try:
        state = trainer.train(data.train, checkpoints)
    except TrainingStopped as stopped:
        metrics.remark("stopped", str(stopped))
        metrics.close()
        report_stage(output)
        export_and_exit(stopped, actor.model, tokenizer, output / "actor_last", zero3=actor.zero3)
    metrics.close()
    save_final(args, output, trainer, tokenizers)
    write_note(output, "results.json", state.results)
    report_stage(output)
    print0(best_model(state, args.best_by, output / "actor"))
    shutdown()


def best_model(state: TrainState, best_by: str, folder: Path) -> str:
    """What the folder of the best model holds: the model of which step, and how much better than the start it is."""
    before, best = state.before[best_by], state.best[best_by]
    if state.best_step == 0:
        return f"no step was better than the start by evaluation {best_by} ({before:.4g}): {folder} holds the start"
    return f"best model by evaluation {best_by}: step {state.best_step}, {before:.4g} -> {best:.4g}, in {folder}"


def try_reward_functions(args: Step3Arguments, tokenizer: Tokenizer, held_out: Iterable[PromptBatch]) -> None:
    """Asks the functions of --reward_fn about two held-out prompts, before any weights are read."""
    if functions := reward_functions(args, tokenizer):
        batch = next(iter(held_out))
        columns = {name: values[:2] for name, values in batch.columns.items()}
        try_functions(functions, batch.prompts[:2], columns, lambda: f"the data has {columns_of(args)}")


def examine_models(args: Step3Arguments, models: Models, tokenizer: Tokenizer, data: PromptData) -> Report:
    """The doctor's report on the models as they are about to be trained with."""
    prompts = next(iter(data.evaluation))
    pairs = None
    if models.reward.models:
        pairs = held_out_pairs(
            data_config(args),
            tokenizer,
            max_len=args.max_prompt_seq_len + args.max_answer_seq_len,
            announce=False,
            rows=data.held_out,
        )
    return examine(
        models.actor,
        models.reward,
        tokenizer,
        Prompts(prompts.input_ids, prompts.lengths),
        columns=prompts.columns,
        reference=models.reference,
        pairs=pairs,
        max_prompt_tokens=args.max_prompt_seq_len,
    )


def save_final(args: Step3Arguments, output: Path, trainer: Trainer, tokenizers: Tokenizers) -> None:
    """The last actor (--save_at_final), its moving average (--enable_ema), and PPO's critic if it shares no trunk."""
    model, zero3 = trainer.actor.model, trainer.actor.zero3
    if args.save_at_final:
        export(model, tokenizers.actor, output / "actor_final", zero3=zero3)
        if trainer.critic is not None and tokenizers.critic is not None and trainer.critic.use is None:
            export(trainer.critic.model, tokenizers.critic, output / "critic", zero3=trainer.critic.zero3)
    if trainer.average is not None:
        export(model, tokenizers.actor, output / "actor_ema", zero3=zero3, state=trainer.average.state())
