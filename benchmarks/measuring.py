"""What the benchmarks share: shapes of models, processes of their own, medians, and what the machine can do at best."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOW = {"wall": time.perf_counter, "cpu": time.process_time}  # the second is of use where a machine does other work
# hidden size, feed-forward, layers, heads, key heads, vocabulary: TinyLlama, Llama 3.2 3B, Llama 2 7B; small for CPUs
SHAPES = {
    "tiny": (32, 64, 1, 2, 2, 1024),
    "10m": (256, 1024, 6, 8, 8, 8192),
    "134m": (768, 2048, 12, 12, 12, 32000),
    "1.1b": (2048, 5632, 22, 32, 4, 32000),
    "3.2b": (3072, 8192, 28, 24, 8, 128256),
    "7b": (4096, 11008, 32, 32, 32, 32000),
}


def config_of(family: str, sizes: tuple[int, ...], **more: Any) -> Any:
    """Of a Llama of these sizes, or of an OPT, which has as many key heads as heads; with one label."""
    from transformers import LlamaConfig, OPTConfig

    from remax.planning.shapes import llama_like

    if family == "llama":
        return llama_like(LlamaConfig, *sizes, num_labels=1, **more)
    hidden, wide, layers, heads, _, words = sizes
    names = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": words}
    return OPTConfig(**names, num_labels=1, ffn_dim=wide, word_embed_proj_dim=hidden, **more)


def corpus_tokenizer() -> tuple[list[dict[str, str]], Any]:
    """Rows of the built-in corpus, and a tokenizer made of them."""
    from remax.demo.corpus import make_rows
    from remax.demo.tiny_models import train_tokenizer

    rows, _ = make_rows(seed=0, train_rows=200, test_rows=1)
    return rows, train_tokenizer([row["prompt"] + row["chosen"] for row in rows])


def make_models(
    folder: Path, config: Any, tokenizer: Any, dtype: str, change: Callable[[Any], None] = lambda policy: None
) -> None:
    """Writes a policy, changed so, and a reward model, both of random weights, with their tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from remax.engines.deepspeed_config import DTYPES

    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    for name, kind in (("policy", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = kind.from_config(config, dtype=DTYPES[dtype])
        if name == "policy":
            change(model)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def spread(numbers: Sequence[float], digits: int = 3) -> str:
    """Median [least, greatest]."""
    least, greatest = min(numbers), max(numbers)
    return f"{statistics.median(numbers):.{digits}f} [{least:.{digits}f}, {greatest:.{digits}f}]"


def ratios(dividends: Sequence[float], divisors: Sequence[float]) -> list[float]:
    """Of each round: what came of two sides that took turns."""
    return [a / b for a, b in zip(dividends, divisors, strict=True)]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows), ""]


def fill(document: Path, found: Mapping[str, Sequence[str]]) -> None:
    """Puts lines between their marks, or with these at the end of the document; the prose stays."""
    text = document.read_text(encoding="utf-8")
    for name, lines in found.items():
        begin, end = (f"<!-- {word} {name} -->\n" for word in ("begin", "end"))
        before, _, rest = text.partition(begin)
        text = before + begin + "\n".join(lines).rstrip() + "\n" + end + rest.partition(end)[2]
    document.write_text(text, encoding="utf-8")


NOTES = "\n## What it shows\n"


def write_results(output: str, title: str, program: str, body: str, figures: dict, part: bool = False) -> None:
    """A Markdown file with the command and the tables, and a .json beside it with all figures.

    What somebody wrote behind the heading of `NOTES` is kept.

    Args:
        part: Only a part was measured anew: the command stays the one that made the whole.
    """
    path, command = Path(output), f"python benchmarks/{program}.py {shlex.join(sys.argv[1:])}".rstrip()
    if part and path.with_suffix(".json").is_file():
        command = json.loads(path.with_suffix(".json").read_text())["command"]
    notes = path.read_text().partition(NOTES)[2] if path.is_file() else ""
    path.write_text(f"# {title}\n\n    {command}\n\n{body}\n" + (NOTES + notes) * bool(notes))
    path.with_suffix(".json").write_text(json.dumps({"command": command, **figures}) + "\n")


def figures_of(name: str, command: Sequence[str | Path], **variables: str) -> dict:
    """What a program prints as its last line that begins with FIGURES; ends this one where it prints none.

    Args:
        variables: Added to its environment.
    """
    modules = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": modules} | variables
    done = subprocess.run([str(word) for word in command], env=environment, stdout=subprocess.PIPE, text=True)
    last = next((line for line in reversed(done.stdout.splitlines()) if line.startswith("FIGURES")), None)
    if done.returncode or last is None:
        sys.exit(f"{name} ended with status {done.returncode}\n{done.stdout[-3000:]}")
    return json.loads(last.removeprefix("FIGURES"))


def measured_apart(program: str, ways: Iterable[str], folder: Path) -> Iterator[tuple[str, dict]]:
    """(way, its figures): `program` again in a process for each, with --one WAY and --folder beside its own flags."""
    for way in ways:
        yield way, figures_of(way, [sys.executable, program, *sys.argv[1:], "--one", way, "--folder", folder])


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def peak() -> int:
    """The most bytes that torch allocated on a GPU, or that were resident, since `forget_peak`."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")


def forget_peak() -> None:
    """From here on `peak` counts."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM is VmRSS again


def machine(*packages: str, threads: int | None = None) -> str:
    """Device, versions and a rank's `threads` (by default this process's) that figures were measured with."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        table = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.*)", table.read_text()) if table.is_file() else None
        threads = threads or torch.get_num_threads()
        device = f"{found[1] if found else platform.processor()}, {threads} thread{'s' * (threads > 1)} a rank"
    return f"{device}; Python {platform.python_version()}, {', '.join(map(installed, packages))}"


def installed(package: str) -> str:
    """Its name and version."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def best_rates(dtype: str) -> dict[str, float]:
    """The most FLOP/s of a matrix product, and bytes/s that are read and written by a copy, seen on this device."""
    import torch

    cuda = torch.cuda.is_available()
    device, number = "cuda" if cuda else "cpu", {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]

    def seconds(run) -> float:
        found = []
        for _ in range(5):
            begin = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            found.append(time.perf_counter() - begin)
        return min(found)

    flops = 0.0
    for n in (4096, 8192) if cuda else (512, 1024):
        a, b = (torch.randn(n, n, device=device, dtype=number) for _ in range(2))
        flops = max(flops, 2 * n**3 / seconds(lambda a=a, b=b: torch.mm(a, b)))
    source = torch.ones(2**28 if cuda else 2**24, device=device)
    target = torch.empty_like(source)
    return {"flops": flops, "bytes": 2 * source.numel() * 4 / seconds(lambda: target.copy_(source))}
