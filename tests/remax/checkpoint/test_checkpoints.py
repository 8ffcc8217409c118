"""Checkpoints: complete or not there, checked before they are trusted, and read back under any cut.

That whole runs go on bit for bit is shown in tests/test_references.py; here it is what lies between: other numbers of
ranks and other ZeRO stages, and everything that may happen to the files.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from remax.checkpoint import checkpoints as module
from remax.checkpoint.checkpoints import Checkpoints, Saving, newest, open_checkpoint
from remax.checkpoint.state import RunState
from utils.run import UserError

# ------------------------------------------------------------------------------------------------ ranks and ZeRO stages

OFFLOAD = {"zero_stage": 3, "offload": True, "offload_parameters": True}
SOURCES = {  # name: ranks, how the model is spread
    "two ranks, ZeRO 2": (2, {"zero_stage": 2}),
    "two ranks, ZeRO 3": (2, {"zero_stage": 3}),
    "two ranks, ZeRO 0, LoRA": (2, {"zero_stage": 0, "lora": "_proj"}),
    "one rank, ZeRO 0": (1, {"zero_stage": 0}),
    "one rank, ZeRO 1": (1, {"zero_stage": 1}),
    "one rank, ZeRO 1, bf16": (1, {"zero_stage": 1, "dtype": "bf16"}),
    "one rank, ZeRO 2, fp16": (1, {"zero_stage": 2, "dtype": "fp16"}),
    "two ranks, ZeRO 3, bf16": (2, {"zero_stage": 3, "dtype": "bf16"}),
}
TARGETS = {  # from which source, ranks, how the model is spread then
    "2 -> 1": ("two ranks, ZeRO 2", 1, {"zero_stage": 2}),
    "2 -> 1, ZeRO 2 -> 3": ("two ranks, ZeRO 2", 1, {"zero_stage": 3}),
    "2 -> 1, ZeRO 3 -> 0": ("two ranks, ZeRO 3", 1, {"zero_stage": 0}),
    "2 -> 1, LoRA, ZeRO 0 -> 3": ("two ranks, ZeRO 0, LoRA", 1, {"zero_stage": 3, "lora": "_proj"}),
    "1 -> 2, ZeRO 0 -> 3": ("one rank, ZeRO 0", 2, {"zero_stage": 3}),
    "1 -> 2, ZeRO 1 -> 2": ("one rank, ZeRO 1", 2, {"zero_stage": 2}),
    "ZeRO 2 -> 3": ("two ranks, ZeRO 2", 2, {"zero_stage": 3}),
    "ZeRO 3 -> 0": ("two ranks, ZeRO 3", 2, {"zero_stage": 0}),
    "fp16, ZeRO 2": ("one rank, ZeRO 2, fp16", 1, {"zero_stage": 2, "dtype": "fp16"}),
    "bf16, ZeRO 1": ("one rank, ZeRO 1, bf16", 1, {"zero_stage": 1, "dtype": "bf16"}),
    "bf16, ZeRO 3": ("two ranks, ZeRO 3, bf16", 2, {"zero_stage": 3, "dtype": "bf16"}),
    "the same ranks and stage": ("two ranks, ZeRO 3", 2, {"zero_stage": 3}),
}


@pytest.fixture(scope="module")
def runs(run_ranks, make_policy, save_rows, tmp_path_factory, can_compile):
    """{name: (results, folder)} of every source and target, in as few starts as there are: 1, 2, 1 ranks."""
    places = tmp_path_factory.mktemp("checkpoints")
    done: dict[str, tuple[dict, Path]] = {}

    def job(name: str, source: str, spread: dict) -> dict:
        common = {"check": "go_on", "model": str(make_policy("llama")), "rows": save_rows(0, 8, 300), "steps": [2, 2]}
        (places / source).mkdir(exist_ok=True)
        return common | {"name": name, "place": str(places / source), "micro_batch": 2} | spread

    def run(ranks: int, jobs: list[dict]) -> None:
        results, folder = run_ranks(jobs, ranks)
        done.update({job["name"]: (results[job["name"]], folder) for job in jobs})

    targets = dict(TARGETS)
    if can_compile:
        targets["2 -> 1, offload"] = ("two ranks, ZeRO 2", 1, OFFLOAD)
    of = {ranks: [job(name, name, spread) for name, (r, spread) in SOURCES.items() if r == ranks] for ranks in (1, 2)}
    to = {
        ranks: [job(n, source, spread) for n, (source, r, spread) in targets.items() if r == ranks] for ranks in (1, 2)
    }
    run(1, of[1])
    run(2, of[2] + to[2])
    run(1, to[1])
    return done


@pytest.mark.ranks
@pytest.mark.parametrize("name", TARGETS)
def test_a_state_is_the_same_under_another_cut(runs, name):
    check_equal(runs, name, TARGETS[name][0])


@pytest.mark.ranks
@pytest.mark.compiled
def test_a_state_is_the_same_with_offload(runs):
    check_equal(runs, "2 -> 1, offload", "two ranks, ZeRO 2")


def check_equal(runs, name: str, source: str) -> None:
    (there, of), (here, to) = runs[source], runs[name]
    assert here["step"] == 2
    for part in ("", "-average"):
        before, now = torch.load(of / f"{source}{part}.pt"), torch.load(to / f"{name}{part}.pt")
        assert before.keys() == now.keys() and all(torch.equal(before[k], now[k]) for k in before)
    # The next steps: schedule and moments are those of the third and the fourth step.
    assert here["learning_rates"] == there["learning_rates"] and here["learning_rates"][0] != 0
    assert here["scales"] == there["scales"]
    assert here["losses"] == pytest.approx(there["losses"], abs=1e-6)
    assert here["grad_norms"] == pytest.approx(there["grad_norms"], rel=1e-4)
    before, now = torch.load(of / f"{source}-end.pt"), torch.load(to / f"{name}-end.pt")
    torch.testing.assert_close(now, before, rtol=0, atol=1e-6)


@pytest.mark.ranks
def test_with_the_same_cut_nothing_differs_at_all(runs):
    (there, of), (here, to) = (runs[name] for name in ("two ranks, ZeRO 3", "the same ranks and stage"))
    assert [here[key] for key in ("losses", "grad_norms", "noise")] == [
        there[key] for key in ("losses", "grad_norms", "noise")
    ]
    ends = torch.load(of / "two ranks, ZeRO 3-end.pt"), torch.load(to / "the same ranks and stage-end.pt")
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert here["noise"][0] != here["noise"][1]


# ------------------------------------------------------------------------------------------------------------ the files


class Count:
    """Something that moves; its state is itself, as a careless one's may be."""

    def __init__(self, value: float = 0.0):
        self.state = {"value": value}

    @property
    def value(self) -> float:
        return self.state["value"]

    @value.setter
    def value(self, value: float) -> None:
        self.state["value"] = value

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.state = dict(state)


class Numbers:
    """Stands for the moving average: a vector of 5."""

    def __init__(self) -> None:
        self.numbers = torch.zeros(5)

    def tensors(self) -> dict:
        return {("w", 0): self.numbers}

    def restore(self, read) -> None:
        self.numbers.copy_(read("w", 0, 5))


ALL = Saving(keep=0)


def begin(output: Path, saving: Saving = ALL, found=None, best: Path | None = None):
    """-> checkpoints of a run of one rank, and what it keeps."""
    output.mkdir(exist_ok=True)
    checkpoints, state = (
        Checkpoints(output, saving, {}, found=found, best=best),
        RunState({}, {"n": Count()}, Numbers()),
    )
    checkpoints.begin(state)
    return checkpoints, state


def save(checkpoints: Checkpoints, state: RunState, step: int) -> Path:
    state.values["n"].value, state.average.numbers[:] = step / 8, torch.arange(5.0) * step
    checkpoints.save(step)
    checkpoints.finish()
    return checkpoints.folder / f"step_{step:06d}"


@pytest.mark.parametrize("beside", [True, False])
def test_what_was_saved_comes_back(tmp_path, beside):
    checkpoints, state = begin(tmp_path, Saving(keep=0, beside=beside))
    folder = save(checkpoints, state, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "rank_0000.safetensors"]
    assert not list(tmp_path.rglob("*.partial"))
    torch.rand(2)
    found = newest(tmp_path)
    assert found.folder == folder and found.step == 3
    _, again = begin(tmp_path, found=found)
    assert again.values["n"].value == 3 / 8 and again.average.numbers.tolist() == [0, 3, 6, 9, 12]


def test_what_is_written_is_what_was_there_when_it_was_asked_for(tmp_path, monkeypatch):
    # The training goes on while a thread writes; it is held up until the numbers have changed.
    checkpoints, state = begin(tmp_path)
    write, go = Checkpoints._write, module.threading.Event()

    def late(self, *job) -> None:
        go.wait(10)
        write(self, *job)

    monkeypatch.setattr(Checkpoints, "_write", late)
    state.average.numbers[:] = 1.0
    checkpoints.save(1)
    state.average.numbers[:], state.values["n"].value = 7.0, 7.0
    torch.manual_seed(5)
    go.set()
    checkpoints.finish()
    _, again = begin(tmp_path, found=newest(tmp_path))
    assert again.average.numbers.tolist() == [1.0] * 5 and again.values["n"].value == 0.0


def test_only_the_newest_are_kept(tmp_path):
    checkpoints, state = begin(tmp_path, Saving(keep=2))
    for step in (1, 2, 3, 1_000_000):
        save(checkpoints, state, step)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step_000003", "step_1000000"]
    assert newest(tmp_path).step == 1_000_000


def test_when_one_is_due(tmp_path, monkeypatch):
    checkpoints, _ = begin(tmp_path, Saving(steps=4, minutes=2))
    now = module.time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now + 119)
    assert [checkpoints.due(step) for step in range(1, 9)] == [False, False, False, True] * 2
    monkeypatch.setattr(module.time, "monotonic", lambda: now + 121)
    assert checkpoints.due(1)
    never, _ = begin(tmp_path, Saving(steps=0, minutes=0))
    assert not never.due(1)


FAULTS = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "is not complete .*manifest.json"),
    "a torn manifest": (lambda folder: cut(folder / "manifest.json"), "is not complete .manifest.json is torn"),
    "a torn file": (
        lambda folder: cut(folder / "rank_0000.safetensors"),
        r"rank_0000.safetensors has \d+ of \d+ bytes",
    ),
    "a missing rank": (lambda folder: (folder / "rank_0000.safetensors").unlink(), "No such file.*rank_0000"),
    "a flipped bit": (
        lambda folder: flip(folder / "rank_0000.safetensors"),
        "is damaged .rank_0000.safetensors is not",
    ),
    "a pickle": (lambda folder: plant(folder / "rank_0000.safetensors"), "rank_0000.safetensors"),
    "a link": (lambda folder: link(folder / "rank_0000.safetensors"), "rank_0000.safetensors is a link"),
    "a link in place of the whole": (lambda folder: link(folder), "step_000002 is a link"),
    "a link to a best model": (lambda folder: plant_best(folder), "model.safetensors is a link"),
    "another format": (lambda folder: renumber(folder / "manifest.json"), "is of format 99, and this version reads 1"),
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("was_run"),)


def plant(file: Path) -> None:
    """A pickle of the right size: with the checksum in the manifest made fit, only the reader is left to refuse it."""
    file.write_bytes(pickle.dumps(Payload()))


def link(file: Path) -> None:
    file.rename(file.parent.parent / "elsewhere")
    file.symlink_to(file.parent.parent / "elsewhere")


def plant_best(folder: Path) -> None:
    (folder / "best").mkdir()
    (folder / "best" / "model.safetensors").symlink_to("/etc/passwd")


def renumber(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_torn_checkpoint_is_named_and_passed_over(tmp_path, fault, capsys):
    checkpoints, state = begin(tmp_path)
    save(checkpoints, state, 1)
    folder = save(checkpoints, state, 2)
    spoil, words = FAULTS[fault]
    spoil(folder)
    with pytest.raises(UserError, match=words):
        open_checkpoint(folder)
    assert newest(tmp_path).step == 1
    assert f"checkpoint {folder}: " in capsys.readouterr().out


def test_all_ranks_open_what_rank_0_sees(tmp_path, monkeypatch):
    # A shared file system may show this rank an older list of the folder.
    checkpoints, state = begin(tmp_path)
    for step in (1, 2):
        save(checkpoints, state, step)
    monkeypatch.setattr(module, "all_of", lambda folder: [(1, folder / "step_000001")])
    monkeypatch.setattr(module, "gather_objects", lambda here: [["step_000002"] if isinstance(here, list) else here])
    assert newest(tmp_path).step == 2


def test_what_was_damaged_when_the_training_went_back_is_written_again(tmp_path):
    checkpoints, state = begin(tmp_path)
    save(checkpoints, state, 1)
    flip(save(checkpoints, state, 2) / "rank_0000.safetensors")
    assert checkpoints.go_back() and checkpoints.found.step == 1
    save(checkpoints, state, 2)
    assert newest(tmp_path).step == 2


def test_a_folder_that_another_rank_does_not_see_is_not_left(tmp_path, monkeypatch, capsys):
    checkpoints, state = begin(tmp_path)
    monkeypatch.setattr(module, "gather_objects", lambda here: [here, False])
    save(checkpoints, state, 1)
    assert "rank 1 does not see" in capsys.readouterr().out and not list(checkpoints.folder.iterdir())


def test_a_pickle_is_not_run_even_with_the_right_checksum(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints, state = begin(tmp_path)
    folder = save(checkpoints, state, 1)
    plant(folder / "rank_0000.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["ranks"][0]["file"] = vars(module.checksum(folder / "rank_0000.safetensors"))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="rank_0000.safetensors: is no file of tensors in the safetensors format"):
        begin(tmp_path, found=open_checkpoint(folder))
    assert not (tmp_path / "was_run").exists()
    pickle.loads(pickle.dumps(Payload()))
    assert (tmp_path / "was_run").exists()  # the payload is one


def test_pickles_beside_the_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints, state = begin(tmp_path / "run")
    folder = save(checkpoints, state, 1)
    for name in ("optimizer.pt", "rank_0001.safetensors", "random.bin", "mp_rank_00_model_states.pt"):
        plant(folder / name)
    _, again = begin(tmp_path / "run", found=newest(tmp_path / "run"))
    assert again.values["n"].value == 1 / 8 and not (tmp_path / "was_run").exists()


def test_the_umask_says_who_may_read_it(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoints, state = begin(tmp_path / "run")
        folder = save(checkpoints, state, 1)
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (folder, *folder.iterdir())}
    assert modes == {"step_000001": "0o750", "manifest.json": "0o640", "rank_0000.safetensors": "0o640"}


def test_links_are_not_followed_out_of_the_run(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link to another place"):
        begin(tmp_path / "run")


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device", "some file")


@pytest.mark.parametrize("beside", [True, False])
def test_a_full_disk_costs_one_checkpoint_and_nothing_else(tmp_path, monkeypatch, capsys, beside):
    checkpoints, state = begin(tmp_path, Saving(keep=1, beside=beside))
    first = save(checkpoints, state, 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", no_room)
        save(checkpoints, state, 2)
    words = (
        f"no checkpoint of step 2: No space left on device: some file; the last one is {first}; the training goes on"
    )
    assert f"warning: {words}" in capsys.readouterr().out
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_000001"]
    assert checkpoints.kept(1) and not checkpoints.kept(2)
    assert newest(tmp_path).step == 1
    save(checkpoints, state, 3)
    assert newest(tmp_path).step == 3


def test_a_best_model_that_cannot_be_kept_is_named_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    # Where the file system knows no links, it is copied, and the disk may be full.
    (tmp_path / "actor").mkdir()
    (tmp_path / "actor" / "model.safetensors").touch()
    checkpoints, state = begin(tmp_path, best=tmp_path / "actor")

    def full(source: str, target: str) -> None:
        raise OSError(28, "No space left on device", target)

    monkeypatch.setattr(module, "_link", full)
    save(checkpoints, state, 1)
    assert "no checkpoint of step 1: " in (said := capsys.readouterr().out) and "No space left on device" in said
    assert not list(checkpoints.folder.iterdir())


def test_the_checkpoint_that_a_run_goes_on_from_is_not_written_again(tmp_path, monkeypatch):
    # A kill in between would leave neither; --resume has the whole path, and --output_dir may be relative.
    monkeypatch.chdir(tmp_path)
    checkpoints, state = begin(Path("run"))
    file = save(checkpoints, state, 1) / "manifest.json"
    before = file.stat().st_ino
    again, state = begin(Path("run"), found=open_checkpoint(file.parent.resolve()))
    save(again, state, 1)
    assert file.stat().st_ino == before and again.kept(1)


def test_room_is_looked_for_first(tmp_path, monkeypatch, capsys):
    checkpoints, state = begin(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=19))  # 5 numbers of 4 bytes
    save(checkpoints, state, 1)
    assert "warning: no checkpoint of step 1: 0.00 GiB are free in" in capsys.readouterr().out
    assert newest(tmp_path) is None


def test_a_folder_that_has_gone_is_named(tmp_path, capsys):
    checkpoints, state = begin(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    save(checkpoints, state, 1)
    assert f"warning: no checkpoint of step 1: {tmp_path}/run has gone; there is none yet" in capsys.readouterr().out


def test_what_a_killed_run_has_left_is_removed(tmp_path):
    checkpoints, state = begin(tmp_path)
    save(checkpoints, state, 1)
    torn = checkpoints.folder / "step_000002.partial"
    torn.mkdir()
    (torn / "rank_0000.safetensors").write_bytes(b"half")
    found = newest(tmp_path)
    begin(tmp_path, found=found)
    assert found.step == 1 and not torn.exists()


def test_a_course_that_is_left_is_forgotten(tmp_path, capsys):
    # Otherwise the next start would go on from it, and the new course's checkpoints would count as the older ones.
    checkpoints, state = begin(tmp_path, Saving(keep=0))
    for step in (2, 4, 6):
        save(checkpoints, state, step)
    again, state = begin(tmp_path, Saving(keep=2), found=open_checkpoint(checkpoints.folder / "step_000002"))
    assert "step_000006: removed, as the run goes on from step 2" in capsys.readouterr().out
    save(again, state, 3)
    assert newest(tmp_path).step == 3 and [step for step, _ in module.all_of(again.folder)] == [2, 3]


def test_the_best_model_goes_back_with_its_state(tmp_path):
    # A later best model than that of the checkpoint may be one that this course will never see.
    best = tmp_path / "actor"
    best.mkdir()

    def export(step: int) -> None:
        for name in ("model.safetensors", "evaluation.json"):
            (best / "new").write_text(f"{name} of {step}")
            (best / "new").replace(best / name)

    checkpoints, state = begin(tmp_path, best=best)
    export(1)
    save(checkpoints, state, 2)
    export(3)
    (best / "model-00002-of-00002.safetensors").touch()
    begin(tmp_path, found=newest(tmp_path), best=best)
    assert (best / "model.safetensors").read_text() == "model.safetensors of 1"
    assert sorted(path.name for path in best.iterdir()) == ["evaluation.json", "model.safetensors"]
    (best / "new").write_text("half an export of 3, which a kill has kept from its note")
    (best / "new").replace(best / "model.safetensors")
    begin(tmp_path, found=newest(tmp_path), best=best)
    assert (best / "model.safetensors").read_text() == "model.safetensors of 1"
    export(5)  # and the checkpoint keeps its own
    assert (checkpoints.folder / "step_000002" / "best" / "model.safetensors").read_text() == "model.safetensors of 1"


def test_another_model_is_refused(tmp_path):
    checkpoints, state = begin(tmp_path)
    save(checkpoints, state, 1)
    larger = RunState({}, {"n": Count()}, Numbers())
    larger.average.restore = lambda read: read("w", 0, 6)
    with pytest.raises(UserError, match=r"holds 5 of the 6 numbers of w \(average\): it is of another model"):
        Checkpoints(tmp_path, Saving(), {}, found=newest(tmp_path)).begin(larger)
    stranger = RunState({}, {"somebody": Count()})
    with pytest.raises(UserError, match="knows nothing of 'somebody'"):
        Checkpoints(tmp_path, Saving(), {}, found=newest(tmp_path)).begin(stranger)


def test_a_scarce_memory_is_not_used_for_copies(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "free_memory", lambda: 39)  # a copy is 20 bytes
    checkpoints, state = begin(tmp_path)
    assert "the training waits for each" in capsys.readouterr().out
    save(checkpoints, state, 1)
    assert not checkpoints.snapshot.buffers and newest(tmp_path).step == 1
