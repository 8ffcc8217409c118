"""The checks of models and tokenizers that go together, and of an export that reads back."""

from __future__ import annotations

import tempfile
import zlib

import torch
from transformers import PreTrainedTokenizerBase

from remax.checkpoint.export import export
from remax.checks.findings import EXACT, FAILURE, SKIPPED, TOLERANCE, WARNING, Finding, finding
from remax.checks.generation import Probe, logprobs_under
from remax.checks.rewards import label_of
from remax.core.sampling import Sampling
from remax.engines.policy import Actor, Reference
from remax.engines.roles import Role
from remax.models.loading import count_parameters, embedded_tokens
from remax.models.policy import load_policy
from remax.rewards.composite import CompositeReward
from utils.data.tokens import end_ids
from utils.distributed import device, gather_objects, is_main
from utils.present import present
from utils.tokenizer import load_tokenizer, same_vocabulary


def roles(actor: Actor, reward: CompositeReward, reference: Reference | None = None) -> dict[str, Role]:
    """Every model by its name in the report."""
    models = {label_of("reward model", part, reward): part.model for part in reward.models}
    return {"actor": actor, **models, **({"reference": reference} if reference is not None else {})}


def check_tokens(
    actor: Actor, reward: CompositeReward, reference: Reference | None, tokenizer: PreTrainedTokenizerBase
) -> list[Finding]:
    """Vocabulary, end token and pad token of all models."""
    models = roles(actor, reward, reference)
    rows = {name: embedded_tokens(role.model.hf) for name, role in models.items()}
    too_small = [f"the {name} embeds {n}" for name, n in rows.items() if n < len(tokenizer)]
    own = "a reward model's tokenizer"
    theirs = {label_of("reward model", part, reward): present(part.tokenizer, own) for part in reward.models}
    differences = {name: same_vocabulary(tokenizer, other) for name, other in theirs.items()}
    different = [f"{name}: {difference}" for name, difference in differences.items() if difference]
    vocabulary = finding(
        "vocabulary",
        not different and not too_small and rows.get("reference", rows["actor"]) == rows["actor"],
        ", ".join(different) or f"{len(tokenizer)} tokens" + "".join(f", {text}" for text in too_small),
        "use a reward model that was trained from a model with the actor's tokenizer, and one reference with both: the "
        "reward model reads the actor's token ids as they are",
        tokens=len(tokenizer),
    )

    ends, expected = list(actor.model.hf.generation_config.eos_token_id), end_ids(tokenizer)
    rewards_ends = {name: end_ids(other) for name, other in theirs.items()}
    others = [i for i in ends if any(i not in known for known in (expected, *rewards_ends.values()))]
    if not set(expected) <= set(ends) or any(known[0] != expected[0] for known in rewards_ends.values()):
        end = Finding(
            "end token",
            FAILURE,
            f"the tokenizer ends answers by {expected}, generation by {ends}"
            + "".join(f", the {name}'s by {known}" for name, known in rewards_ends.items()),
            "set one eos_token in all tokenizer_config.json, and eos_token_id in generation_config.json",
        )
    else:
        end = finding(
            "end token",
            not others or not theirs,
            ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in expected)
            + (f"; a reward model does not know {tokenizer.convert_ids_to_tokens(others)} as an end" if others else ""),
            "the reward model was trained on answers that end by its own eos_token, or its chat template's end of a "
            "turn: train it with the actor's template, or leave other ends out of the actor's generation_config.json",
            bad=WARNING,
        )

    pad_id = actor.generation.pad_id
    pad_token = finding(
        "pad token",
        pad_id == tokenizer.pad_token_id and 0 <= pad_id < min(rows.values()),
        f"generation fills with {pad_id}, the tokenizer's pad is {tokenizer.pad_token_id}, the smallest embedding has "
        f"{min(rows.values())} rows",
        "give generation the tokenizer's pad token, and one that every model embeds (the end token will do)",
    )
    return [vocabulary, end, pad_token]


def check_fit(actor: Actor, reward: CompositeReward, max_prompt_tokens: int) -> Finding:
    """Room for the longest prompt with the longest answer in every model."""
    longest = max_prompt_tokens + actor.generation.max_new_tokens
    configs = {name: role.model.hf.config for name, role in roles(actor, reward).items()}
    known = {name: getattr(config, "max_position_embeddings", None) for name, config in configs.items()}
    positions = {name: n for name, n in known.items() if n is not None}
    return finding(
        "prompts fit",
        all(longest <= n for n in positions.values()),
        f"prompt {max_prompt_tokens} + answer {actor.generation.max_new_tokens} = {longest} tokens"
        + "".join(f", {name} {n}" for name, n in positions.items()),
        "lower --max_prompt_seq_len or --max_answer_seq_len",
        tokens=longest,
        **{name.replace(" ", "_"): n for name, n in positions.items()},
    )


def check_sampling(actor: Actor) -> Finding:
    """Whether the update differentiates the distribution that answers come from."""
    drawn, learned = actor.generation.sampling, actor.sampling
    return finding(
        "sampling is what is learned",
        drawn == learned,
        f"drawn at {drawn}" + ("" if drawn == learned else f", learned as {learned}"),
        "the gradient is biased, as in the published runs; --logprobs_of sampling makes it exact",
        bad=WARNING,
    )


def check_ranks() -> Finding:
    """Whether every rank draws noise of its own: equal random states would give equal answers to equal prompts."""
    state = torch.cuda.get_rng_state() if device().type == "cuda" else torch.get_rng_state()
    states = gather_objects(zlib.crc32(state.numpy().tobytes()))
    return finding(
        "ranks draw different noise",
        len(set(states)) == len(states),
        f"{len(set(states))} random states on {len(states)} rank{'s' * (len(states) > 1)}",
        "seed every rank differently before training (utils.distributed.set_seed)",
    )


def check_reload(actor: Actor, tokenizer: PreTrainedTokenizerBase, probe: Probe, limit: int) -> Finding:
    """What is exported is what was trained: the actor, written to a temporary folder and read again by rank 0."""
    name, size = "export reads back the same", count_parameters(actor.model)
    if size > limit:
        return Finding(name, SKIPPED, f"{size / 1e6:,.0f} million parameters: not written to disk before training")
    logprobs, distance = logprobs_under(actor, probe.sampled, Sampling()), 0.0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):  # as training does: the second finds the first in its place
            export(actor.model, tokenizer, folder, zero3=actor.zero3)
        if is_main():
            dtype = actor.engine.config.torch_dtype
            again = load_policy(folder, "the exported actor", dtype=dtype, tokenizer=load_tokenizer(folder))
            read = again.eval().to(device())(probe.sampled)[0]
            distance = float((read.double() - logprobs.double()).abs()[probe.sampled.answer_mask].mean())
    distance = gather_objects(distance)[0]
    # The same weights in the same format give the same numbers; only merged adapters are rounded anew.
    merged = any("lora_" in parameter for parameter, _ in actor.model.named_parameters())
    return finding(
        name,
        distance <= (TOLERANCE[actor.engine.config.dtype] if merged else EXACT),
        f"log-probs differ by mean {distance:.2g} nats",
        "what is saved would not be what trains: compare the versions with constraints.txt, and report it as a bug",
        mean=distance,
    )
