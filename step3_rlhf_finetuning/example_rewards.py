"""Rewards as plain functions, to copy from: `--reward_fn step3_rlhf_finetuning/example_rewards.py:finished`."""

import re


def finished(prompt: str, answer: str) -> bool:
    """One sample at a time: does the answer end as a sentence does?"""
    return answer.rstrip().endswith((".", "!", "?"))


def words(prompts: list[str], answers: list[str]) -> list[int]:
    """A whole batch: words in each answer; with a weight below 0 (`words:-0.01`) a penalty on length."""
    return [len(answer.split()) for answer in answers]


def gsm8k(prompts: list[str], answers: list[str], answer: list[str]) -> list[bool]:
    """With a column of the data: is the last number that of its reference answer, which ends with "#### 42"?

    GSM8K calls that column `answer`; the policy's answers are `answers`.
    """
    pairs = zip(map(last_number, answers), map(last_number, answer), strict=True)
    return [found is not None and found == right for found, right in pairs]


def last_number(text: str) -> float | None:
    """42.0 of "... makes $42.", 1200.0 of "#### 1,200"; None where there is none."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None
