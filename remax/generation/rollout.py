"""Answers from a policy: sampled ones and greedy ones."""

from __future__ import annotations

from transformers import PreTrainedModel

from remax.core.sequences import Prompts
from remax.generation.decoder import Answers, Decoder, GenerationSettings
from remax.generation.graphs import Graphs
from remax.generation.loop import SharedPromptDecoder

DEFAULT_DECODER: Decoder = SharedPromptDecoder()


def decoder_for_one_model(graphs: bool) -> Decoder:
    """With CUDA graphs, which belong to a model, or the decoder that all others share."""
    return SharedPromptDecoder(graphs=Graphs()) if graphs else DEFAULT_DECODER


def rollout(
    model: PreTrainedModel,
    prompts: Prompts,
    settings: GenerationSettings,
    *,
    samples: int = 1,
    greedy: bool = True,
    logprobs: bool = False,
    synced_gpus: bool = False,
    decoder: Decoder = DEFAULT_DECODER,
) -> Answers:
    """Answers every prompt `samples` times by sampling (adjacent rows) and once greedily.

    The model must be in eval mode. See `Decoder` for the other arguments.
    """
    return decoder(model, prompts, settings, samples=samples, greedy=greedy, logprobs=logprobs, synced_gpus=synced_gpus)
