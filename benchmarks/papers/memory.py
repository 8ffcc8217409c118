"""The planner beside published memory: the largest batch, and the models alone."""

from __future__ import annotations

from collections.abc import Iterator

from papers.hours import A100, job_of
from papers.published import MODELS, NAMES, RUNS

from remax.planning.phases import GIB


def largest_batches() -> Iterator[list[str]]:
    """Rows: GPUs, Adam offloaded, algorithm, published twice, planned; the most prompts on all GPUs together."""
    from remax.planning.advice import largest

    versions = [[run for run in RUNS if run.source == source] for source in ("ReMax v1", "ReMax ICML")]
    for pair in zip(*versions, strict=True):
        algo, gpus, offload = pair[0].algo, pair[0].gpus, pair[0].offload
        assert (algo, gpus, offload) == (pair[1].algo, pair[1].gpus, pair[1].offload)
        found = largest(job_of(algo, gpus, offload), A100)
        planned = None if found is None else found.job.rows.prompts * gpus
        batches = ["out of memory" if n is None else str(n) for n in (*(run.batch for run in pair), planned)]
        yield [str(gpus), "yes" if offload else "no", NAMES[algo], *batches]


def model_states() -> dict[str, float]:
    """GiB of Llama-2-7B on one GPU, without activations, by the names of `MODELS`."""
    from remax.planning.phases import plan
    from remax.planning.states import STEP

    terms = plan(job_of("remax", 1, False)).terms
    trained = sum(term.at.get(STEP, 0.0) for term in terms if term.name.startswith("actor: ")) / GIB
    ppo = job_of("ppo", 1, False)
    assert ppo.critic is not None
    frozen, critic = 2 * ppo.actor.size.parameters / GIB, 18 * ppo.critic.size.parameters / GIB
    both = {"ppo": trained + critic + 2 * frozen, "remax": trained + 2 * frozen}
    return {"trained": trained, "frozen": frozen} | both


def model_rows() -> Iterator[list[str]]:
    """Rows: name, published, planned."""
    names = {
        "trained": "a trained model",
        "frozen": "a frozen model",
        "ppo": "PPO: two trained, two frozen",
        "remax": "ReMax: one trained, two frozen",
    }
    planned = model_states()
    for key, name in names.items():
        yield [name, f"{MODELS[key]:.2f}", f"{planned[key]:.2f}"]
