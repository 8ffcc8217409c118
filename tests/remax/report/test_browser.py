"""The page in a real browser, where there is one: it draws, filters, and is silent; wide and narrow, light and dark."""

from __future__ import annotations

import json

import pytest

from remax.report.runs import read_runs
from remax.report.writing import write_report
from tests.browser import browser, program
from tests.remax.report.conftest import EVIL

if program() is None:
    pytest.skip("no chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def tab():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(make_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    reward = make_run(folder / "reward", "step2")
    one = make_run(folder / "remax", reward_model_name_or_path=[str(reward)])
    (one / "remarks.jsonl").write_text(json.dumps({"step": 7, "kind": "KL", "text": EVIL}) + "\n")
    other = make_run(folder / "rloo", algo="rloo")
    (other / "answers").mkdir()
    plain = {"prompt": "And?", "answer": " Not token by token.", "length": 5, "reward": 0.0}
    (other / "answers" / "step_000030.jsonl").write_text(json.dumps(plain) + "\n")
    sets = {"one": [one], "several": [one, other], "reward": [reward]}
    return {name: write_report(read_runs(runs), folder / f"{name}.html")[0] for name, runs in sets.items()}


def count(tab, selector: str) -> int:
    return tab.run(f"document.querySelectorAll({json.dumps(selector)}).length")


def choose(tab, label: str, value: str) -> None:
    """Sets the control whose label or name is `label`, as a hand would."""
    tab.run(
        f"""(() => {{
            const named = [...document.querySelectorAll("input, select")].find(box =>
                box.getAttribute("aria-label") === {json.dumps(label)} ||
                box.tagName === "SELECT" && box.parentElement.firstChild.textContent === {json.dumps(label)});
            named.value = {json.dumps(value)};
            for (const kind of ["input", "change"]) named.dispatchEvent(new Event(kind, {{bubbles: true}}));
        }})()"""
    )


def answers(tab) -> list[str]:
    return tab.run("[...document.querySelectorAll('#answers .answer')].map(node => node.innerText)")


def counted(tab) -> str:
    return tab.run("document.getElementById('count').textContent")


@pytest.mark.parametrize("name", ["one", "several", "reward"])
@pytest.mark.parametrize("width, theme", [(1280, "light"), (400, "dark")])
def test_it_draws_without_a_complaint(name, width, theme, tab, pages):
    tab.complaints.clear()
    tab.open(pages[name], width=width, theme=theme)
    assert tab.run("document.documentElement.dataset.ready") == "yes" and tab.complaints == []
    assert tab.run("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways for
    assert tab.run("document.documentElement.dataset.theme") == theme
    light = tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (theme == "light")
    assert count(tab, "[data-figure] .curve") >= 1 and count(tab, "#calibration circle") == 2
    small = "[...document.querySelectorAll('svg text')].filter(x => x.getBoundingClientRect().height < 8).length"
    assert tab.run(small) == 0  # readable
    assert tab.run("document.title") != "broken" and count(tab, "b") == 0


def test_curves_and_remarks(tab, pages):
    tab.open(pages["one"])
    figures = tab.run("[...document.querySelectorAll('[data-figure]')].map(node => node.dataset.figure)")
    assert figures[:3] == ["reward", "kl", "length"] and len(figures) == 6
    # training, greedy answers, held out; four evaluations with their standard errors; the remark of step 7
    assert count(tab, "[data-figure=reward] .curve:not(.raw)") == 3
    assert count(tab, "[data-figure=reward] circle") == 4 and count(tab, "[data-figure=reward] .mark") == 1
    assert EVIL in tab.run("document.querySelector('.mark title').textContent")
    assert EVIL.replace("\u2028", "") in tab.run("document.getElementById('remarks').textContent").replace("\u2028", "")
    line = "document.querySelectorAll('[data-figure=reward] .curve:not(.raw)')[1].getAttribute('d')"
    before = tab.run(line)
    choose(tab, "smoothing", "10")
    smoother = tab.run(line)
    choose(tab, "over", "minutes")
    assert len({before, smoother}) == 2
    labels = tab.run("[...document.querySelectorAll('[data-figure=reward] text')].map(x => x.textContent)")
    assert "0.5" in labels  # half a minute
    tab.run("document.querySelector('details').open = true")
    assert (
        tab.run("new Promise(done => setTimeout(() => done(document.querySelectorAll('[data-figure]').length), 50))")
        > 6
    )
    tab.run(
        "document.querySelector('[data-figure=reward] svg').dispatchEvent("
        "new PointerEvent('pointermove', {clientX: 300, clientY: 300}))"
    )
    assert "held out: " in tab.run("document.querySelector('.tip').innerText")


def test_answers_are_sorted_filtered_and_compared(tab, pages):
    tab.open(pages["one"])
    assert counted(tab) == "3 of 12 answers"  # those of the last evaluation, the highest reward first
    shown = answers(tab)
    assert "question 2?" in shown[0] and "reward 5" in shown[0] and "rules -1" in shown[0] and "KL 11" in shown[0]
    assert "changed since step 0 (reward 2)" in shown[0] and EVIL[:9] in shown[1]
    assert tab.run("document.querySelector('#answers ins').textContent") == "step30 "
    assert tab.run("document.querySelector('#answers del').textContent") == "step0 "
    choose(tab, "sort by", "length")
    tab.run("document.querySelector('[aria-label=order]').click()")
    assert "question 0?" in answers(tab)[0]
    choose(tab, "step", "")
    assert counted(tab) == "12 of 12 answers"
    choose(tab, "KL at most", "0.5")
    assert counted(tab) == "1 of 12 answers" and "step 0" in answers(tab)[0]  # 0, 1, 2 at step 0; 3 and more later
    choose(tab, "KL at most", "")
    choose(tab, "reward at least", "3")
    assert counted(tab) == "6 of 12 answers"  # step / 10 + i: 1 + 2; 2 + 1, 2 + 2; 3, 4, 5
    choose(tab, "reward at least", "")
    choose(tab, "search", "QUESTION 1")
    assert counted(tab) == "4 of 12 answers"
    choose(tab, "beside", "greedy")
    assert "greedy answer (reward 0.5)" in answers(tab)[0]
    tab.run("document.querySelector('#answers .answer button').click()")
    course = answers(tab)  # of one prompt, over the evaluations
    assert [f"step {step}reward" in text for step, text in zip((0, 10, 20, 30), course, strict=True)] == [True] * 4
    tab.run("[...document.querySelectorAll('button')].find(x => x.textContent === 'all answers again').click()")
    tab.run("document.querySelector('circle[data-index]').dispatchEvent(new MouseEvent('click'))")
    assert counted(tab) == "1 of 12 answers"


def test_tokens_are_coloured(tab, pages):
    tab.open(pages["one"])
    colours = "[...document.querySelectorAll('#answers .answer:last-of-type .token')].map(x => x.style.background)"
    told = "document.querySelector('#answers .answer:last-of-type .token').title"
    first = tab.run(colours)
    assert "KL 3, advantage -2.5" == tab.run(told) and "--more" in first[0] and first[0] != first[-1]
    choose(tab, "colour", "advantage")
    assert "--less" in tab.run(colours)[0]
    choose(tab, "colour", "")
    assert tab.run(colours) == []


def test_several_runs_lie_over_one_another(tab, pages):
    tab.open(pages["several"])
    assert count(tab, "[data-run]") == 2 and count(tab, "[data-figure=kl] .curve:not(.raw)") == 4
    tab.run("[...document.querySelectorAll('button')].find(x => x.textContent === 'rloo').click()")
    assert count(tab, "[data-figure=kl] .curve:not(.raw)") == 2
    assert counted(tab) == "6 of 25 answers"
    tab.run("document.querySelector('[type=checkbox]').click()")
    assert counted(tab) == "7 of 25 answers" and "Not token by token." in answers(tab)[-1]
    choose(tab, "run", "1")
    assert counted(tab) == "4 of 25 answers"
    assert "algo" in tab.run("document.querySelector('[aria-label=Settings] table').innerText")
