"""TRL's half of `compare.py`: one stage with TRL's own trainer; the moments at which its steps ended go to times.json.

The only argument is the settings as JSON, as `compare.py` writes them.
"""

import json
import sys
import time
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.time())


def main() -> None:
    settings = json.loads(sys.argv[1])
    folder, stage = Path(settings["folder"]), settings["stage"]
    rows = load_dataset("json", data_files=str(folder / "data" / "train.jsonl"), split="train")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    shared = dict(
        output_dir=settings["output"],
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch_size"],
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        adam_beta2=0.95,
    )
    length = {"max_length": settings["max_seq_len"]}
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    clock = Clock()
    options = {"callbacks": [clock], "processing_class": tokenizer}
    if stage == "sft":
        data = rows.map(lambda row: {"completion": row["chosen"]}, remove_columns=["chosen", "rejected"])
        trainer = SFTTrainer(policy, args=SFTConfig(**shared, **length), train_dataset=data, **options)
    elif stage == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
        trainer = RewardTrainer(model, args=RewardConfig(**shared, **length), train_dataset=rows, **options)
    elif stage == "dpo":
        trainer = DPOTrainer(policy, args=DPOConfig(**shared, **length), train_dataset=rows, **options)
    else:
        shared["per_device_train_batch_size"] = settings["prompts"] * settings["samples"]
        config = RLOOConfig(
            **shared,
            num_generations=settings["samples"],
            max_completion_length=settings["max_answer_len"],
            beta=0.05,
            temperature=1.0,
        )
        prompts = rows.remove_columns(["chosen", "rejected"])
        fits = settings["max_prompt_len"]  # longer ones are cut by the other side; TRL takes them as they are
        prompts = prompts.map(lambda row: {"prompt": tokenizer.decode(tokenizer(row["prompt"])["input_ids"][-fits:])})
        reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward")
        trainer = RLOOTrainer(
            policy,
            reward_funcs=reward,
            reward_processing_classes=tokenizer,
            args=config,
            train_dataset=prompts,
            **options,
        )
    trainer.train()
    path = Path(settings["output"]) / "times.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(clock.times))


if __name__ == "__main__":
    main()
