"""The moving average of the weights, in one process; at ZeRO stages 2 and 3 on two ranks see test_checkpoint.py."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from remax.checkpoint.ema import WeightAverage
from remax.checkpoint.export import export
from remax.models.lora import add_lora
from remax.models.policy import load_policy
from utils.tokenizer import load_tokenizer


def test_average_by_hand(make_policy):
    # average <- d * average + (1 - d) * weights
    hf = AutoModelForCausalLM.from_pretrained(make_policy("llama"))
    start = {name: p.detach().clone() for name, p in hf.named_parameters()}
    average = WeightAverage(hf, zero3=False, decay=0.9)
    for factor in (2.0, 4.0):
        with torch.no_grad():
            for name, parameter in hf.named_parameters():
                parameter.copy_(factor * start[name])
        average.update()
    for name, weight in average.state().items():
        torch.testing.assert_close(weight, (0.9 * (0.9 + 0.1 * 2.0) + 0.1 * 4.0) * start[name])
        torch.testing.assert_close(hf.get_parameter(name).detach(), 4.0 * start[name])  # the model is left alone


def test_a_bf16_model_is_averaged_in_float32(make_policy):
    # Steps of 1/1000 of a weight are lost in bfloat16, whose next number is 1/128 further on.
    hf = AutoModelForCausalLM.from_pretrained(make_policy("llama"), dtype=torch.bfloat16)
    average = WeightAverage(hf, zero3=False, decay=0.999)
    name = "model.layers.0.mlp.up_proj.weight"
    start = average.average[name].clone()
    with torch.no_grad():
        hf.get_parameter(name).mul_(2.0)
    average.update()
    torch.testing.assert_close(average.average[name], start * 1.001)
    assert average.state()[name].dtype == torch.bfloat16


@torch.no_grad()
def test_the_average_of_adapters_is_exported_merged(make_policy, tmp_path):
    folder = make_policy("llama")
    tokenizer = load_tokenizer(str(folder))
    model = load_policy(str(folder), "--model", dtype=torch.float32, tokenizer=tokenizer)
    add_lora(model.hf, 2, "q_proj", True, "--lora_module_name")
    average = WeightAverage(model.hf, zero3=False, decay=0.5)
    layer = model.hf.get_submodule("model.layers.1.self_attn.q_proj")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    b.fill_(0.1)
    average.update()
    export(model, tokenizer, tmp_path, zero3=False, state=average.state())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).get_parameter("model.layers.1.self_attn.q_proj.weight")
    torch.testing.assert_close(merged, layer.base_layer.weight + (0.5 * b) @ a)  # b was zero before, a has not moved
    assert b.eq(0.1).all()
