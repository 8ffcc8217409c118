"""Algorithm 1 of the ReMax paper (arXiv 2310.10505) with the library's own pieces, line by line.

A tiny Llama with random weights learns to answer in vowels: an answer's reward is the share of vowels among its
characters, which rises from about .02 to above .9. For a model of your own, give its folder or hub name to `load_actor`
and `load_reference`, and let `reward` score what you care about.

    python examples/remax_in_40_lines.py         (10 seconds on one CPU core)
"""

import tempfile

import torch

from remax import KLPenalty, OptimizerConfig, as_prompts, load_actor, load_reference, read_answers, remax_advantages
from remax.demo.tiny_models import save_tiny_model, train_tokenizer
from remax.models.loading import quiet_libraries

PROMPTS = [f"Sing {number} notes:" for number in ("two", "three", "four", "five", "six", "seven", "eight", "nine")]
STEPS, BETA = 80, 0.01


def main() -> list[float]:
    """Trains, and returns the mean reward of each step."""
    quiet_libraries()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_model(folder, "llama", train_tokenizer(PROMPTS, vocab_size=300))
        actor, tokenizer = load_actor(folder, max_new_tokens=8, optimizer=OptimizerConfig(1e-2, total_steps=STEPS))
        reference, _ = load_reference(folder)
    eos_ids, kl, rewards = actor.model.hf.generation_config.eos_token_id, KLPenalty(BETA, reach="full_step"), []

    def reward(sequences):  # (B,)
        texts = [answer.text for answer in read_answers(sequences, tokenizer, eos_ids)]
        return torch.tensor([sum(c in "aeiou" for c in text) / max(len(text), 1) for text in texts])

    for step in range(1, STEPS + 1):
        answers = actor.rollout(as_prompts(tokenizer, PROMPTS * 8))
        sampled, greedy = answers.sampled, answers.greedy  # y ~ pi(.|x), and the greedy answer ybar
        score, baseline, mask = reward(sampled), reward(greedy), sampled.answer_mask  # r(x, y), r(x, ybar); (B, A)
        logprobs = actor.logprobs(sampled).logprobs  # (B, A) log pi(y_t), with gradient
        penalty = kl.in_advantage(logprobs - reference.logprobs(sampled), mask)  # (B, A) beta times the KL from here on
        advantages = remax_advantages(score, baseline, penalty, mask)  # (B, A) r(x, y) - r(x, ybar) - penalty
        loss = -(advantages * logprobs).sum() / len(sampled)
        actor.backward(loss, last=True)
        actor.step()
        rewards.append(float(score.mean()))
        if step % 10 == 0:
            example = read_answers(sampled, tokenizer, eos_ids)[0].text
            print(f"step {step}: reward {rewards[-1]:.2f}, for example {example!r}")
    return rewards


if __name__ == "__main__":
    main()
