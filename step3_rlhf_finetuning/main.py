"""Step 3: reinforcement learning with ReMax (or --algo reinforce, rloo, grpo, ppo). `deepspeed main.py --help` lists
the flags.
"""

from pathlib import Path

from remax.arguments import Step3Arguments, make_algorithm, parse_step3
from remax.checkpoint import export, note
from remax.deepspeed_config import EngineConfig
from remax.ema import WeightAverage
from remax.engines import Actor, OptimizerConfig, Reference, Reward, TrainedReward, loading
from remax.evaluation import First, PolicyEvaluation, evaluate_policy, write_answers
from remax.logprobs import Sampling
from remax.modeling import add_lora, check_length, load_config, load_policy, quiet_libraries
from remax.reward_model import load_reward_model
from remax.rollout import GenerationSettings
from remax.trainer import Trainer, TrainerSettings
from utils.data.loaders import build_loaders
from utils.distributed import init_distributed, print0, rank, set_seed, shutdown, sum_across_ranks, world_size
from utils.metrics import MetricsLogger
from utils.run import UserError, run_main, start_run
from utils.tokenizer import load_tokenizer, same_vocabulary


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
    )
    algorithm = make_algorithm(args, sum_across_ranks=sum_across_ranks)
    settings = TrainerSettings(
        epochs=args.num_train_epochs,
        max_steps=args.stop_step,
        micro_batch_size=args.per_device_training_batch_size,
        rollouts_per_step=args.rollout_batches,
        mini_batches=args.ppo_mini_batches,
        evaluate_every=args.eval_steps,
        target_kl=args.target_kl,
        unsupervised_coefficient=args.unsup_coef,
    )
    steps = settings.total_steps(len(train_loader))
    actor, reference, reward, critic = build_engines(
        args, tokenizer, reward_tokenizer, steps * settings.optimizer_steps(algorithm)
    )
    metrics = MetricsLogger(
        output,
        tensorboard_dir=args.tensorboard_dir,
        console_every=args.logging_steps,
        total_steps=steps,
        console=("reward", "baseline", "kl", "entropy", "length", "ended", "grad_norm", "lr", "seconds_per_step"),
        drop_after=-1,
    )
    held_out = First(eval_loader, args.max_eval_batches)

    def after_evaluation(step: int, evaluation: PolicyEvaluation, best: bool) -> None:
        if args.save_answers:
            write_answers(output / "answers" / f"step_{step:06d}.jsonl", evaluation.answers)
        if args.print_answers:
            print0(evaluation.sample())
        if best:
            export(actor.model, tokenizer, output / "actor", zero3=actor.zero3)
            note(output / "actor", "evaluation.json", {"step": step, **evaluation.figures})

    trainer = Trainer(
        actor,
        reference,
        reward,
        algorithm,
        settings,
        evaluate=lambda: evaluate_policy(actor, reference, reward, held_out, tokenizer),
        metrics=metrics,
        pad_id=tokenizer.pad_token_id,
        critic=critic,
        average=WeightAverage(actor.model.hf, zero3=actor.zero3) if args.enable_ema else None,
        on_evaluation=after_evaluation,
    )
    results = trainer.train(train_loader)
    metrics.close()
    save_final(args, output, trainer, tokenizer, reward_tokenizer)
    note(output, "results.json", results)
    print0(f"best model (by evaluation reward) in {output / 'actor'}")
    shutdown()


def check_models(args: Step3Arguments):
    """Reads configurations and tokenizers before any weights, and refuses models that do not go together."""
    longest = args.max_prompt_seq_len + args.max_answer_seq_len
    for flag in ("actor_model_name_or_path", "reward_model_name_or_path"):
        config = load_config(getattr(args, flag), f"--{flag}")
        check_length(config, longest, "--max_prompt_seq_len + --max_answer_seq_len", f"--{flag}")
    tokenizer = load_tokenizer(args.actor_model_name_or_path, "--actor_model_name_or_path")
    reward_tokenizer = load_tokenizer(args.reward_model_name_or_path, "--reward_model_name_or_path")
    if difference := same_vocabulary(tokenizer, reward_tokenizer):
        raise UserError(
            f"--reward_model_name_or_path {args.reward_model_name_or_path}: its vocabulary differs from that of "
            f"--actor_model_name_or_path {args.actor_model_name_or_path} ({difference}); the reward model reads the "
            "actor's tokens, so both need one tokenizer"
        )
    return tokenizer, reward_tokenizer


def build_engines(args: Step3Arguments, tokenizer, reward_tokenizer, optimizer_steps: int):
    """Actor, reference, reward, and for PPO a critic."""
    sampling = Sampling(args.temperature, args.top_p, args.top_k)
    evaluated = sampling if args.logprobs_of == "sampling" else Sampling()

    def policy(config: EngineConfig, **options):
        with loading(config):
            return load_policy(
                args.actor_model_name_or_path,
                "--actor_model_name_or_path",
                dtype=config.torch_dtype,
                tokenizer=tokenizer,
                attn_implementation=args.attn_implementation,
                **options,
            )

    def scorer(name: str, flag: str, config: EngineConfig, **options):
        with loading(config):
            return load_reward_model(
                name,
                flag,
                dtype=config.torch_dtype,
                tokenizer=reward_tokenizer,
                attn_implementation=args.attn_implementation,
                **options,
            )

    micro = args.per_device_training_batch_size
    actor_config = EngineConfig(
        args.actor_zero_stage, args.offload, args.offload_parameters, args.actor_dtype, micro, args.gradient_clipping
    )
    model = policy(
        actor_config,
        disable_dropout=args.disable_actor_dropout,
        gradient_checkpointing=args.actor_gradient_checkpointing,
    )
    if args.actor_lora_dim:
        flag = "--actor_lora_module_name"
        add_lora(model.hf, args.actor_lora_dim, args.actor_lora_module_name, args.only_optimize_lora, flag)
    optimizer = OptimizerConfig(
        args.actor_learning_rate,
        optimizer_steps,
        args.num_warmup_steps,
        args.lr_scheduler_type,
        args.actor_weight_decay,
        args.adam_betas,
        args.actor_lora_learning_rate,
    )
    generation = GenerationSettings(
        args.max_answer_seq_len, tokenizer.pad_token_id, sampling, args.max_greedy_seq_len, args.two_pass_rollout
    )
    actor = Actor(
        model,
        actor_config,
        optimizer,
        generation=generation,
        sampling=evaluated,
        chunk_size=args.logprob_chunk_size,
        gather_for_generation=args.zero3_generation == "gather",
    )
    reference_config = EngineConfig(
        args.reference_zero_stage, args.offload_reference_model, dtype=args.actor_dtype, micro_batch_size=micro
    )
    reference = Reference(
        policy(reference_config), reference_config, sampling=evaluated, chunk_size=args.logprob_chunk_size
    )
    reward_config = EngineConfig(
        args.reward_zero_stage, args.offload_reward_model, dtype=args.reward_dtype, micro_batch_size=micro
    )
    reward_name, reward_flag = args.reward_model_name_or_path, "--reward_model_name_or_path"
    reward = Reward(scorer(reward_name, reward_flag, reward_config), reward_config)
    if args.algo != "ppo":
        return actor, reference, reward, None
    critic_config = EngineConfig(
        args.critic_zero_stage,
        args.offload_critic,
        dtype=args.critic_dtype,
        micro_batch_size=micro,
        gradient_clipping=args.gradient_clipping,
    )
    critic = scorer(
        args.critic_model_name_or_path or reward_name,
        "--critic_model_name_or_path",
        critic_config,
        disable_dropout=args.disable_reward_dropout,
        gradient_checkpointing=args.critic_gradient_checkpointing,
    )
    optimizer = OptimizerConfig(
        args.critic_learning_rate,
        optimizer_steps,
        args.num_warmup_steps,
        args.lr_scheduler_type,
        args.critic_weight_decay,
        args.adam_betas,
    )
    return actor, reference, reward, TrainedReward(critic, critic_config, optimizer)


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
