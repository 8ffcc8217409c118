import pytest

from utils.data.names import DataName, parse_name, split_weight
from utils.run import UserError


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("Dahoas/rm-static", ("Dahoas/rm-static", None, None, None)),
        ("Dahoas/rm-static:0.3", ("Dahoas/rm-static", None, None, 0.3)),
        ("a.jsonl:2", ("a.jsonl", None, None, 2.0)),
        ("me/set#train_sft", ("me/set", None, "train_sft", None)),
        ("me/set#main/train:1e-1", ("me/set", "main", "train", 0.1)),
        ("me/set#main/", ("me/set", "main", None, None)),
        ("me/set:x", ("me/set:x", None, None, None)),  # no number: part of the name
    ],
)
def test_entries(entry, expected):
    assert parse_name(entry) == DataName(*expected)


def test_what_is_on_the_disk_is_a_name_as_it_stands(tmp_path):
    for name in ("a#b", "a:0.5", "a#b:0.5"):
        (tmp_path / name).write_text("")
        assert parse_name(str(tmp_path / name)) == DataName(str(tmp_path / name))
    assert parse_name(str(tmp_path / "a:0.5") + ":0.2").weight == 0.2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("a:0", "--data_path a:0: the weight after the colon must be a number above 0"),
        ("a:-1", "--data_path a:-1: the weight after the colon must be a number above 0"),
        ("a:1.2.3", "must be a number above 0"),
        ("a#", "--data_path a#: expected a split, or configuration/split, after the #"),
        ("", "--data_path '': expected the name"),
        ("#train", "expected the name"),
    ],
)
def test_refused(entry, message):
    with pytest.raises(UserError, match=message):
        parse_name(entry)


def test_a_weight_may_be_negative_where_it_is_a_penalty():
    assert split_weight("me/reward:-0.5", "--m", negative=True) == ("me/reward", -0.5)
    assert split_weight("rules.py:length:-1e-2", "--m", negative=True) == ("rules.py:length", -0.01)
    assert split_weight("rules:length", "--m", negative=True) == ("rules:length", None)
    for entry in ("me/reward:0", "me/reward:-0.0", "me/reward:1e999"):
        with pytest.raises(UserError, match=f"--m {entry}: the weight after the colon must be a number other than 0"):
            split_weight(entry, "--m", negative=True)
