"""The line of each training script that says on what GPUs it runs, made by the planner.

    python tests/script_memory.py [--write]

prints the lines, or writes them into the scripts, below the shebang's comment; tests/test_script_settings.py compares.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from remax.cli.validate import parse_step1, parse_step2, parse_step3
from remax.planning.phases import GIB, Job, plan
from remax.planning.shapes import config_of
from remax.planning.states import Machine
from remax.stages.planning import finetuning_job, job_of

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path for path in ROOT.glob("step*/training_scripts/*/*.sh") if path.parent.name != "demo")
SIZES = (16, 24, 40, 80)  # GB of GPUs that there are
POLICIES = {  # a script's folder -> the policy; its reward model, where that has another size
    "gpt2": "gpt2",
    "opt": "opt-1.3b",
    "llama2": "Llama-2-7b",
    "hydra": "Llama-2-7b",
    "mistral": "Mistral-7B-v0.1",
}
REWARDS = {"opt": "opt-350m"}
LINE = re.compile(r"^# Fits .*\n", re.MULTILINE)


def words_of(script: Path) -> list[str]:
    """What the script gives to main.py on eight GPUs."""
    with tempfile.TemporaryDirectory() as place:
        stub = Path(place) / "deepspeed"
        stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
        stub.chmod(0o755)
        variables = {"PATH": f"{place}{os.pathsep}{os.environ['PATH']}", "NUM_GPUS": "8", "OUTPUT": f"{place}/out"}
        done = subprocess.run(["bash", script], env=os.environ | variables, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.endswith("/main.py")) + 1 :]


def jobs(script: Path, words: list[str], folder: Path) -> dict[int, Job]:
    """By the number of GPUs. `folder` holds a config.json, so that the flags name something that is there."""
    stage, family = int(script.relative_to(ROOT).parts[0][4]), script.parent.name
    model = POLICIES[family]
    scorer = REWARDS.get(family, model)
    flags = ("actor_model_name_or_path", "reward_model_name_or_path") if stage == 3 else ("model_name_or_path",)
    names = [] if family == "hydra" and stage == 3 else list(flags[1:])
    here = [word for flag in (flags[0], *names, "data_path") for word in (f"--{flag}", str(folder))]
    parse = {1: parse_step1, 2: parse_step2, 3: parse_step3}[stage]
    dtypes = (
        ["--actor_dtype", "bf16"] + (["--reward_dtype", "bf16"] if names else []) if stage == 3 else ["--dtype", "bf16"]
    )
    args = parse([*words, *here, *dtypes, "--output_dir", str(folder / "out")])

    def configs(name: str, flag: str):
        rewards = flag == "--reward_model_name_or_path" or (stage == 2 and family in REWARDS)
        return config_of(scorer if rewards else model, flag)

    make = job_of if stage == 3 else finetuning_job
    return {gpus: make(args, Machine(gpus), configs) for gpus in (1, 8)}


def line_of(script: Path, words: list[str], folder: Path) -> str:
    """The comment: the smallest GPUs that hold the script as it is, eight of them and one."""
    parts, plans = [], {gpus: plan(job) for gpus, job in jobs(script, words, folder).items()}
    for gpus, found in sorted(plans.items(), reverse=True):
        size = next((size for size in SIZES if found.fits(0.98 * size * GIB)), None)
        gib = f"{found.peak / GIB:.{0 if found.peak >= 10 * GIB else 1}f} GiB"
        if size is None:
            parts.append(f"not {gpus} x {SIZES[-1]} GB ({gib})")
        else:
            parts.append(f"{gpus} x {size} GB ({gib})")
    host = plans[8].host * 8 / GIB
    offload = f", {host:.0f} GiB of CPU memory" if host > 1 else ", nothing offloaded"
    return f"# Fits {', '.join(parts)}{offload}: by the planner, on each GPU (docs/hardware.md).\n"


def with_line(text: str, line: str) -> str:
    """The script with its line, the last of the comment at its top."""
    text = LINE.sub("", text)
    head = re.match(r"(?:#.*\n)+", text)
    assert head
    return text[: head.end()] + line + text[head.end() :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the lines into the scripts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text("{}")
        for script in SCRIPTS:
            line = line_of(script, words_of(script), Path(place))
            sys.stdout.write(f"{script.relative_to(ROOT)}\n    {line}")
            if args.write:
                script.write_text(with_line(script.read_text(encoding="utf-8"), line), encoding="utf-8")


if __name__ == "__main__":
    main()
