"""Reading ahead gives what reading when asked gives: batches, errors and positions."""

import threading
import time
from contextlib import closing

import pytest
from torch.utils.data import DataLoader

from utils.data.ahead import Ahead
from utils.data.loaders import EpochSampler
from utils.run import UserError


def loader(read: list[int], faulty: int = -1) -> DataLoader:
    """12 rows in batches of two, noted when they are read; one of them may be faulty."""

    def collate(rows: list[int]) -> list[int]:
        if faulty in rows:
            raise UserError(f"rows.jsonl, line {faulty}: no text")
        read.extend(rows)
        return rows

    return DataLoader(range(12), 2, sampler=EpochSampler(12, 2, seed=1), collate_fn=collate)


def until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def readers() -> int:
    return sum(thread.name == "reading ahead" for thread in threading.enumerate())


def test_batches_and_positions_are_those_of_reading_when_asked():
    plain, read = loader([]), []
    expected = [(batch, plain.sampler.state_dict()) for batch in plain]
    ahead = Ahead(loader(read), 3)
    assert ahead.state_dict() == {"epoch": 0, "position": 0}
    with closing(iter(ahead)) as batches:
        first = next(batches)
        until(lambda: len(read) == 2 * (1 + 3 + 1))  # one is used, three lie ready, one waits for room
        found = [(first, ahead.state_dict()), *((batch, ahead.state_dict()) for batch in batches)]
    assert found == expected and ahead.state_dict()["position"] == 12 and not readers()


def test_what_was_read_and_not_used_comes_again_after_a_stop():
    plain, read = list(loader([])), []
    ahead = Ahead(loader(read), 2)
    with closing(iter(ahead)) as batches:
        used = [next(batches), next(batches)]
        until(lambda: len(read) > 4)
    assert not readers()  # it did not wait for room for ever
    stopped = ahead.state_dict()
    assert stopped["position"] == 4
    ahead.load_state_dict({"epoch": 0, "position": 2})  # that of before, where a run goes back
    assert ahead.state_dict()["position"] == 2 and list(ahead) == plain[1:]
    ahead.load_state_dict(stopped)
    assert ahead.state_dict() == stopped
    assert [*used, *ahead] == plain
    resumed = Ahead(loader([]), 2)
    resumed.load_state_dict(stopped)
    assert [*used, *resumed] == plain


def test_an_error_comes_where_its_batch_would():
    plain = list(loader([]))
    got: list[list[int]] = []
    with pytest.raises(UserError, match=rf"^rows.jsonl, line {plain[3][1]}: no text$"):
        for batch in Ahead(loader([], faulty=plain[3][1]), 9):
            got.append(batch)
    assert got == plain[:3] and not readers()
