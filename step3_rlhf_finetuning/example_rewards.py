"""Rewards as plain functions, to copy from: `--reward_fn step3_rlhf_finetuning/example_rewards.py:finished`."""


def finished(prompt: str, answer: str) -> bool:
    """One sample at a time: does the answer end as a sentence does?"""
    return answer.rstrip().endswith((".", "!", "?"))


def words(prompts: list[str], answers: list[str]) -> list[int]:
    """A whole batch: words in each answer; with a weight below 0 (`words:-0.01`) a penalty on length."""
    return [len(answer.split()) for answer in answers]
