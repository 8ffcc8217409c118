"""Shared by all tests: no network, one thread a process, tiny models and rows made from the built-in corpus."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # two ranks on two cores; more threads than cores cost more than they bring
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from tests import zygote

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts so in its background, and bash cannot undo it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
# For the processes that tests start: this repository, then what the tests themselves were told to import.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def missing_for_compilation() -> str | None:
    """What DeepSpeed's C++ optimizer needs and this machine lacks."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "no C++ compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "no Python.h"
    if shutil.which("ninja") is None:
        return "no ninja"
    return None


def pytest_collection_modifyitems(items):
    lacking = missing_for_compilation()
    for item in items:
        if lacking and item.get_closest_marker("compiled"):
            item.add_marker(pytest.mark.skip(reason=lacking))
        if not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish(session):
    """What keeps one core busy for a minute begins beside the first tests: `start_early` of the selected modules."""
    if not session.config.option.collectonly:
        for module in dict.fromkeys(item.getparent(pytest.Module).obj for item in session.items):
            getattr(module, "start_early", lambda: None)()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def can_compile() -> bool:
    """Whether DeepSpeed's C++ optimizer can be compiled here: --offload on a CPU needs it."""
    return missing_for_compilation() is None


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with train.jsonl (200 rows) and test.jsonl (24 rows) of {prompt, chosen, rejected}."""
    from remax.demo.corpus import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"), seed=0, train_rows=200, test_rows=24)


@pytest.fixture(scope="session")
def rank_answers():
    """rank_answers(corpus, folder) -> the corpus with two to four answers to each prompt, the second and third tied."""

    def rank(corpus: Path, folder: Path) -> Path:
        for split in ("train", "test"):
            lines = []
            for i, line in enumerate((corpus / f"{split}.jsonl").read_text().splitlines()):
                row = json.loads(line)
                answers = [row["chosen"], row["rejected"], row["rejected"] + " Bye.", row["chosen"] + " Never."]
                order = {"answers": answers[: 2 + i % 3], "ranks": [1, 2, 2, 3][: 2 + i % 3]}
                lines.append(json.dumps({"prompt": row["prompt"], **order}) + "\n")
            (folder / f"{split}.jsonl").write_text("".join(lines))
        return folder

    return rank


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 400 words with a pad token of its own, trained on the built-in corpus."""
    from remax.demo.corpus import make_rows
    from remax.demo.tiny_models import train_tokenizer

    train, _ = make_rows(seed=0, train_rows=200, test_rows=1)
    return train_tokenizer((row["prompt"] + row["chosen"] for row in train), vocab_size=400)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer):
    """tiny_model("opt"): the folder of a random causal language model, one for each of `ARCHITECTURES`."""
    from remax.demo.tiny_models import save_tiny_model

    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(architecture: str) -> Path:
        return save_tiny_model(folder / architecture, architecture, tokenizer)

    return make


@pytest.fixture(scope="session")
def tiny_reward_model(tmp_path_factory, tiny_model):
    """tiny_reward_model("opt"): the same with a scalar head, as AutoModelForSequenceClassification saves it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("reward_models")

    @functools.cache
    def make(architecture: str) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = AutoModelForSequenceClassification.from_pretrained(tiny_model(architecture), num_labels=1)
        model.save_pretrained(folder / architecture)
        AutoTokenizer.from_pretrained(tiny_model(architecture)).save_pretrained(folder / architecture)
        return folder / architecture

    return make


@pytest.fixture(scope="session")
def run_command():
    """run_command([program, ...], cwd=..., **environment) -> CompletedProcess; `.stdout` holds stderr too."""

    def run(command, cwd=ROOT, timeout=600, **environment) -> subprocess.CompletedProcess:
        # The programs of this Python's environment first.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env=zygote.inherited() | {"PATH": path} | {k: str(v) for k, v in environment.items()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:  # after a time-out the launcher's ranks would live on, and hold the pipe
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    return run
