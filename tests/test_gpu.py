"""The stages on GPUs, as many as there are: every number format, ZeRO stage and place to offload to (`make gpu`).

The runs are short and their models tiny. What they must show: they end, their figures are finite, those of fp32 are the
CPU's, and those of 16 bits are near them.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys

import pytest
import torch

from remax.core.sampling import Sampling
from remax.engines.pretrained import load_actor
from remax.generation.decoder import GenerationSettings
from remax.generation.graphs import Graphs
from remax.generation.loop import SharedPromptDecoder
from tests.references import cases
from tests.remax.generation.test_loop import PAD, SERVED, assert_same, decode, make, prompts
from utils.distributed import free_port

pytestmark = [pytest.mark.gpu, pytest.mark.ranks]

STEP_1 = "--model_name_or_path {models}/llama --dtype"
STEP_2 = "--model_name_or_path {models}/opt --disable_dropout --dtype"  # whose draws are a device's own
LLAMA = "--actor_model_name_or_path {models}/llama --reward_model_name_or_path {models}/llama-reward"


def rlhf(dtype: str, zero_stage: int, more: str = "--algo remax") -> tuple[int, str]:
    spread = f" --actor_dtype {dtype} --reward_dtype {dtype} --actor_zero_stage {zero_stage}"
    frozen = " --reference_zero_stage 3 --reward_zero_stage 3" if zero_stage == 3 else ""
    return 3, f"{LLAMA}{spread}{frozen} --skip_doctor false {more}"


# name -> (stage, flags); the name begins with the objective, whose fp32 figures the others are compared with
RUNS: dict[str, tuple[int, str]] = {
    **{f"supervised, fp32, ZeRO {stage}": (1, f"{STEP_1} fp32 --zero_stage {stage}") for stage in range(4)},
    **{f"supervised, bf16, ZeRO {stage}": (1, f"{STEP_1} bf16 --zero_stage {stage}") for stage in range(4)},
    **{f"supervised, fp16, ZeRO {stage}": (1, f"{STEP_1} fp16 --zero_stage {stage}") for stage in range(4)},
    "supervised, bf16, ZeRO 2, packed": (1, f"{STEP_1} bf16 --zero_stage 2 --packing"),
    "supervised, bf16, ZeRO 2, checkpointed": (1, f"{STEP_1} bf16 --zero_stage 2 --gradient_checkpointing"),
    "ranking, fp32": (2, f"{STEP_2} fp32"),
    "ranking, bf16, ZeRO 2": (2, f"{STEP_2} bf16 --zero_stage 2"),
    "ranking, bf16, ZeRO 3": (2, f"{STEP_2} bf16 --zero_stage 3"),
    "dpo, fp32": (2, "--model_name_or_path {models}/gpt2 --loss dpo --disable_dropout --dtype fp32"),
    "dpo, bf16, ZeRO 3": (
        2,
        "--model_name_or_path {models}/gpt2 --loss dpo --disable_dropout --dtype bf16 --zero_stage 3"
        " --reference_zero_stage 3",
    ),
    "remax, fp32": rlhf("fp32", 0),
    "remax, fp32, ZeRO 3": rlhf("fp32", 3),
    "remax, bf16, ZeRO 2": rlhf("bf16", 2),
    "remax, bf16, ZeRO 3": rlhf("bf16", 3),
    "remax, bf16, ZeRO 3, synced, checkpointed, LoRA": rlhf(
        "bf16",
        3,
        "--algo remax --zero3_generation synced --actor_gradient_checkpointing --actor_lora_dim 2"
        " --actor_lora_module_name _proj",
    ),
    "remax, fp16, ZeRO 2": rlhf("fp16", 2),
    "remax, bf16, ZeRO 2, full KL, variance, EMA": rlhf(
        "bf16", 2, "--algo remax --penalty full_kl_full_step --log_variance --enable_ema"
    ),
    "remax, bf16, ZeRO 2, CUDA graphs": rlhf("bf16", 2, "--algo remax --cuda_graphs"),
    "rloo, bf16, ZeRO 2": rlhf("bf16", 2, "--algo rloo --samples_per_prompt 2"),
    "grpo, bf16, ZeRO 2": rlhf("bf16", 2, "--algo grpo --samples_per_prompt 2"),
    "superhf, bf16, ZeRO 2": rlhf("bf16", 2, "--algo superhf --samples_per_prompt 4"),
    "inpo, bf16, ZeRO 3": rlhf("bf16", 3, "--algo inpo --samples_per_prompt 2 --ppo_epochs 2"),
    "ppo, bf16, ZeRO 2": rlhf("bf16", 2, "--algo ppo --ppo_epochs 2 --critic_zero_stage 2"),
    "ppo, bf16, ZeRO 3": rlhf("bf16", 3, "--algo ppo --critic_zero_stage 3"),
}
OFFLOAD: dict[str, tuple[int, str]] = {
    "supervised, fp32, ZeRO 2, offloaded": (1, f"{STEP_1} fp32 --zero_stage 2 --offload"),
    "supervised, bf16, ZeRO 2, offloaded": (1, f"{STEP_1} bf16 --zero_stage 2 --offload"),
    "supervised, bf16, ZeRO 3, offloaded": (1, f"{STEP_1} bf16 --zero_stage 3 --offload --offload_parameters"),
    "remax, bf16, ZeRO 3, offloaded": rlhf(
        "bf16", 3, "--algo remax --offload --offload_parameters --offload_reference_model --offload_reward_model"
    ),
}
ATTENTION: dict[str, tuple[int, str]] = {
    "supervised, bf16, ZeRO 2, flash attention": (
        1,
        f"{STEP_1} bf16 --zero_stage 2 --attn_implementation flash_attention_2",
    ),
    "supervised, bf16, ZeRO 2, flash attention, packed": (
        1,
        f"{STEP_1} bf16 --zero_stage 2 --attn_implementation flash_attention_2 --packing",
    ),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder of models and data that the pinned runs read."""
    folder = tmp_path_factory.mktemp("gpu")
    cases.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def launched(root, prepared, run_command):
    """launched(runs, place) -> {name: (exit status, output folder, log)}: all of them in one launch."""
    folder = prepared

    def launch(runs: dict[str, tuple[int, str]], place: str, ranks: int, **environment) -> dict:
        jobs, outputs = [], {}
        for name, (stage, flags) in runs.items():
            output = folder / place / name.replace(",", "").replace(" ", "_")
            output.parent.mkdir(exist_ok=True)
            jobs.append(
                {
                    "program": str(root / cases.STAGES[stage] / "main.py"),
                    "flags": cases.command(stage, flags, folder, output),
                    "folder": str(folder),
                    "log": f"{output}.log",
                }
            )
            outputs[name] = output
        file = folder / f"{place}.json"
        file.write_text(json.dumps(jobs))
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", ranks]
        launcher += ["--master_port", free_port(), root / "tests/mains.py", file]
        done = run_command(launcher, folder, **environment)
        finished = file.with_suffix(".done")
        status = [job["status"] for job in json.loads(finished.read_text())] if finished.is_file() else []
        status += [f"not run: {done.stdout[-3000:]}"] * (len(jobs) - len(status))
        return {name: (status[i], output) for i, (name, output) in enumerate(outputs.items())}

    return launch


@pytest.fixture(scope="module")
def on_gpus(launched, request):
    """The runs that need no further package: those that the chosen tests name, and what they are compared with."""
    chosen = [item for item in request.session.items if "on_gpus" in getattr(item, "fixturenames", ())]
    named = {item.callspec.params.get("name") for item in chosen if hasattr(item, "callspec")}
    named |= {f"supervised, fp32, ZeRO {stage}" for stage in range(4)} | {"ranking, fp32", "dpo, fp32"}
    return launched({name: run for name, run in RUNS.items() if name in named}, "gpu", torch.cuda.device_count())


@pytest.fixture(scope="module")
def offloaded(launched):
    """Those with states in CPU memory: the first compiles DeepSpeed's CPU optimizer."""
    return launched(OFFLOAD, "offload", torch.cuda.device_count())


@pytest.fixture(scope="module")
def on_cpu(launched):
    runs = {name: RUNS[name] for name in ("supervised, fp32, ZeRO 0", "ranking, fp32", "dpo, fp32")}
    ranks = torch.cuda.device_count()  # the same rows to the same rank
    return launched(runs, "cpu", ranks, DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="2")


def figures(outcome: tuple, name: str) -> dict[str, float]:
    """The last value of every number that a run has logged; all of them must be finite."""
    status, output = outcome
    log = output.parent / f"{output.name}.log"
    assert status == 0, f"{name}: {status}\n{log.read_text()[-3000:] if log.is_file() else ''}"
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    numbers = {k: v for record in records for k, v in record.items() if isinstance(v, float)}
    assert all(map(math.isfinite, numbers.values())), {k: v for k, v in numbers.items() if not math.isfinite(v)}
    assert any(output.rglob("*.safetensors"))
    return numbers


LIKE_FP32 = ("supervised", "ranking", "dpo")  # their figures do not depend on draws


def compare(outcome: tuple, expected: tuple, name: str, tolerance: float) -> None:
    """The loss of the last steps."""
    found, reference = figures(outcome, name)["train/loss"], figures(expected, name)["train/loss"]
    assert found == pytest.approx(reference, rel=tolerance), name


@pytest.mark.parametrize("name", RUNS)
def test_runs(name, on_gpus):
    assert "train/loss" in figures(on_gpus[name], name)


@pytest.mark.parametrize("name", [name for name in RUNS if name.split(",")[0] in LIKE_FP32 and "16" in name])
def test_16_bits_are_near_fp32(name, on_gpus):
    kind = name.split(",")[0]
    fp32 = {"supervised": "supervised, fp32, ZeRO 0"}.get(kind, f"{kind}, fp32")
    compare(on_gpus[name], on_gpus[fp32], name, tolerance=3e-2)


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_zero_stages_agree(stage, on_gpus):
    name = f"supervised, fp32, ZeRO {stage}"
    compare(on_gpus[name], on_gpus["supervised, fp32, ZeRO 0"], name, tolerance=1e-3)


@pytest.mark.parametrize("name", ("supervised, fp32, ZeRO 0", "ranking, fp32", "dpo, fp32"))
def test_the_gpu_computes_what_the_cpu_computes(name, on_gpus, on_cpu):
    compare(on_gpus[name], on_cpu[name], name, tolerance=1e-3)


@pytest.mark.compiled
@pytest.mark.parametrize("name", OFFLOAD)
def test_offloaded(name, offloaded, on_gpus):
    assert "train/loss" in figures(offloaded[name], name)
    if name.startswith("supervised"):
        compare(offloaded[name], on_gpus["supervised, fp32, ZeRO 0"], name, tolerance=3e-2)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="no flash_attn")
def test_flash_attention(launched, on_gpus):
    for name, outcome in launched(ATTENTION, "attention", torch.cuda.device_count()).items():
        compare(outcome, on_gpus["supervised, fp32, ZeRO 0"], name, tolerance=3e-2)


@pytest.mark.parametrize("kind", ("llama", "gpt2", "opt", "mistral", "gemma2"))
def test_graphs_decode_what_single_launches_do(kind):
    # Twice for what is recorded the second time; then with other weights where the first ones were.
    model, settings = make(kind, SERVED[kind]).cuda(), GenerationSettings(36, PAD, Sampling(0.7, top_p=0.9, top_k=20))
    recorded, plain = SharedPromptDecoder(graphs=Graphs()), SharedPromptDecoder()
    for scale in (1.0, 1.1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        expected = decode(plain, model, settings)
        for _ in range(2):
            assert_same(decode(recorded, model, settings), expected)
    assert sum(step is not None for step in recorded.graphs.steps.values()) > 1


def test_a_model_of_a_folder_decodes_by_graphs(prepared):
    actor, _ = load_actor(str(prepared / "models/llama"), max_new_tokens=12)
    answers = [actor.rollout(prompts().to(actor.model.hf.device), samples=0) for _ in range(2)]
    assert any(actor.decoder.graphs.steps.values())
    assert torch.equal(answers[0].greedy.input_ids, answers[1].greedy.input_ids)


def test_what_cannot_be_recorded_is_decoded_all_the_same(capsys):
    # The hook waits for the GPU, which ends the recording. The decode after that draws as if nothing had happened.
    model, settings = make("llama", SERVED["llama"]).cuda(), GenerationSettings(36, PAD, Sampling(0.7, top_p=0.9))
    expected, decoder = decode(SharedPromptDecoder(), model, settings), SharedPromptDecoder(graphs=Graphs())
    model.lm_head.register_forward_hook(lambda module, args, output: print(output[0, 0, 0].item()))
    here = torch.cuda.current_stream()
    for _ in range(2):
        assert_same(decode(decoder, model, settings), expected)
    assert torch.cuda.current_stream() == here and decoder.graphs is None
    # Nor does the allocator wait for a recording to end: what another stream has used is freed when it is done.
    used, other = torch.zeros(2**20, device="cuda"), torch.cuda.Stream()
    used.record_stream(other)
    del used
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.zeros(2, device="cuda")
    assert torch.cuda.memory_allocated() < held - 2**21
    assert capsys.readouterr().out.count("CUDA graphs: a decode step cannot be recorded") == 1


def test_nccl_reduces(launched, root, run_command, tmp_path):
    ranks = torch.cuda.device_count()
    program = tmp_path / "reduce.py"
    program.write_text(
        "from utils.distributed import barrier, device, init_distributed, rank, sum_across_ranks, world_size\n"
        "import torch.distributed as dist\n"
        "init_distributed()\n"
        "barrier()\n"
        "total = sum_across_ranks({'rank': rank() + 1.0})['rank']\n"
        "assert total == world_size() * (world_size() + 1) / 2 and device().type == 'cuda'\n"
        "print('backend', dist.get_backend())\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", free_port()]
    done = run_command([*command, program], tmp_path)
    assert done.returncode == 0 and "backend nccl" in done.stdout, done.stdout
