"""What this project relies on in other libraries beyond their documentation; the files that do so stand in each test.

A new version that breaks one of these assumptions fails here, by name, before it fails anywhere else.
"""

import inspect
import os
import sys

import datasets
import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from remax.demo.tiny_models import tiny_config


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config("llama", 50, pad_token_id=0), dtype=torch.float32).eval()


@pytest.fixture
def recorded(monkeypatch):
    """An attention of our own that keeps what it is given."""
    calls = []

    def attention(module, query, key, value, attention_mask, **options):
        calls.append({"module": module, "mask": attention_mask, **options})
        return sdpa_attention_forward(module, query, key, value, None, is_causal=True, scaling=options["scaling"])

    AttentionInterface.register("recorded", attention)
    return calls


def test_processes_of_a_test_look_for_libraries_where_it_does(monkeypatch, tmp_path, run_command):
    # Ranks, too: another version of a library, laid over the installed one by PYTHONPATH, must reach them.
    ours = os.environ["PYTHONPATH"].split(os.pathsep)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*ours, str(tmp_path)]))
    found = run_command([sys.executable, "-c", "import sys; print(*sys.path, sep='\\n')"]).stdout.splitlines()
    assert str(tmp_path) in found and found.index(ours[0]) < found.index(str(tmp_path))


# ------------------------------------------------------------------------------------------------------- transformers


def test_the_attention_is_named_in_the_configuration_and_can_be_exchanged(llama, recorded):
    # remax/models/packing.py: prepare_packing, unpacked, last_hidden
    assert llama.config._attn_implementation == "sdpa"
    llama.set_attn_implementation("recorded")
    assert llama.config._attn_implementation == llama.base_model.config._attn_implementation == "recorded"


def test_a_registered_attention_gets_no_mask_and_every_further_argument(llama, recorded):
    # remax/models/packing.py: attend_in_pieces
    llama.set_attn_implementation("recorded")
    llama.base_model(input_ids=torch.arange(5)[None], use_cache=False, pieces=((2, 3),))
    assert len(recorded) == llama.config.num_hidden_layers
    assert all(call["mask"] is None and call["pieces"] == ((2, 3),) for call in recorded)


def test_sdpa_without_a_mask_is_causal_and_gives_rows_first(llama):
    # remax/models/packing.py: attend_in_pieces passes each piece on to it
    layer = llama.base_model.layers[0].self_attn
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 4, 3, 8), torch.randn(1, 4, 3, 8)  # (B, heads, T, D)
    out = sdpa_attention_forward(layer, q, k, v, None)[0]
    assert out.shape == (1, 3, 4, 8)
    assert torch.allclose(out[:, 0], v[:, :, 0])  # the first token sees itself alone


def test_a_cache_is_handed_each_layers_keys_and_the_attention_what_it_gives_back(llama, recorded):
    # remax/generation/cache.py: PromptCache.update, attend
    class Kept(Cache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            given.append((layer_idx, tuple(key_states.shape)))
            key_states.remembered = layer_idx
            return key_states, value_states

    given: list[tuple] = []
    found = []

    def attention(module, query, key, value, attention_mask, **options):
        found.append((key.remembered, attention_mask, tuple(query.shape)))
        return value.transpose(1, 2), None

    AttentionInterface.register("kept", attention)
    llama.set_attn_implementation("kept")
    where = {"position_ids": torch.tensor([[4], [2], [7]]), "past_key_values": Kept(layers=[])}
    llama(input_ids=torch.tensor([[3], [5], [1]]), use_cache=True, **where)
    layers, heads = range(llama.config.num_hidden_layers), llama.config.num_attention_heads
    assert given == [(i, (3, heads, 1, 8)) for i in layers]
    assert found == [(i, None, (3, heads, 1, 8)) for i in layers]


def test_families_say_whether_their_attention_can_be_exchanged():
    # remax/generation/loop.py: fault_of
    from transformers import BloomForCausalLM, FalconForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, OPTForCausalLM

    assert all(kind._supports_attention_backend for kind in (LlamaForCausalLM, OPTForCausalLM, GPT2LMHeadModel))
    assert not any(kind._supports_attention_backend for kind in (BloomForCausalLM, FalconForCausalLM))


def test_generate_takes_the_only_token_that_a_processor_leaves(llama):
    # remax/generation/hugging_face.py: Choice; nothing that generate adds by itself comes before it
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            steps.append((tuple(input_ids.shape), scores.clone()))
            return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([7]), 0.0)

    steps: list[tuple] = []
    ids = torch.tensor([[3, 5]])
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=[1], pad_token_id=0)
    out = llama.generate(input_ids=ids, generation_config=config, logits_processor=LogitsProcessorList([Only()]))
    assert out.tolist() == [[3, 5, 7, 7]]
    assert [shape for shape, _ in steps] == [(1, 2), (1, 3)]
    torch.testing.assert_close(steps[0][1], llama(input_ids=ids).logits[:, -1], atol=1e-5, rtol=1e-4)


def test_the_zero3_switch_is_process_wide_and_can_be_dropped():
    # remax/engines/zero.py: loading
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

    switch = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    del switch
    unset_hf_deepspeed_config()
    assert not is_deepspeed_zero3_enabled()


def test_loading_reports_missing_weights(llama, tmp_path):
    # remax/models/loading.py: from_pretrained; remax/models/reward_model.py: load_reward_model
    llama.save_pretrained(tmp_path)
    model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, output_loading_info=True)
    assert set(report["missing_keys"]) == {"score.weight"}
    assert model.score.weight.shape == (1, llama.config.hidden_size)


# ---------------------------------------------------------------------------------------------------------------- peft


def test_an_adapted_layer_holds_its_base_its_factors_and_their_scale(llama):
    # remax/models/lora.py: merge_adapters
    from peft import LoraConfig

    llama.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    stem = "model.layers.0.self_attn.q_proj"
    layer = llama.get_submodule(stem)
    (adapter,) = layer.active_adapters
    assert layer.scaling[adapter] == 4 / 2
    assert layer.fan_in_fan_out is False
    names = {f"{stem}.base_layer.weight", f"{stem}.lora_A.{adapter}.weight", f"{stem}.lora_B.{adapter}.weight"}
    assert names <= llama.state_dict().keys()


# ----------------------------------------------------------------------------------------------------------- deepspeed


def test_the_switch_for_zero_3_can_be_put_aside_and_back():
    # remax/models/weights.py: unpartitioned
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

    from remax.models.weights import unpartitioned

    switch = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        assert is_deepspeed_zero3_enabled() and switch.is_zero3()
        with unpartitioned():
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()
    with unpartitioned():
        pass
    assert not is_deepspeed_zero3_enabled()


def test_a_model_is_compared_with_its_weights_without_memory_or_random_numbers(llama, tmp_path):
    # remax/models/loading.py: from_pretrained
    llama.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    options = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    with torch.random.fork_rng(devices=[]):
        hf, report = type(llama).from_pretrained(tmp_path, num_hidden_layers=3, **options)
    assert all(parameter.is_meta for parameter in hf.parameters())
    assert report["missing_keys"] and {name.split(".")[2] for name in report["missing_keys"]} == {"2"}
    assert torch.equal(torch.get_rng_state(), before)


def test_the_shared_memory_collective_can_be_left_out():
    # utils/distributed.py: init_distributed
    import deepspeed

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


def test_zero3_hooks_can_be_taken_off_for_generation():
    # remax/engines/base.py: Engine.generating
    from deepspeed.runtime.zero import unwrap_model_for_generation

    assert len(inspect.signature(unwrap_model_for_generation).parameters) == 1
    assert hasattr(unwrap_model_for_generation, "__wrapped__")  # a context manager made of a generator


def test_the_engine_says_when_it_steps_and_whether_it_did():
    # remax/engines/base.py: TrainedEngine
    from deepspeed.runtime.engine import DeepSpeedEngine

    boundary = inspect.signature(DeepSpeedEngine.set_gradient_accumulation_boundary).parameters
    assert list(boundary) == ["self", "is_boundary"]
    for name in ("was_step_applied", "get_global_grad_norm", "get_lr", "zero_grad"):
        assert len(inspect.signature(getattr(DeepSpeedEngine, name)).parameters) == 1, name


def test_a_partitioned_parameter_keeps_its_shape_and_size():
    # remax/engines/optimizer.py: optimizer_groups; remax/models/loading.py: count_parameters
    from deepspeed.runtime.zero import partition_parameters

    source = inspect.getsource(partition_parameters)
    assert "param.ds_shape = " in source and "param.ds_numel = " in source


# ------------------------------------------------------------------------------------------- datasets, huggingface_hub


def test_a_table_has_a_fingerprint_which_map_replaces():
    # utils/data/{preferences,encoding,text}.py: the names of cached tables
    one, same, other = (Dataset.from_dict({"x": x}) for x in ([1, 2], [1, 2], [1, 3]))
    assert one._fingerprint == same._fingerprint != other._fingerprint
    assert one.map(lambda row: row, new_fingerprint="given")._fingerprint == "given"


def test_offline_is_a_switch_that_is_read_at_each_call(monkeypatch, tmp_path):
    # utils/hub.py: hub_is_reachable
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    assert isinstance(datasets.config.HF_HUB_OFFLINE, bool)
    with pytest.raises(LocalEntryNotFoundError) as error:
        hf_hub_download("owner/model", "config.json", cache_dir=tmp_path)
    assert isinstance(error.value.__cause__, OfflineModeIsEnabled)
