"""Figures of papers that this project's are compared with, each with its source, as they were printed.

Nothing here was measured by this project. What was computed from printed figures says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# A source -> how it is cited in the document.
SOURCES = {
    "ReMax v1": "ReMax, v1 of arXiv 2310.10505 (October 2023), and the README of its authors' code: Llama-2-7B on A100 "
    "of 80 GB, one epoch over 45,000 prompts of full-hh-rlhf",
    "ReMax ICML": "ReMax, ICML 2024 (v4 of arXiv 2310.10505): Llama-2-7B on A800 of 80 GB, one epoch over 33,000 "
    "prompts, 256 + 256 tokens; GPT-2 of 137 M on IMDB; Mistral-7B-Instruct-v0.2 with UltraRM-13B",
    "DeepSpeed-Chat": "DeepSpeed-Chat (arXiv 2308.01320), its blog and BenckmarkSetting.md: step 3 with PPO, reward "
    "model and critic of 350 M parameters, one epoch over 264,292 prompts, 256 + 256 tokens",
    "Hydra-RLHF": "Hydra-RLHF (arXiv 2309.00754), tables 1 and 3: Llama-7B, LoRA of rank 128",
    "RLOO": "Back to Basics (arXiv 2402.14740): win rates on TL;DR, and on HH with Pythia and with Llama",
    "SuperHF": "SuperHF (arXiv 2310.16763): LLaMA-7B, pairwise win rates",
    "SimPO": "SimPO (arXiv 2405.14734), whose baselines are DPO (arXiv 2305.18290) and R-DPO (arXiv 2403.19159)",
    "INPO": "INPO (arXiv 2407.00617), abstract: Llama-3-8B",
}


@dataclass(frozen=True)
class Run:
    """A training whose time was published.

    Attributes:
        source: Of `SOURCES`.
        adapters: Of rank 128 are all that learns.
        gpu: Of `remax.planning.durations.DEVICES`.
        offload: Adam in CPU memory.
        batch: The most prompts of a step on all GPUs together; None: out of memory, 0: not told.
        prompts: Of an epoch.
        generate: Seconds of a step's answers (T_G).
        update: Seconds of a step's training (T_B).
        hours: Of an epoch.
    """

    source: str
    algo: str
    gpus: int
    offload: bool
    batch: int | None
    hours: float | None
    generate: float | None = None
    update: float | None = None
    prompts: int = 33_000
    model: str = "Llama-2-7B"
    reward: str = "Llama-2-7B"
    gpu: str = "a800"
    adapters: bool = False

    @property
    def seconds(self) -> float | None:
        """Of a step, by the hours of the epoch."""
        return self.hours * 3600 * self.batch / self.prompts if self.hours and self.batch else None

    def __str__(self) -> str:
        offload = ", Adam offloaded" if self.offload else ""
        return f"{self.source}: {NAMES[self.algo]}, {self.gpus} GPU{'s' * (self.gpus > 1)}{offload}"


NAMES = {"remax": "ReMax", "ppo": "PPO"}


def _v1(algo: str, gpus: int, offload: bool, batch: int | None, hours: float | None) -> Run:
    return Run("ReMax v1", algo, gpus, offload, batch, hours, prompts=45_000, gpu="a100")


def _chat(model: str, gpu: str, hours: float, adapters: bool = False) -> Run:
    of_chat = Run("DeepSpeed-Chat", "ppo", 8, False, 0, hours, prompts=264_292)
    return replace(of_chat, model=model, reward="OPT-350M", gpu=gpu, adapters=adapters)


RUNS = (
    _v1("ppo", 4, False, None, None),
    _v1("remax", 4, False, 104, 2.4),
    _v1("ppo", 4, True, 120, 6.0),
    _v1("remax", 4, True, 160, 2.8),
    _v1("ppo", 1, True, 32, 22.0),
    _v1("remax", 1, True, 42, 10.2),
    Run("ReMax ICML", "ppo", 4, False, None, None),
    Run("ReMax ICML", "remax", 4, False, 96, 1.8, 9.2, 4.0),
    Run("ReMax ICML", "ppo", 4, True, 112, 2.9, 4.7, 24.6),
    Run("ReMax ICML", "remax", 4, True, 152, 2.0, 10.4, 14.0),
    Run("ReMax ICML", "ppo", 1, True, 30, 12.8, 5.2, 30.4),
    Run("ReMax ICML", "remax", 1, True, 38, 9.1, 11.0, 16.7),
    # What does not hold as a whole is taken to train adapters, as DeepSpeed-Chat's scripts for 13B and 30B do.
    _chat("OPT-6.7B", "a100-40gb", 5.7),
    _chat("OPT-13B", "a100-40gb", 10.8, adapters=True),
    _chat("OPT-6.7B", "a100", 4.1),
    _chat("OPT-13B", "a100", 9.0),
    _chat("OPT-30B", "a100", 18.0, adapters=True),
)

# GiB of Llama-2-7B on one GPU without activations (ReMax ICML, which says "GB").
MODELS = {"trained": 147.02, "frozen": 12.55, "ppo": 319.14, "remax": 172.12}


@dataclass(frozen=True)
class Judged:
    """ReMax against another method on AlpacaEval's 805 prompts, by GPT-4 (ReMax v1).

    Attributes:
        wins: Of ReMax.
        characters: Of the other's answers on average, and `longer_wins`: the rate, in percent, of a judge that prefers
            the longer answer. Both were computed from the answers that the authors' repository holds.
    """

    other: str
    wins: int
    characters: int
    longer_wins: float


PROMPTS, REMAX_CHARACTERS = 805, 887
JUDGED = (Judged("SFT", 678, 432, 85.7), Judged("DPO", 606, 592, 73.4), Judged("PPO", 512, 554, 81.5))
# Mistral-7B-Instruct-v0.2 before and after ReMax (ReMax ICML): AlpacaEval's rate in percent, MT-bench's score.
MISTRAL = {"AlpacaEval": (92.78, 94.78), "MT-bench": (7.516, 7.739)}
# Table 1 of Hydra-RLHF: GB, seconds per sample; table 3: GPT-4's average win rate in percent (from a summary of it).
HYDRA = {
    "PPO": (220.0, None),
    "LoRA-PPO": (68.0, 18.75),
    "J-Hydra-PPO": (67.9, 5.01),
    "Hydra-PPO": (71.1, 6.47),
}
HYDRA_WINS = {"SFT": 48.55, "LoRA-PPO": 50.68, "J-Hydra-PPO": 46.50, "Hydra-PPO": 55.52}
# Win rates in percent: TL;DR, HH with Pythia, HH with Llama.
RLOO = {
    "RLOO, 4 answers": (77.9, 43.7, 64.1),
    "RAFT, best of 4": (73.2, 42.1, 63.3),
    "REINFORCE with a mean as baseline": (70.7, 37.9, 55.3),
    "PPO": (67.6, 29.2, 32.0),
    "DPO": (66.6, 39.0, 61.9),
}
SUPERHF = {
    "SuperHF (instruction-tuned start) over RLHF (LLaMA)": 72.7,
    "SuperHF (instruction-tuned start) over RLHF (the same start)": 45.0,
    "SuperHF (instruction-tuned start) over Alpaca": 63.6,
    "SuperHF (LLaMA) over LLaMA": 72.2,
}
# AlpacaEval 2, length-controlled win rate in percent: DPO, R-DPO.
LENGTH_CONTROLLED = {
    "Mistral-Base": (15.1, 17.4),
    "Mistral-Instruct": (26.8, 27.3),
    "Llama-3-Base": (18.2, 17.6),
    "Llama-3-Instruct": (40.3, 41.1),
}
INPO = {"AlpacaEval 2, length-controlled": 41.5, "Arena-Hard": 38.3}
