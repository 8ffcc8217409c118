"""The short trainings that are pinned: the flags of each, and what they read.

Every case is a whole run of a stage's main.py. Together they reach every algorithm, loss, ZeRO stage, adapter, mix and
schedule once with one rank and once with two, with distinct values wherever two flags could be confused.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import torch

STAGES = {
    1: "step1_supervised_finetuning",
    2: "step2_reward_model_finetuning",
    3: "step3_rlhf_finetuning",
}
FINETUNE = (
    "--data_path {data} --max_seq_len 72 --per_device_train_batch_size 4 --per_device_eval_batch_size 4"
    " --max_eval_batches 2 --max_steps 6 --eval_steps 4 --num_warmup_steps 2 --learning_rate 3e-3 --weight_decay 0.1"
    " --data_split 1,1,1 --logging_steps 3"
)
RLHF = (
    "--data_path {data} --max_prompt_seq_len 60 --max_answer_seq_len 10 --per_device_generation_batch_size 4"
    " --per_device_training_batch_size 2 --per_device_eval_batch_size 4 --max_eval_batches 2 --max_steps 5"
    " --eval_steps 2 --num_warmup_steps 1 --actor_learning_rate 4e-3 --actor_weight_decay 0.05 --data_split 1,1,2"
    " --save_at_final --save_answers --skip_doctor true --target_kl 0 --kl_ctl 0.2"
)
LLAMA = " --actor_model_name_or_path {models}/llama --reward_model_name_or_path {models}/llama-reward"
OPT = " --actor_model_name_or_path {models}/opt --reward_model_name_or_path {models}/opt-reward"
GPT2 = " --actor_model_name_or_path {models}/gpt2 --reward_model_name_or_path {models}/gpt2-reward"
HYDRA = " --actor_model_name_or_path {models}/llama-hydra --actor_lora_dim 2 --only_optimize_lora --share all"
HYDRA += " --actor_lora_learning_rate 2e-2"
FROZEN_3 = " --reference_zero_stage 3 --reward_zero_stage 3"

# ranks -> name -> (stage, flags)
CASES: dict[int, dict[str, tuple[int, str]]] = {
    1: {
        "supervised, dropout": (
            1,
            "--model_name_or_path {models}/gpt2 --train_on all --adam_beta1 0.8 --gradient_clipping 0.7"
            " --lr_scheduler_type linear --seed 5",
        ),
        "supervised, packed, LoRA": (
            1,
            "--model_name_or_path {models}/llama --packing --gradient_accumulation_steps 2 --lora_dim 3"
            " --lora_module_name _proj --only_optimize_lora --lora_learning_rate 2e-2 --zero_stage 1 --data_seed 3",
        ),
        "ranking": (
            2,
            "--model_name_or_path {models}/opt --label_smoothing 0.1 --center_rewards_coefficient 0.05"
            " --gradient_accumulation_steps 2 --data_path {margins} --use_margin",
        ),
        "ranking, several answers": (
            2,
            "--model_name_or_path {models}/llama --data_path {ranked} --ranked_loss plackett-luce --packing",
        ),
        "hydra": (
            2,
            "--model_name_or_path {models}/opt --loss hydra --ranking_weight 0.4 --label_smoothing 0.1"
            " --center_rewards_coefficient 0.05 --gradient_accumulation_steps 2 --data_path {margins} --use_margin",
        ),
        "dpo, dropout": (2, "--model_name_or_path {models}/gpt2 --loss dpo --dpo_beta 0.3"),
        "r-dpo, streamed": (
            2,
            "--model_name_or_path {models}/llama --loss r-dpo --length_alpha 0.02 --data_path {ranked} --streaming"
            " --shuffle_buffer 20",
        ),
        "remax": (3, "--algo remax" + LLAMA + " --gamma 1 --penalty full_step"),
        "remax, calibrated": (
            3,
            "--algo remax --baseline calibrated --samples_per_prompt 2 --penalty full_step --gamma 0.99" + LLAMA,
        ),
        "remax, everything": (
            3,
            "--algo remax --enable_ema --adaptive_kl --adaptive_kl_target 2 --adaptive_kl_horizon 40"
            " --unsupervised_dataset_name {text} --unsup_coef 0.6 --per_device_unsupervised_batch_size 3"
            " --temperature 0.8 --top_p 0.9 --entropy_coef 0.02"
            " --generation_batches 2 --max_greedy_seq_len 6 --loss_aggregation token --clip_reward_value 0.7"
            " --log_variance --log_variance_gradient_steps 2 --best_by objective" + OPT,
        ),
        "remax, full KL, rewards": (
            3,
            "--algo remax --penalty full_kl_full_step --reward_fn {functions}:words:-0.1"
            " --packing false --normalize_reward --best_by objective --disable_actor_dropout"
            " --actor_model_name_or_path {models}/gpt2 --reward_model_name_or_path {models}/gpt2-reward:0.5",
        ),
        "reinforce": (
            3,
            "--algo reinforce --baseline_decay 0.6 --actor_lora_dim 2 --actor_lora_module_name _proj" + LLAMA,
        ),
        "rloo": (3, "--algo rloo --samples_per_prompt 2 --top_k 50 --logprobs_of model" + LLAMA),
        "grpo": (3, "--algo grpo --samples_per_prompt 4 --per_device_generation_batch_size 2" + OPT),
        "ppo": (
            3,
            "--algo ppo --ppo_epochs 2 --ppo_mini_batches 2 --lam 0.9 --gamma 0.98 --critic_learning_rate 2e-3"
            " --packing false --critic_weight_decay 0.2 --cliprange 0.1 --cliprange_value 0.3 --enable_ema"
            " --unsupervised_dataset_name {text} --unsup_coef 0.4 --per_device_unsupervised_batch_size 2" + GPT2,
        ),
        "superhf": (3, "--algo superhf --samples_per_prompt 4 --per_device_generation_batch_size 4" + LLAMA),
        "inpo": (
            3,
            "--algo inpo --samples_per_prompt 3 --kl_ctl 0 --ppo_epochs 2 --ppo_mini_batches 2 --inpo_eta 0.05"
            " --inpo_tau 0.02" + LLAMA,
        ),
        "remax, one trunk": (3, "--algo remax --reward_fn {functions}:words:-0.1 --enable_ema" + HYDRA),
        "ppo, one trunk": (
            3,
            "--algo ppo --critic_lora_dim 3 --critic_learning_rate 5e-3 --critic_weight_decay 0.2"
            " --unsupervised_dataset_name {text} --unsup_coef 0.4 --per_device_unsupervised_batch_size 2" + HYDRA,
        ),
    },
    2: {
        "supervised, ZeRO 2": (1, "--model_name_or_path {models}/opt --zero_stage 2 --gradient_checkpointing"),
        "supervised, ZeRO 3, LoRA": (
            1,
            "--model_name_or_path {models}/llama --zero_stage 3 --lora_dim 2 --lora_module_name mlp --streaming"
            " --sft_only_data_path {ranked}",
        ),
        "ranking, ZeRO 3, packed": (2, "--model_name_or_path {models}/llama --zero_stage 3 --packing"),
        "ranking, several answers": (2, "--model_name_or_path {models}/gpt2 --data_path {ranked} --zero_stage 2"),
        "hydra, ZeRO 3, LoRA": (
            2,
            "--model_name_or_path {models}/llama --loss hydra --data_path {ranked} --zero_stage 3 --packing"
            " --lora_dim 3 --only_optimize_lora --lora_learning_rate 2e-2",
        ),
        "dpo, ZeRO 2": (
            2,
            "--model_name_or_path {models}/llama --loss dpo --zero_stage 2 --reference_zero_stage 3"
            " --gradient_accumulation_steps 2",
        ),
        "remax, ZeRO 2": (
            3,
            "--algo remax --actor_zero_stage 2 --enable_ema --unsupervised_dataset_name {text} --unsup_coef 0.6"
            " --packing false --per_device_unsupervised_batch_size 2 --log_variance --generation_batches 2"
            + OPT
            + FROZEN_3,
        ),
        "remax, ZeRO 3": (3, "--algo remax --actor_zero_stage 3 --enable_ema" + LLAMA + FROZEN_3),
        "remax, ZeRO 3, LoRA": (
            3,
            "--algo remax --actor_zero_stage 3 --zero3_generation synced --actor_lora_dim 2 --actor_lora_module_name"
            " _proj --only_optimize_lora --actor_gradient_checkpointing" + LLAMA,
        ),
        "reinforce": (3, "--algo reinforce --baseline_decay 0.6 --adaptive_kl --adaptive_kl_horizon 40" + GPT2),
        "rloo": (3, "--algo rloo --packing false --samples_per_prompt 2 --actor_zero_stage 1" + LLAMA),
        "grpo, ZeRO 2": (3, "--algo grpo --samples_per_prompt 2 --actor_zero_stage 2 --logprob_chunk_size 16" + OPT),
        "ppo, ZeRO 2 and 3": (
            3,
            "--algo ppo --ppo_epochs 2 --critic_zero_stage 3 --actor_zero_stage 2 --ppo_mini_batches 2"
            " --critic_warmup_steps 2 --adaptive_kl --adaptive_kl_horizon 40"
            " --critic_learning_rate 2e-3 --reward_fn {functions}:finished" + LLAMA,
        ),
        "remax, one trunk, ZeRO 3": (
            3,
            "--algo remax --actor_zero_stage 3 --actor_gradient_checkpointing --generation_batches 2" + HYDRA,
        ),
        "ppo, joint critic, ZeRO 2": (
            3,
            "--algo ppo --joint_critic --critic_learning_rate 5e-3 --ppo_mini_batches 2 --actor_zero_stage 2" + HYDRA,
        ),
        "remax, plain": (3, "--algo remax" + LLAMA),
        # With the doctor, whose checks leave no trace: the figures of a training are those of the same one without it.
        "remax, examined": (3, "--algo remax --skip_doctor false --enable_tensorboard" + LLAMA),
    },
}


def command(stage: int, flags: str, folder: Path, output: Path) -> list[str]:
    """The flags of a case; later ones win."""
    names = {
        "models": folder / "models",
        "data": folder / "data",
        "margins": folder / "margins",
        "ranked": folder / "ranked",
        "text": folder / "text.jsonl",
        "functions": Path(__file__).resolve().parents[2] / STAGES[3] / "example_rewards.py",
    }
    text = " ".join([FINETUNE if stage < 3 else RLHF, flags, f"--output_dir {output}"])
    return shlex.split(text.format(**names))


def prepare(folder: Path) -> None:
    """Models with weights that all matter, and data of every kind, in `folder`."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from remax.demo.corpus import make_corpus, make_rows
    from remax.demo.tiny_models import tiny_config, train_tokenizer
    from remax.models.hydra import two_headed

    rows, _ = make_rows(seed=0, train_rows=100, test_rows=1)
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in rows], vocab_size=300)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for seed, architecture in enumerate(("gpt2", "opt", "llama")):
        config = tiny_config(architecture, len(tokenizer), max_positions=128, **ids)
        models = {
            architecture: AutoModelForCausalLM.from_config(config, dtype=torch.float32),
            f"{architecture}-reward": AutoModelForSequenceClassification.from_config(_with_score(config)),
        }
        if architecture == "llama":
            models["llama-hydra"] = two_headed(type(config))(_with_score(config))
        for name, model in models.items():
            randomise(model, seed + 10 * name.endswith("reward") + 20 * name.endswith("hydra"))
            if model.can_generate():  # many end tokens, so that random models end answers early, and at unequal lengths
                model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(7, len(tokenizer), 9)]
            model.save_pretrained(folder / "models" / name)
            tokenizer.save_pretrained(folder / "models" / name)
    corpus = make_corpus(folder / "data", seed=0, train_rows=160, test_rows=24)
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (corpus / f"{split}.jsonl").read_text().splitlines()]
        write_rows(folder / "margins" / f"{split}.jsonl", [row | {"margin": i % 3 / 4} for i, row in enumerate(rows)])
        write_rows(folder / "ranked" / f"{split}.jsonl", [_ranked(i, row) for i, row in enumerate(rows)])
    write_rows(folder / "text.jsonl", [{"text": row["chosen"] + row["prompt"]} for row in rows * 4])


def _with_score(config):
    return type(config)(**config.to_dict() | {"num_labels": 1, "score_mean": 0.2, "score_std": 1.5})


def _ranked(i: int, row: dict[str, str]) -> dict:
    answers = [row["chosen"], row["rejected"], row["rejected"] + " Bye.", row["chosen"] + " Never."]
    return {"prompt": row["prompt"], "answers": answers[: 2 + i % 3], "ranks": [1, 2, 2, 3][: 2 + i % 3]}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draws every parameter anew, so that a lost, swapped or reset tensor shows."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale, centre = (0.1, 1.0) if parameter.dim() == 1 and name.endswith("weight") else (0.15, 0.0)
            parameter.copy_(centre + scale * torch.randn(parameter.shape, generator=noise))
