"""The figures of docs/hardware.md, from its formulas; and that remedies of docs/troubleshooting.md say what to do."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 512


def tables(document: str) -> list[list[list[str]]]:
    """Cells of each table, without head and rule."""
    found: list[list[list[str]]] = []
    before = ""
    for line in (ROOT / document).read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        before = line
    return [table[2:] for table in found]


TRAINED, ANSWERS, STEP_3, TIMES = tables("docs/hardware.md")
P = {name: float(size) for name, size, *_ in TRAINED}  # 10^9, so that bytes are GB
CACHE = {name: 2 * int(layers) * int(width) * 2 for name, layers, width, *_ in ANSWERS}  # bytes a token


def trained(parameters: float, gpus: int) -> float:
    """ZeRO 2."""
    return 2 * parameters + 16 * parameters / gpus


@pytest.mark.parametrize("row", TRAINED, ids=lambda row: row[0])
def test_memory_of_training(row):
    name, _, one, zero2, offloaded, in_cpu, zero3 = row
    offload = 2 * P[name] + 4 * P[name] / 8  # the sums of the gradients stay on the GPU
    expected = (18 * P[name], trained(P[name], 8), offload, 18 * P[name], 18 * P[name] / 8)
    assert [float(x) for x in (one, zero2, offloaded, in_cpu, zero3)] == pytest.approx(expected, abs=0.051)


@pytest.mark.parametrize("row", ANSWERS, ids=lambda row: row[0])
def test_memory_of_answers(row):
    name, _, _, token, two, many = row
    assert float(token) == pytest.approx(CACHE[name] / 1e3, abs=0.5)
    assert float(two) == pytest.approx(2 * TOKENS * CACHE[name] / 1e9, abs=0.005)
    assert float(many) == pytest.approx(64 * TOKENS * CACHE[name] / 1e9, abs=0.05)


def test_rates_of_the_time_model():
    from remax.planning.durations import Rates

    told = [[float(x) for x in re.findall(r"[\d.]*\d", achieved)] for _, _, achieved in TIMES]
    rates = Rates()
    adam = [rates.pcie / 1e9, rates.adam / 1e9]
    shares = (rates.decode, rates.forward, rates.update)
    decode, forward, update = (round(100 * share) for share in shares)
    recorded, launched = (round(1000 * seconds, 2) for seconds in (rates.recorded, rates.launch))
    assert told == [[decode, recorded], [launched], [forward], [update], [rates.network / 1e9], adam]


def test_sizes_are_those_of_the_models():
    from transformers import GPT2Config, LlamaConfig, MistralConfig, OPTConfig

    configs = {
        "GPT-2": GPT2Config(),
        "OPT-1.3B": OPTConfig(num_hidden_layers=24, hidden_size=2048, num_attention_heads=32),
        "Llama-2-7B": LlamaConfig(),
        "Mistral-7B": MistralConfig(),
        "Llama-2-13B": LlamaConfig(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40),
    }
    for name, config in configs.items():
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = heads * config.hidden_size // config.num_attention_heads
        assert CACHE[name] == 2 * config.num_hidden_layers * width * 2, name


def test_memory_of_step_3():
    name = "Llama-2-7B"
    one_row, large = 2 * TOKENS * CACHE[name] / 1e9, 64 * TOKENS * CACHE[name] / 1e9
    frozen, shared = 2 * P[name], 2 * P[name] / 8
    expected = [
        (2 * P[name] + 4 * P[name] / 8, 0, 0, one_row),
        (trained(P[name], 8), shared, shared, one_row),
        (trained(P[name], 8), shared, shared, large),
        (trained(P[name], 8), frozen, frozen, large),
    ]
    for row, parts in zip(STEP_3, expected, strict=True):
        assert [float(x) for x in row[1:]] == pytest.approx([*parts, sum(parts)], abs=0.051)


def test_the_scripts_are_those_of_the_page():
    folder = ROOT / "step3_rlhf_finetuning/training_scripts/llama2"
    authors, large = (folder / name for name in ("run_llama2_7b.sh", "run_llama2_7b_large_batch.sh"))
    assert re.search(r"--offload --offload_reference_model --offload_reward_model", authors.read_text())
    assert "--offload" not in large.read_text()
    for script, rows in ((authors, 1), (large, 32)):
        assert f"--per_device_generation_batch_size {rows} " in script.read_text()


def test_every_remedy_names_a_flag_a_variable_or_a_command():
    # That flags exist is seen to in test_layout.py.
    rows = [row for table in tables("docs/troubleshooting.md") for row in table]
    assert len(rows) > 30
    for row in rows:
        assert any("`" in cell for cell in row[1:]) or "docs" in row[-1] or "README" in row[-1], row
