"""The papers' figures beside this project's: where they come from, the time model's fit, and the document."""

import importlib
import json
import re
import runpy
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def papers(root):
    """The modules of benchmarks/papers, by name."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(root / "benchmarks")
    names = ("hours", "memory", "published", "reading", "tables")
    yield SimpleNamespace(**{name: importlib.import_module(f"papers.{name}") for name in names})
    patch.undo()


@pytest.fixture(scope="module")
def fitted(papers):
    return papers.hours.fit()


# ------------------------------------------------------------------------------------------------------------ the model


def test_the_planners_rates_are_the_fit(papers, fitted):
    from remax.planning.durations import Rates

    told = [float(f"{getattr(fitted, name):.2g}") for name in papers.hours.FITTED]
    assert told == [getattr(Rates(), name) for name in papers.hours.FITTED]


def test_published_hours_are_predicted(papers, fitted):
    # Those of the fit, each where it is left out of it too, and those that it has not seen.
    hours = papers.hours
    for run in hours.FIT_ON:
        assert all(abs(error) < 0.06 for error in hours.errors(run, fitted).values()), run
        without = hours.fit([other for other in hours.FIT_ON if other is not run])
        assert all(abs(error) < 0.07 for error in hours.errors(run, without).values()), run
    llama = [run for run in papers.published.RUNS if run.source == "ReMax v1" and run.hours]
    off = {(run.algo, run.gpus) for run in llama if abs(hours.errors(run, fitted)["hours"]) > 0.15}
    assert off == {("ppo", 4), ("ppo", 1), ("remax", 1)}

    # which is where the two versions of the paper differ by more than 15 % for each prompt
    def of_prompt(run) -> float:
        return run.hours / run.prompts

    same = {(run.algo, run.gpus, run.offload): run for run in hours.FIT_ON}
    differ = [run for run in llama if abs(of_prompt(run) / of_prompt(same[run.algo, run.gpus, run.offload]) - 1) > 0.15]
    assert {(run.algo, run.gpus) for run in differ} == off
    chat = next(run for run in papers.published.RUNS if run.model == "OPT-6.7B" and run.gpu == "a100")
    assert abs(hours.errors(chat, fitted)["hours"]) < 0.15


def test_what_a_run_does_by_hand(papers):
    hours, runs = papers.hours, papers.published.RUNS
    remax = next(run for run in runs if run.source == "ReMax ICML" and run.gpus == 1 and run.algo == "remax")
    done = hours.theirs(remax)
    assert len(done.decodes) == 2 and hours.rows_of(remax) == 38
    # weights in 16 bits; 32 layers of 4096 keys and values of 38 prompts, and of half of the answers
    assert done.decodes[0].read == pytest.approx(2 * 6.738e9 + 38 * 384 * 2 * 32 * 4096 * 2, rel=1e-3)
    # reference once, reward model twice; the actor's gradients and weights in 16 bits
    assert done.score.fetched == pytest.approx(3 * 2 * 6.7e9, rel=0.01)
    assert done.update.fetched == pytest.approx(4 * 6.738e9, rel=1e-3) and done.adam == pytest.approx(6.738e9, rel=1e-3)
    # four times 2 operations for each weight and token, and about 6 % of it for attention
    assert done.update.operations == pytest.approx(4 * 38 * 512 * 2 * 6.6e9 * 1.02, rel=0.02)


def test_published_models_in_gib(papers):
    found = papers.memory.model_states()
    # 18 and 2 bytes for each of 6.738 billion parameters of 2^30
    assert found["trained"] == pytest.approx(18 * 6.738e9 / 2**30, abs=0.05)
    assert round(found["frozen"], 2) == papers.published.MODELS["frozen"] == 12.55
    assert found["remax"] / found["ppo"] == pytest.approx(0.55, abs=0.01)


# --------------------------------------------------------------------------------------------------------- the document


def test_what_is_read_of_a_document(papers, tmp_path):
    reading = papers.reading
    (tmp_path / "a.md").write_text(
        "# A\n\n    taskset -c 0 python x.py --a\n    text\n    make demo\n\n| way | step s |\n|---|--:|\n"
        "| ReMax | 1,234.5 [1, 2] |\n| PPO | -2 |\n\n| way | other |\n|---|---|\n| PPO | `x` |\n"
    )
    document = str(tmp_path / "a.md")
    assert reading.number(reading.cell(document, "step s", way="ReMax")) == 1234.5
    assert reading.cell(document, "other", way="PPO") == "`x`" and reading.number("-2 x") == -2
    assert reading.command(document) == "taskset -c 0 python x.py --a"
    assert reading.command(document, "demo") == "make demo"
    with pytest.raises(LookupError, match="no table has a column 'step s' and a row with {'way': 'GRPO'}"):
        reading.cell(document, "step s", way="GRPO")
    with pytest.raises(LookupError, match="holds no command with 'y.py'"):
        reading.command(document, "y.py")


def test_methods_stand_beside_the_papers_as_soon_as_they_are_run(papers, tmp_path, monkeypatch):
    tables = papers.tables
    (tmp_path / "e.md").write_text(
        "| estimator | true reward |\n|---|---|\n| remax | 2.5 |\n| dpo | 2.1 |\n\n"
        "| method | win rate, equal tokens | length-controlled, equal tokens |\n|---|---|---|\n| dpo | 80 | 70 |\n"
    )
    monkeypatch.setattr(tables, "ESTIMATORS", str(tmp_path / "e.md"))
    assert tables.on_the_corpus("remax") == "true reward 2.5" and tables.on_the_corpus("ppo") == ""
    told = "true reward 2.1, better than SFT's answer in 80 %, at equal length in 70 %"
    assert tables.on_the_corpus("dpo") == told
    of = {figure.what.split(":")[0]: figure.measured for figure in tables.rloo().figures}
    assert of["DPO"].startswith(told) and of["PPO"] == ""


def exists(root, command: str) -> bool:
    """Whether what a command runs is there."""
    words = command.removeprefix("taskset -c 0 ").split()
    if words[0] == "make":
        return bool(re.search(rf"^{words[1]}:", (root / "Makefile").read_text(), flags=re.MULTILINE))
    assert words[0] == "python"
    if words[1] == "-m":
        return (root / (words[2].replace(".", "/") + ".py")).is_file()
    return (root / words[1]).is_file()


@pytest.fixture(scope="module")
def record(root):
    return json.loads((root / "docs/results/paper.json").read_text(encoding="utf-8"))


def test_every_row_has_its_source_and_command(papers, root, record):
    assert list(record) == list(papers.tables.TABLES)
    rows = [row for section in record.values() for row in section["figures"]]
    for row in rows:
        assert row["source"] in papers.published.SOURCES, row["what"]
        assert bool(row["command"]) >= bool(row["measured"] or row["predicted"]), row["what"]
        assert not row["command"] or exists(root, row["command"]), row["what"]
        assert row["published"] or row["measured"], row["what"]
        assert row["measured"] or row["predicted"] or row["caveat"], row["what"]
    document = (root / "docs/results/paper.md").read_text(encoding="utf-8")
    assert all(f"- **{name}**: {source}." in document for name, source in papers.published.SOURCES.items())
    assert all(row["what"] in document for row in rows)


@pytest.mark.parametrize("name", ["judged", "hydra", "rloo", "offline"])
def test_the_tables_are_those_of_their_inputs(papers, root, record, name):
    section = papers.tables.TABLES[name]()
    again = "run `python benchmarks/paper.py`: an input of docs/results/paper.md has changed"
    assert section.record() == record[name], again
    document = (root / "docs/results/paper.md").read_text(encoding="utf-8")
    for lines in section.blocks(name).values():
        assert "\n".join(lines).rstrip() in document, again


def test_the_recorded_hours_are_as_the_document_says(papers, root, record):
    rows = record["time"]["hours"]
    assert len(rows) == sum(run.hours is not None for run in papers.published.RUNS)
    errors = {source: [int(row["error"].split()[0]) for row in rows if row["source"] == source] for source in SAID}
    assert {source: max(map(abs, of)) for source, of in errors.items()} == SAID
    assert max(errors["DeepSpeed-Chat"]) == 0
    assert sum(abs(error) <= 15 for source in ("ReMax v1", "DeepSpeed-Chat") for error in errors[source]) == 7
    told = (root / "docs/hardware.md").read_text(encoding="utf-8")
    assert "five published runs and tested on ten others" in told and "seven of these come out within 15 %" in told


SAID = {"ReMax v1": 37, "ReMax ICML": 3, "DeepSpeed-Chat": 12}  # percent


def test_intervals_and_ratios_by_hand(papers):
    (ppo,) = [figure for figure in papers.tables.judged().figures if "over PPO" in figure.what]
    # Wilson: (.636 + z^2/2n -+ z sqrt(.636 * .364 / n + z^2/4n^2)) / (1 + z^2/n), n = 805, z = 1.96
    assert ppo.published == "63.6 % [60.2, 66.9]" and "preferring the longer answer gives 81.5 %" in ppo.caveat
    (joint,) = [figure for figure in papers.tables.hydra().figures if figure.what.startswith("J-Hydra-PPO: memory")]
    assert "1.00 and 0.27 of LoRA-PPO's" in joint.published  # 67.9 / 68.0, 5.01 / 18.75


def test_a_part_is_made_anew_and_the_prose_stays(root, tmp_path, monkeypatch, papers):
    document = tmp_path / "paper.md"
    document.write_text("# T\n<!-- begin rloo -->\nold\n<!-- end rloo -->\nProse.\n")
    (tmp_path / "paper.json").write_text('{"hydra": {"figures": []}}')
    monkeypatch.setattr("sys.argv", ["paper.py", "rloo", "--output", str(document)])
    runpy.run_path(str(root / "benchmarks/paper.py"), run_name="__main__")
    text = document.read_text()
    assert "old" not in text and "<!-- end rloo -->\nProse." in text and "| RAFT, best of 4" in text
    assert list(json.loads((tmp_path / "paper.json").read_text())) == ["hydra", "rloo"]
    monkeypatch.setattr("sys.argv", ["paper.py", "other"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(root / "benchmarks/paper.py"), run_name="__main__")
