"""Models of a folder or the hub with their tokenizer, in a role and ready to be asked.

One call each, for programs of one's own. The stages' programs load by their flags, see `remax.stages.models`.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from remax.core.sampling import Sampling
from remax.engines.base import FrozenEngine, TrainedEngine
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.optimizer import OptimizerConfig
from remax.engines.policy import Actor, Reference
from remax.engines.scorer import Reward
from remax.engines.zero import loading
from remax.generation.decoder import GenerationSettings
from remax.generation.rollout import decoder_for_one_model
from remax.models.policy import PolicyModel, load_policy
from remax.models.reward_model import load_reward_model
from utils.distributed import device, init_distributed
from utils.tokenizer import load_tokenizer

FP32 = EngineConfig()  # a copy on each rank


def load_actor(
    name_or_path: str,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling = Sampling(),
    engine: EngineConfig = FP32,
    optimizer: OptimizerConfig | None = None,
    flag: str = "name_or_path",
) -> tuple[Actor, PreTrainedTokenizerBase]:
    """A causal language model that answers prompts, on this process's device and in eval mode.

    On a GPU its decode is recorded as CUDA graphs, below ZeRO 3.

    Args:
        name_or_path: folder or hub name.
        max_new_tokens: longest answer, in tokens.
        sampling: the distribution that answers are drawn from and log-probs are evaluated in.
        engine: number format (fp32 unless said otherwise) and spread over the ranks.
        optimizer: with one the actor can learn; this process then joins the process group, alone if nobody launched it.
        flag: what errors call the model's name.

    Raises:
        UserError: no such model or tokenizer.
    """
    if optimizer is not None:
        init_distributed()
    model, tokenizer = _policy(name_or_path, engine, flag)
    spread = FrozenEngine(model, engine) if optimizer is None else TrainedEngine(model, engine, optimizer)
    spread.train(False)
    generation = GenerationSettings(max_new_tokens, tokenizer.pad_token_id, sampling)
    decoder = decoder_for_one_model(graphs=device().type == "cuda" and engine.zero_stage < 3)
    return Actor(spread, generation=generation, decoder=decoder), tokenizer


def load_reference(
    name_or_path: str, *, sampling: Sampling = Sampling(), engine: EngineConfig = FP32
) -> tuple[Reference, PreTrainedTokenizerBase]:
    """The frozen policy that KL is measured against; arguments as those of `load_actor`."""
    model, tokenizer = _policy(name_or_path, engine)
    return Reference(FrozenEngine(model, engine), sampling=sampling), tokenizer


def load_reward(
    name_or_path: str, *, engine: EngineConfig = FP32, flag: str = "name_or_path"
) -> tuple[Reward, PreTrainedTokenizerBase]:
    """A reward model, as step 2 saves it; arguments as those of `load_actor`."""
    tokenizer = load_tokenizer(name_or_path, flag)
    with loading(engine):
        model = load_reward_model(name_or_path, flag, dtype=engine.torch_dtype, tokenizer=tokenizer)
    return Reward(FrozenEngine(model, engine)), tokenizer


def _policy(
    name_or_path: str, engine: EngineConfig, flag: str = "name_or_path"
) -> tuple[PolicyModel, PreTrainedTokenizerBase]:
    tokenizer = load_tokenizer(name_or_path, flag)
    with loading(engine):
        model = load_policy(name_or_path, flag, dtype=engine.torch_dtype, tokenizer=tokenizer)
    return model, tokenizer
