"""ReMax: reinforcement learning from human feedback without a value model, on DeepSpeed."""

__version__ = "0.1.0"
