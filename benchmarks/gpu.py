"""What this project does on this machine's GPUs: `make gpu`.

    python benchmarks/gpu.py --output docs/results/gpu.md

Runs the tests that need a GPU, the demo in bf16, `benchmarks/rounding.py` and `benchmarks/rlhf_step.py`, and writes
their figures into one document; the last and `benchmarks/memory.py` have documents of their own. A part that fails is
written down as failed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
from measuring import ROOT, installed, table

PARTS = ["tests", "demo", "rounding", "cost", "memory"]
STEPS = "rlhf_step_gpu.md"
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "peft", "datasets", "flash_attn")


def run(*command: str | Path) -> tuple[int, str, float]:
    """Exit status, output and seconds; the output is shown as well."""
    started, lines = time.perf_counter(), []
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines), time.perf_counter() - started


def machine() -> list[str]:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    gpus = " and ".join(f"{names.count(name)} x {name}" for name in sorted(set(names)))
    versions = ", ".join(map(installed, PACKAGES))
    return [f"{gpus}; CUDA {torch.version.cuda}; Python {platform.python_version()}; {versions}.", ""]


def tests(folder: Path) -> tuple[bool, list[str]]:
    """The table of the tests that need a GPU."""
    report = folder / "tests.xml"
    status, _, seconds = run(sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}")
    lines = ["## Tests", "", "    python -m pytest -m gpu", ""]
    if not report.is_file():
        return False, [*lines, f"ended with status {status}.", ""]
    outcomes: dict[str, str] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag: child for child in case}
        bad = kinds.get("failure", kinds.get("error"))
        if bad is not None:
            outcome = f"FAILED: {(bad.get('message') or '').splitlines()[0][:150]}"
        else:
            outcome = f"skipped: {kinds['skipped'].get('message')}" if "skipped" in kinds else "passed"
        outcomes[f"{case.get('name')}"] = outcome.replace("|", "/")
    lines += [f"{list(outcomes.values()).count('passed')} of {len(outcomes)} passed in {seconds:.0f} s.", ""]
    return status == 0, lines + table(("test", "outcome"), outcomes.items())


def demo() -> tuple[bool, list[str]]:
    status, output, seconds = run("make", "demo")
    end = output.rpartition("-" * 84)[0]
    table = output[end.find("-" * 84) :] if end else output[-2000:]
    table = table.partition("base     output")[0]
    block = [f"    {line}".rstrip() for line in table.strip().splitlines()]
    return status == 0, [f"## The demo, {seconds:.0f} s", "", "    make demo", "", *block, ""]


def rounding() -> tuple[bool, list[str]]:
    status, output, _ = run(sys.executable, "benchmarks/rounding.py")
    table = output[output.find("| ") :].rstrip()
    return status == 0, ["## What 16 bits cost", "", "    python benchmarks/rounding.py", "", table, ""]


def cost(shape: str) -> tuple[bool, list[str]]:
    """`rlhf_step.py`, whose document has the tables."""
    command = ["benchmarks/rlhf_step.py", "--shape", shape, "--dtype", "bf16", "--output", f"docs/results/{STEPS}"]
    status, output, _ = run(sys.executable, *command)
    said = f"the tables are in [{STEPS}]({STEPS})." if status == 0 else f"failed: {output[-500:]}"
    return status == 0, ["## What a step costs", "", f"    python {shlex.join(command)}", "", said, ""]


def memory(folder: Path) -> tuple[bool, list[str]]:
    """The planner beside what torch has allocated."""
    command = ["benchmarks/memory.py", "--write"]
    status, output, _ = run(sys.executable, *command, "--json", folder / "memory.json")
    said = "the peaks of each phase are in [memory.md](memory.md)." if status == 0 else f"failed: {output[-500:]}"
    return status == 0, ["## Planned and held memory", "", f"    python {' '.join(command)}", "", said, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="docs/results/gpu.md", help="a Markdown file")
    parser.add_argument("--shape", default="1.1b", help="of the models of rlhf_step.py")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no GPU is visible to torch")
    good, lines = True, ["# On GPUs", "", "    make gpu", "", *machine()]
    with tempfile.TemporaryDirectory() as folder:
        parts = {"tests": lambda: tests(Path(folder)), "demo": demo, "rounding": rounding}
        parts["cost"] = lambda: cost(args.shape)
        parts["memory"] = lambda: memory(Path(folder))
        for part in args.parts:
            passed, found = parts[part]()
            good, lines = good and passed, lines + found
            Path(args.output).write_text("\n".join(lines).rstrip() + "\n")  # what there is, should the next part hang
    sys.exit(not good)


if __name__ == "__main__":
    main()
