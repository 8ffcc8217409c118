"""The comparison of the estimators: its arithmetic by formula, and one run of each part on tiny models.

Of packing: the tables, on a tiny model too.
"""

import dataclasses
import json
import math
import os
import runpy
from types import SimpleNamespace

import pytest
import torch

from utils.distributed import shutdown


@pytest.fixture(scope="module")
def modules(root):
    """Where the names of the experiment and of its report are; they stand beside their program, in no package."""
    import importlib

    patch = pytest.MonkeyPatch()
    for folder in ("benchmarks", "benchmarks/estimators"):
        patch.syspath_prepend(root / folder)
    found: dict = {}
    for name in ("experiment", "training", "fixed_policy"):
        found |= vars(importlib.import_module(name))
    yield SimpleNamespace(**found), importlib.import_module("report")
    patch.undo()
    shutdown()  # the experiment joins a process group of one rank, which later tests are not in


@pytest.fixture(scope="module")
def setting(modules, corpus, tiny_model, tiny_reward_model, tmp_path_factory):
    experiment, _ = modules
    return experiment.Setting(
        data=str(corpus),
        actor=str(tiny_model("llama")),
        reward=str(tiny_reward_model("llama")),
        cache=str(tmp_path_factory.mktemp("cache")),
        answers_per_step=8,
        tokens=100,
        evaluations=2,
        max_answer=8,
    )


def test_every_estimator_pays_the_same_answers(modules):
    experiment, _ = modules
    for estimator in experiment.ESTIMATORS.values():
        algorithm = experiment.make_algorithm(estimator, kl=0.1)
        assert estimator.answers == algorithm.samples_per_prompt + algorithm.greedy
        assert estimator.samples == algorithm.samples_per_prompt and experiment.SAMPLES % estimator.samples == 0


@pytest.mark.parametrize("name", ["remax", "ppo", "calibrated_2"])
def test_a_run_spends_its_tokens(modules, setting, tmp_path, name):
    experiment, report = modules
    ppo = name == "ppo"
    run = experiment.Run(name, 0, 1e-3, 1e-3 if ppo else None, snapshots=not ppo)
    path = tmp_path / run.name / "run.json"
    experiment.train(path, run, setting)
    points = json.loads(path.read_text())["points"]
    assert [point["tokens"] >= share * 100 for point, share in zip(points, (0, 0.5, 1), strict=True)] == [True] * 3
    # a step generates 8 answers of 1 to 8 tokens, so the budget is passed by less than 64
    assert points[-1]["tokens"] < 164 and points[-1]["steps"] >= 2
    assert points[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert -3 <= points[-1]["true_reward"] <= 3
    assert {child.name for child in path.parent.glob("policy_*")} == (set() if ppo else {"policy_half", "policy_end"})
    # (0 + 100)/2 = 50 tokens are reached half-way between these two points
    line = [{"tokens": 0, "x": 1.0}, {"tokens": 100, "x": 3.0}]
    assert report.at(line, "tokens", 50, lambda point: point["x"]) == 2.0


@pytest.mark.parametrize("name", ["sft_chosen", "r_dpo"])
def test_a_run_from_pairs_generates_nothing(modules, setting, tmp_path, monkeypatch, name):
    experiment, report = modules
    seen: list = []
    step = experiment.optimizer_step
    monkeypatch.setitem(
        experiment.train_offline.__globals__,
        "optimizer_step",
        lambda task, batches: seen.append((task, *batches)) or step(task, batches),
    )
    path = tmp_path / "run.json"
    # tokens 200, of which 1000 are 5 or 6 steps: 1 or 1.2, so the last mark is reached after 1 or 2
    experiment.train_offline(path, experiment.Run(name, 0, 1e-3), dataclasses.replace(setting, tokens=200))
    record = json.loads(path.read_text())
    points, steps = record["points"], {"r_dpo": [0, 1, 1], "sft_chosen": [0, 1, 2]}[name]
    assert [point["steps"] for point in points] == steps and len(seen) == steps[-1]
    assert all(point["tokens"] == 0 for point in points) and points[-1]["cpu_seconds"] > 0
    assert points[0]["kl"] == pytest.approx(0.0, abs=1e-5) and points[-1]["kl"] != points[0]["kl"]
    assert {*points[-1]["answers"]} == {"true_reward", "length"}
    task, batch = seen[0]
    assert len(batch) == {"r_dpo": 4, "sft_chosen": 8}[name]  # 8 answers are read for a step
    if name == "r_dpo":
        assert (task.beta, task.alpha) == (setting.kl, experiment.LENGTH_ALPHA)
    uneven = experiment.with_unevenness(record, 5.0)["points"][-1]
    assert uneven["reward"] - points[-1]["reward"] == pytest.approx(5 * record["ease"]) != 0
    assert report.at(points, "tokens", 100, lambda point: point["kl"]) == points[-1]["kl"]  # at any number of tokens


def test_win_rates_by_hand(modules, monkeypatch):
    from remax.evaluation import winrates
    from remax.evaluation.winrates import Comparison, length_controlled

    monkeypatch.setattr(winrates, "REFITS", 2)  # for the interval, which is not looked at
    _, report = modules
    point = {"answers": {"true_reward": [3.0, 1.0, 2.0, 0.0], "length": [9, 4, 6, 2]}}
    draws = [
        {"true_reward": [2.0, 1.0, 2.5, -1.0], "length": [5, 4, 9, 3]},
        {"true_reward": [3.0, 2.0, 1.0, -1.0], "length": [6, 5, 5, 1]},
    ]
    assert report.win_rate(point, draws) == pytest.approx(100 * (1 + 0.5 + 0 + 1 + 0.5 + 0 + 1 + 1) / 8)
    # The same comparisons as texts whose characters are as many.
    comparisons = [
        Comparison(str(k), "x" * draw["length"][k], "x" * length, ("a", "b"), float(p), None, k)
        for draw, of_draw in zip(draws, report.wins(point, draws), strict=True)
        for k, (length, p) in enumerate(zip(point["answers"]["length"], of_draw, strict=True))
    ]
    rate, _ = length_controlled(comparisons)
    assert report.controlled_win_rate(point, draws) == pytest.approx(rate.value)
    assert abs(rate.value - report.win_rate(point, draws)) > 0.1


def test_gradient_variance(modules, setting, tmp_path):
    experiment, report = modules
    names = ("reinforce", "reinforce, reward + 2", "remax", "remax, reward + 2", "calibrated_2", "rloo_4")
    probes = {name: experiment.PROBES[name] for name in names}
    path = tmp_path / "variance.json"
    experiment.measure_variance(
        path, setting.actor, setting, blocks=2, prompts=2, critic_steps=1, critic_rate=1e-3, rollouts=1, probes=probes
    )
    record = json.loads(path.read_text())
    figures = {name: record["probes"][name]["all"] for name in probes}
    # The greedy answer moves with the reward, nothing else does: r + 2 - (b + 2) = r - b
    shifted = figures["remax, reward + 2"]["unit_variance"]
    assert shifted == pytest.approx(figures["remax"]["unit_variance"], rel=1e-4)
    assert figures["reinforce, reward + 2"]["unit_variance"] > 2 * figures["reinforce"]["unit_variance"]
    assert figures["remax"]["tokens_per_unit"] > figures["reinforce"]["tokens_per_unit"]
    assert figures["rloo_4"]["tokens_per_unit"] == pytest.approx(4 * figures["reinforce"]["tokens_per_unit"])
    assert figures["calibrated_2"]["tokens_per_unit"] > 2 * figures["reinforce"]["tokens_per_unit"]
    assert record["answers"] == 2 * 2 * 4
    assert record["rewards"]["kl"] == pytest.approx(0.0, abs=1e-4)  # the policy is the reference itself
    assert record["rewards"]["within"] > 0
    assert report.ratio(record["probes"]["remax"], record["probes"]["remax"]).startswith("1.00")


def test_squared_gradients_of_answers(modules, setting, tmp_path):
    experiment, report = modules
    found = {}
    for task, unevenness in experiment.TASKS.items():
        path = tmp_path / f"{task}.json"
        uneven = dataclasses.replace(setting, unevenness=unevenness)
        experiment.measure_answers(path, setting.actor, uneven, blocks=2, prompts=4, rollouts=1)
        record = json.loads(path.read_text())
        means = {
            name: sum(block["square"] for block in blocks) / sum(block["answers"] for block in blocks)
            for name, blocks in record["probes"].items()
        }
        assert all(block["answers"] == 4 * 4 for blocks in record["probes"].values() for block in blocks)
        found[task] = means
        assert len(report.answers_table({"supervised": record})) == 2 + len(means) + 1  # head, rule, empty line
    # What a prompt adds to all its answers alike, a greedy answer and other answers know, a mean over prompts does not.
    for name in ("remax", "rloo_2", "rloo_4"):
        assert found["uneven"][name] == pytest.approx(found["demo"][name], rel=1e-3)
    assert found["uneven"]["reinforce_mean"] > 2 * found["demo"]["reinforce_mean"]
    assert not {"ppo", "rloo_4_batch", "remax, reward + 2"} & found["demo"].keys()


def test_the_squared_gradient_of_an_answer_is_that_of_its_logits(modules, setting):
    # Of one answer under ReMax: autograd through sum_t A_t log softmax(z_t)[y_t] by the logits z.
    experiment, _ = modules
    experiment.set_seed(0)
    fixed = experiment.FixedPolicy(setting.actor, setting)
    loader = experiment.prompt_loaders(setting, fixed.tokenizer, 2, 0)[0]
    drawn = experiment.draw(fixed, {True: None}, next(iter(loader)))
    estimator = experiment.ESTIMATORS["remax"]
    algorithm, whole = experiment.make_algorithm(estimator, 0.3), drawn.of(experiment.PROBES["remax"])
    got = experiment.noise_of_answers(algorithm, whole, drawn, estimator)
    part = algorithm.prepare(whole)
    logits = fixed.model.head(fixed.model.hidden(part.sequences)).detach().requires_grad_()  # (B, A, V)
    chosen = (
        logits.log_softmax(-1).gather(-1, part.sequences.answer_ids[..., None])[..., 0] * part.sequences.answer_mask
    )
    loss, _ = algorithm.loss(part, experiment.PolicyOutput(chosen), 1)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert got["square"] == pytest.approx(float(gradient.square().sum()), rel=1e-4)
    greedy = int(drawn.greedy.answer_lengths.sum())
    assert got["tokens"] == int(part.sequences.answer_lengths.sum()) + 4 * greedy  # one for each of 4 answers


def test_compare_by_hand(modules):
    experiment, _ = modules
    # Two blocks of two units each, gradients (1, 0), (3, 0) and (2, 1), (2, -1): block means (2, 0) and (2, 0).
    # |E g|^2 = (2, 0).(2, 0) = 4;  E|g|^2 = (1 + 9 + 5 + 5) / 4 = 5;  so the variance is 1.
    blocks = []
    for gradients in ([(1.0, 0.0), (3.0, 0.0)], [(2.0, 1.0), (2.0, -1.0)]):
        block = experiment.Block(torch.zeros(2))
        for gradient in gradients:
            block.add(torch.tensor(gradient), tokens=500)
        blocks.append(block)
    figures = experiment.compare([(block, block) for block in blocks])
    assert figures == pytest.approx(
        {"unit_variance": 1.0, "tokens_per_unit": 500.0, "variance": 0.5, "signal": 4.0, "cosine": 1.0}
    )


def test_intervals(modules):
    _, report = modules
    # sample standard deviation of 1, 2, 3 is 1; t with 2 degrees of freedom is 4.303
    assert report.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / math.sqrt(3)), rel=1e-3)
    # Welch with equal spreads: 4 degrees of freedom, error sqrt(1/3 + 1/3)
    assert report.difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]) == pytest.approx(
        (1.0, 2.776 * math.sqrt(2 / 3)), rel=1e-3
    )
    # The jackknife of a mean is its standard error: of 1, 2, 3 without one each, 2.5, 2, 1.5
    assert report.jackknife(2.0, [2.5, 2.0, 1.5]) == pytest.approx((2.0, 4.303 / math.sqrt(3)), rel=1e-3)


def test_the_report_has_the_tables_of_every_task(modules, setting, tmp_path, monkeypatch):
    # Records of two seeds with made-up figures; the folder's estimators.md has the markers of one table already.
    experiment, report = modules
    monkeypatch.setattr(report, "plot_rewards", lambda runs, kl, path: path.touch())
    monkeypatch.setattr(report, "plot_variance", lambda variance, path: path.touch())
    monkeypatch.setattr(
        report, "controlled_win_rate", lambda point, draws: 10 * point["reward"]
    )  # 68 regressions' time
    (tmp_path / "estimators.md").write_text("# T\n<!-- begin answers -->\nold\n<!-- end answers -->\nProse.\n")

    def runs(seeds: list[int]) -> list[dict]:
        point = {"steps": 10, "seconds": 9.0, "cpu_seconds": 8.0, "reward": 2.0, "true_reward": 1.0, "kl": 1.0}
        start = dict.fromkeys(point, 0.0) | {"tokens": 0, "length": 3.0}
        each = {"true_reward": [1.0] * 6, "length": [5] * 6}
        return [
            {
                "run": dataclasses.asdict(experiment.Run(name, seed, 1e-3)),
                "points": [
                    start | {"answers": each},
                    start | point | {"tokens": 90 + seed if name in experiment.ESTIMATORS else 0, "answers": each},
                ],
            }
            for name in experiment.METHODS
            for seed in seeds
        ]

    figures = {"unit_variance": 4.0, "tokens_per_unit": 10.0, "variance": 2.0, "signal": 1.0, "cosine": 1.0}
    probes = {name: {"all": figures, "without": [figures, figures]} for name in experiment.PROBES}
    rewards = dict.fromkeys(("mean", "within", "among", "greedy", "kl"), 1.0)
    blocks = [{"square": 6.0, "tokens": 20, "answers": 2}] * 2
    answers = {"probes": {name: blocks for name in experiment.PROBES}}
    answers["probes"]["calibrated_4"] = [{"square": 3.0, "tokens": 25, "answers": 2}] * 2
    task = {
        "sweep": runs([9]),
        "runs": runs([0, 1]),
        "draws": [{"true_reward": [0.0, 0.0, 0.0, 1.0, 1.0, 2.0], "length": [5] * 6}],
        "answers": {"supervised": answers},
        "variance": {"supervised": {"rewards": rewards, "probes": probes}},
    }
    report.write({"demo": task, "uneven": task}, setting, tmp_path)
    text = (tmp_path / "estimators.md").read_text()
    names = ("rewards", "answers", "compared", "variance", "constant", "tokens", "seconds", "wins", "sweep")
    assert all(f"<!-- begin {name}{behind} -->" in text for name in names for behind in ("", "_uneven"))
    assert "old" not in text and "Prose." in text
    assert "| calibrated | 3.00 ± 0.00 | 30 |" in text  # 6 / 2 an answer, times 20 / 2 tokens
    assert "| calibrated_4 | rloo_4 | answer | 0.50 (0.50 to 0.50) |" in text
    assert "| calibrated_4 | rloo_4 | generated token | 0.62 (0.62 to 0.62) |" in text  # 3 / 6 times 25 / 20
    # 3 wins, 2 ties of 6
    assert "| dpo | 66.7 ± 0.0 | 20.0 ± 0.0 | 3.0 ± 0.0 | 66.7 ± 0.0 | 20.0 ± 0.0 | 3.0 ± 0.0 |" in text
    assert "| dpo | 8.0 | 2.00 ± 0.00" in text and "| dpo | none | 2.00 ± 0.00" in text  # its end; generates none
    assert "| calibrated_4 | 0.1 k | 2.00 ± 0.00 | 1.00 ± 0.00 | 1.00 ± 0.00 | 1.70 ± 0.00 | 0.00 ± 0.00" in text
    # variance 4 of a unit, 8 s / 10 steps for 8 // 2 prompts: 4 * 0.2
    assert "| supervised | calibrated | 10.0 | 2 ± 0 | 1.00 (1.00 to 1.00) | 0.8 |" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"estimators_{kind}{behind}.png" for kind in ("reward", "variance") for behind in ("", "_uneven")
    }
    tasks = json.loads((tmp_path / "estimators.json").read_text())["tasks"]
    assert tasks.keys() == {"demo", "uneven"} and "answers" not in tasks["demo"]["runs"][0]["points"][0]


def test_the_report_keeps_the_prose(modules, tmp_path):
    _, report = modules
    document = tmp_path / "estimators.md"
    document.write_text("# Title\n<!-- begin tokens -->\nold\n<!-- end tokens -->\nWhat it means.\n")
    report.fill(document, {"tokens": [r"new \1"], "sweep": ["added"]})
    text = document.read_text()
    assert "old" not in text and "\nnew \\1\n" in text and "What it means.\n" in text
    assert text.index("What it means.") < text.index("added")


def test_the_cost_of_a_reward_functions_process_is_the_difference_of_both_ways(root, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["reward_functions.py", "--repeats", "1"])
    runpy.run_path(str(root / "benchmarks/reward_functions.py"), run_name="__main__")
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == ["`words`"] * 5 + ["`gsm8k`"] * 5
    for *_, here, apart, more in rows:
        here, apart, more = (float(found.split()[0]) for found in (here, apart, more))
        assert more == pytest.approx(apart - here, abs=0.02) and here > 0


def test_packing_prints_its_tables(root, corpus, monkeypatch, capsys):
    arguments = f"--data_path {corpus} --max_seq_len 96 --rows 4 --batches 2 --runs 1 --hidden 16 --layers 1 --heads 2"
    monkeypatch.setattr("sys.argv", ["packing.py", *arguments.split(), "--vocabulary", "300"])
    runpy.run_path(str(root / "benchmarks/packing.py"), run_name="__main__")
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| pa")]
    assert [row[0] for row in rows] == ["padded to --max_seq_len", "padded to the longest row", "packed"] * 2
    for start in (0, 3):  # supervised steps, then reward
        shares = [float(row[2]) for row in rows[start : start + 3]]
        assert 1 > shares[0] > shares[1] > shares[2] == 0
        rates = [float(row[1]) for row in rows[start : start + 3]]  # one run: its ratios are those of its rates
        assert float(rows[start + 2][3].split()[0]) == pytest.approx(rates[2] / rates[0], abs=0.02)


# ------------------------------------------------------------------------------------------------- on real preferences


@pytest.fixture
def real_data(root, monkeypatch):
    """real_data(name): the names of a program in benchmarks/real_data."""
    monkeypatch.syspath_prepend(root / "benchmarks")
    return lambda name: runpy.run_path(str(root / "benchmarks/real_data" / f"{name}.py"))


def test_the_methods_on_real_preferences_differ_in_their_flags_alone(
    root, corpus, tiny_model, tiny_reward_model, run_command, tmp_path
):
    # A stand-in for deepspeed tells what each method would hand to the launcher.
    from remax.cli.validate import parse_step2, parse_step3

    programs, output = tmp_path / "bin", tmp_path / "out"
    for folder in (programs, output / "remax/actor_final", output / "models"):
        folder.mkdir(parents=True)
    for name, model in {"sft": tiny_model("llama"), "reward": tiny_reward_model("llama"), "data": corpus}.items():
        (output / name).symlink_to(model)
    for name, model in {"models/referee": tiny_model("llama"), "referee_data": corpus}.items():
        (output / name).symlink_to(model)
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl.gz").touch()  # what `prepare` has read
    (output / "remax/actor_final/config.json").write_text("{}")  # this one is there already
    (programs / "deepspeed").write_text("#!/bin/bash\nprintf 'argument %s\\n' \"$@\"\n")
    (programs / "deepspeed").chmod(0o755)
    variables = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "DATA": tmp_path, "OUTPUT": output}
    variables |= {"NUM_GPUS": "2", "STAGES": "methods referee", "SEEDS": "1 2"}
    done = run_command(
        ["env", *(f"{k}={v}" for k, v in variables.items()), "bash", root / "benchmarks/real_data/run.sh"], cwd=root
    )
    assert done.returncode == 0, done.stdout
    found: dict = {}
    for part in done.stdout.split("\n== ")[1:]:
        name, *lines = part.splitlines()
        words = [line.removeprefix("argument ") for line in lines if line.startswith("argument ")]
        if words:
            main = next(i for i, word in enumerate(words) if word.endswith("main.py"))
            found[name] = (parse_step2 if "step2" in words[main] else parse_step3)(words[main + 1 :])
    referee = found.pop("referee")  # it reads all of its own pairs, and the methods none of them
    assert (referee.data_path, referee.data_split) == ([f"{output}/referee_data"], "0,1,0")
    assert {(*args.data_path, args.data_split) for args in found.values()} == {(f"{output}/data", "4,4,2")}
    names = ["dpo", "r_dpo", "ppo", "remax", "remax_calibrated", "rloo_2", "rloo_4", "grpo", "reinforce"]
    seeds = {seed: {name: found.pop(f"{name}, seed {seed}", None) for name in names} for seed in (1, 2)}
    assert not found and seeds[1].pop("remax") is None and seeds[2].pop("remax").algo == "remax"
    for name in seeds[1]:  # a seed differs in nothing but that, and in where its results are
        first, second = ({**vars(seeds[seed][name])} for seed in (1, 2))
        assert (first.pop("seed"), first.pop("output_dir")) == (1, f"{output}/{name}")
        assert (second.pop("seed"), second.pop("output_dir")) == (2, f"{output}/seed_2/{name}")
        assert first == second
    found = seeds[1]
    assert [(found[name].loss, found[name].dpo_beta) for name in ("dpo", "r_dpo")] == [("dpo", 0.1), ("r-dpo", 0.1)]
    online = [args for name, args in found.items() if "dpo" not in name]
    algorithms = [(args.algo, args.baseline, args.baseline_decay) for args in online]
    assert algorithms[:2] == [("ppo", None, 0), ("remax", "calibrated", 0)]
    assert algorithms[-2:] == [("grpo", None, 0), ("reinforce", None, 0.9)]
    # prompts of a rank, with their sampled and greedy answers: 64 on two ranks
    answers = [
        args.per_device_generation_batch_size * (args.samples_per_prompt + (args.algo == "remax")) for args in online
    ]
    assert answers == [32] * 6 and {args.kl_ctl for args in online} == {0.1}
    assert {args.max_steps for args in online} == {48}


def test_questions_are_the_distinct_short_prompts(real_data):
    class Words:
        def __call__(self, texts, add_special_tokens):
            return {"input_ids": [text.split() for text in texts]}

    rows = [{"prompt": text} for text in ("a b", "a b c d", "e", "a b")]
    asked = real_data("prepare")["questions"](rows, Words(), 3)
    assert [row["instruction"] for row in asked] == ["a b"] * 4 + ["e"] * 4


def test_the_referee_reads_the_pairs_of_step_1(real_data):
    def row(prompt, answer):
        return {"prompt": prompt, "chosen": answer, "rejected": "-"}

    # 21 rows are to be 8, 9 and 4. By their rows: a to step 2, b to 1, c to 3, d to 1, e and f to 2
    sizes = {"a": 6, "b": 5, "c": 4, "d": 3, "e": 2, "f": 1}
    rows = [row(prompt, str(i)) for prompt, count in sizes.items() for i in range(count)]
    kept = real_data("prepare")["rows_of_step_1"](rows + rows, "4,4,2")  # the second half repeats the first
    assert kept == [row for row in rows if row["prompt"] in "bd"]


def test_the_tables_of_the_methods(real_data, tmp_path, monkeypatch):
    monkeypatch.setattr("remax.evaluation.winrates.REFITS", 5)
    monkeypatch.setattr("remax.evaluation.winrates.COSTS", [1e4])
    report = real_data("report")
    assert report["read_methods"](tmp_path) == [] and report["methods_table"]([]) == []
    # Win rates in percent of two prompts with two answers each, by seed
    rates = {"sft_again": [[50, 40], [50, 60], [50, 50]], "dpo": [[90, 80], [70, 80], [80, 80]]}
    rates |= {"remax": [[70, 40], [80, 70], [60, 70]], "ppo": [[88, 78], [68, 78], [78, 78]]}
    rates |= {"grpo": [[86, 76], [66, 76]]}
    for seed, folder in enumerate((tmp_path, tmp_path / "seed_9", tmp_path / "seed_10")):
        for name, of_prompts in rates.items():
            if seed == len(of_prompts):
                continue
            rows = [
                {"instruction": f"p{i}", "output_1": "a *b*", "output_2": f"**{k}** and more.", "generator_1": "sft"}
                | {"generator_2": name, "preference": 1 + of_prompts[seed][i] / 100 + k / 10}
                for i in (0, 1)
                for k in (-1, 1)
            ]
            pair = {"raw": {"value": sum(of_prompts[seed]) / 2}, "controlled": {"value": 52.0 + 2 * seed}}
            for kind, content in (("winrates", {"pairs": [pair]}), ("verdicts", rows)):
                (folder / kind).mkdir(parents=True, exist_ok=True)
                (folder / kind / f"{name}.json").write_text(json.dumps(content))
        (folder / "remax").mkdir()
        steps = [{"train/kl": 1, "train/seconds_per_step": t, "train/tokens_per_second": 6000 / t} for t in (2, 3, 9)]
        evaluations = [{"eval/kl": 0.0}, {"eval/kl": 4.0 + seed}]
        lines = [json.dumps({"step": i} | row) for i, row in enumerate(evaluations[:1] + steps + evaluations[1:])]
        (folder / "remax/metrics.jsonl").write_text("\n".join(lines))
    methods = report["read_methods"](tmp_path)
    _, _, first, second, third, *_ = (row.split(" | ") for row in report["methods_table"](methods))
    # seeds of 45, 55 and 50: their mean, and 5 / sqrt(3); 52, 54 and 56; both prompts have 50
    assert first[:4] == ["| sft_again", "3", "50.0 ± 2.9 [50.0, 50.0]", f"54.0 ± 1.2 {first[3].split(' ± 1.2 ')[1]}"]
    assert first[4:6] == ["100.0", "16"] and second[0] == "| dpo"  # in the order in which they were judged
    # three steps of 2 s, the fastest; 3 x 6000 tokens
    assert third[0] == "| remax" and third[6:] == ["5.0 ± 0.6", "6", "18 |"]
    _, _, dpo, remax, ppo, grpo, _ = report["differences_table"](methods)
    # dpo - sft_again: seeds 40, 20 and 30, prompts both 30; Student's t of two degrees of
    # freedom is 4.3, and 4.3 x 5.8 = 25
    assert dpo == "| dpo | **+30.0 ± 5.8** |  |  |  |"
    # remax - sft_again: seeds 10, 20 and 15, but prompts 20 and 10; remax - dpo: -30, 0 and -15
    assert remax == "| remax | +15.0 ± 2.9 | -15.0 ± 8.7 |  |  |"
    assert ppo == "| ppo | **+28.0 ± 5.8** | **-2.0 ± 0.0** | +13.0 ± 8.7 |  |"
    assert grpo.endswith("| -2.0 ± 0.0 |")  # of two seeds alone
    _, _, sft, again, *_ = report["style_table"](methods)
    assert sft == "| sft | 0.0 | 0% | 2 | 0% |  |  |  |"
    # All have more marks than the baseline. Verdicts of the seeds: 0 1, 0 1/2; 0 1, 1/2 1; 0 1, 0 1
    assert again.startswith("| sft_again | 2.0 | 100% | 3 | 100% | 100% | 50% | ")


# -------------------------------------------------------------------------------------------------------- steps 1 and 2


@pytest.fixture(scope="module")
def finetuning(root):
    """benchmarks/finetune.py."""
    import importlib

    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(root / "benchmarks")
    yield importlib.import_module("finetune")
    patch.undo()
    shutdown()


@pytest.mark.parametrize("work", ["supervised", "reward model", "DPO"])
def test_padded_and_packed_steps_learn_the_same_rows(finetuning, tmp_path, work):
    from rlhf_ways.models import make_models

    args = finetuning.parser().parse_args("--shape tiny --rows 2 --rounds 2 --steps 1 --shorter 8".split())
    make_models(tmp_path, "llama", "tiny", "fp32", longest=64, positions=finetuning.LONGEST)
    found = finetuning.one(work, args, tmp_path)
    padded, packed = (found["losses"][side] for side in ("padded", "packed"))
    assert padded == pytest.approx(packed, rel=1e-3) and len(padded) == 3
    lines = [line.split(" | ") for line in finetuning.report({work: found}, "here", args).splitlines()]
    rows = [line for line in lines if line[0] == f"| {work}"]
    assert [row[1] for row in rows] == ["padded", "packed"]
    first, second = (a / b for a, b in zip(*(found["rates"][side] for side in ("packed", "padded")), strict=True))
    assert float(rows[1][4].split()[0]) == pytest.approx((first + second) / 2, abs=0.006)  # the rounds' ratios


def test_results_keep_what_was_written_about_them(finetuning, tmp_path, monkeypatch):
    from measuring import write_results

    monkeypatch.setattr("sys.argv", ["finetune.py", "--rows", "2"])
    output = tmp_path / "finetune.md"
    write_results(str(output), "Title", "finetune", "old table", {"a": 1})
    output.write_text(output.read_text() + "\n## What it shows\n\nMuch.\n")
    write_results(str(output), "Title", "finetune", "new table", {"a": 2})
    text = "# Title\n\n    python benchmarks/finetune.py --rows 2\n\nnew table\n\n## What it shows\n\nMuch.\n"
    assert output.read_text() == text
    assert json.loads(output.with_suffix(".json").read_text())["a"] == 2
    monkeypatch.setattr("sys.argv", ["finetune.py", "--cells", "3"])  # a part once more: the command stays the whole's
    write_results(str(output), "Title", "finetune", "new table", {"a": 3}, part=True)
    assert output.read_text() == text


def test_the_tokens_of_rows_by_hand(finetuning):
    row = {"prompt": [5, 5, 5], "chosen": [6, 6], "rejected": [7]}
    assert finetuning.tokens_of("supervised", [row]) == 3 + 2 + 1  # and the end token
    assert finetuning.tokens_of("DPO", [row, row]) == 2 * (3 + 2 + 1 + 3 + 1 + 1)


# ---------------------------------------------------------------------------------------------------- what a step costs


@pytest.fixture(scope="module")
def step_cost(root):
    """benchmarks/rlhf_step.py."""
    import importlib

    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(root / "benchmarks")
    yield importlib.import_module("rlhf_step")
    patch.undo()
    shutdown()


def test_ways_to_a_step_take_turns_on_the_same_answers(step_cost, tmp_path, monkeypatch):
    from rlhf_ways.authors import Authors
    from rlhf_ways.ours import Ours

    cell = step_cost.Cell(prompts=4, prompt=6, answer=8, lengths="natural", top_p=0.9, shape="tiny")
    assert cell.ways == ("ReMax", "authors' way")
    turns = []
    for kind in (Ours, Authors):
        step = kind.step
        monkeypatch.setattr(kind, "step", lambda self, rows, step=step: turns.append(type(self)) or step(self, rows))
    monkeypatch.setattr(step_cost, "best_rates", lambda dtype: {"flops": 1e9, "bytes": 1e9})
    folder = cell.models(tmp_path)
    assert dataclasses.replace(cell, top_p=1.0).models(tmp_path) == folder
    assert dataclasses.replace(cell, answer=9).models(tmp_path) != folder
    # it compares the lengths of the answers with those asked for
    found = step_cost.one(cell, cell.ways, 2, folder)
    assert turns == [Authors, Ours, Ours, Authors, Authors, Ours]
    # of each quarter of the lengths 1..8 one prompt, sampled and greedy: 1 or 2, 3 or 4, ...
    assert all(2 * 16 <= tokens <= 2 * 20 for tokens in found["tokens"]["ReMax"])
    assert found["tokens"]["ReMax"] == found["tokens"][step_cost.AUTHORS]
    for way in cell.ways:
        assert len(found["ways"][way]) == 2
        for step in found["ways"][way]:
            assert sum(step[part] for part in step_cost.PARTS) == pytest.approx(step["step"])
            assert all(step[part] > 0 for part in step_cost.PARTS[:-1])
    found["peak"] = dict.fromkeys(cell.ways, found["peak"])
    rows = [line for line in step_cost.report([(cell, found)], 2, "here").splitlines() if line.startswith("| llama")]
    assert [row.split(" | ")[1] for row in rows] == [*cell.ways, *cell.ways]  # of two tables
    assert rows[0].startswith("| llama 4 x 6+8 natural, top-p 0.9 | ReMax | ")


def test_a_ratio_is_that_of_a_round(step_cost):
    cell = step_cost.Cell(prompts=2)
    steps = {"ReMax": [1.0, 2.0, 4.0], "authors' way": [3.0, 2.0, 2.0]}  # ratios 3, 1 and 1/2
    parts = dict.fromkeys(step_cost.PARTS, 0.25)
    found = {"ways": {way: [parts | {"step": s} for s in of_way] for way, of_way in steps.items()}}
    found["operations"] = dict.fromkeys(steps, [dict.fromkeys(step_cost.PARTS[:-1], 10**9)] * 3)
    found |= {"tokens": dict.fromkeys(steps, [100] * 3), "peak": dict.fromkeys(steps, 2**20)}
    found["best"] = [{"flops": 1e9, "bytes": 1e9}, {"flops": 8e9, "bytes": 1e9}]
    text = step_cost.report([(cell, found)], 3, "here")
    assert (
        "| authors' way | 2.00 [2.00, 3.00] | 0.25 | 0.25 | 0.25 | 0.25 | 0.25 | 50 | 1 | 1.00 [0.50, 3.00] |" in text
    )
    # 4 parts of 10^9 operations at 8 * 10^9 a second: half a second, of a part an eighth, which took a quarter
    assert "| ReMax | 0.50 | 50 % | 50 % | 50 % | 50 % | 4.00 [2.00, 8.00] |" in text


def test_operators_belong_to_the_innermost_part(step_cost):
    from rlhf_ways.clock import Clock
    from rlhf_ways.operators import lines, operators

    class Side:
        clock = Clock("wall")

        def step(self, rows):
            x = torch.ones(200, 200)
            with self.clock.step(), self.clock("update"):
                x.exp()
                with self.clock("score"):
                    x.mm(x)

    found = operators(Side(), [])
    assert "aten::mm" in found["score"] and "aten::mm" not in found["update"]
    assert "aten::exp" in found["update"] and "aten::exp" not in found["score"]
    told = {
        part: (products, others)
        for _, part, _, products, others in lines("way", {"a": {"aten::mm": 2.0, "aten::exp": 1.0}})
    }
    assert told == {"a": ("2.00", "exp 1.00")}


def test_the_matrix_products_of_a_step_by_hand(step_cost):
    from rlhf_ways.products import Size, products

    # Weights 10, 1 layer, 2 wide, 3 words; a prompt of 2 tokens, a sampled answer of 2, a greedy one of 1.
    # Read once: the prompt, 2 * 10 * 2 + 4 * 2 * (1 + 2) = 64.
    # Generated: the first sampled token is read, 20 + 8 * 3 = 44; the head for 3 tokens, 3 * 2 * 2 * 3 = 36.
    # Scored: 3 tokens, 60 + 8 * (3 + 4 + 3) = 140. Reference: 2 tokens, 40 + 8 * (3 + 4) = 96, and the head, 24.
    found = products(Size(10, 1, 2, 3), 2, [[2]], [1], critic=False)
    assert found == {"generate": 64 + 44 + 36, "score": 64 + 140, "reference": 64 + 96 + 24, "update": 3 * 184}
    with_critic = products(Size(10, 1, 2, 3), 2, [[2]], [], critic=True)
    assert with_critic["reference"] == 184 + 160 and with_critic["update"] == 3 * (184 + 160)


# ------------------------------------------------------------------------------------------------- one trunk, predicted


@pytest.fixture(scope="module")
def hydra(root):
    import importlib

    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(root / "benchmarks")
    yield importlib.import_module("hydra")
    patch.undo()


def test_predicted_sizes_are_those_of_the_models(hydra):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    from remax.models.lora import add_lora

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for shape in ("10m", "1.1b"):  # the second with fewer key heads
        config = LlamaConfig(**dict(zip((*names, "vocab_size"), hydra.SHAPES[shape], strict=True)), num_labels=1)
        with torch.device("meta"):
            kinds = [kind.from_config(config) for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification)]
            whole = [sum(p.numel() for p in model.parameters()) for model in kinds]
            add_lora(kinds[0], hydra.RANK, "all-linear", True, "--actor_lora_module_name")
        adapters = sum(p.numel() for p in kinds[0].parameters() if p.requires_grad)
        assert hydra.parameters(shape) == (*whole, adapters)


def test_predicted_bytes_by_hand(hydra):
    policy, scorer, adapters = hydra.parameters("7b")
    # weights 4, gradient 4, Adam 8 of what learns, and 4 of the frozen reference and reward model
    assert hydra.predicted(hydra.WAYS["ReMax"], "7b", "fp32") == 16 * policy + 4 * policy + 4 * scorer
    assert hydra.predicted(hydra.WAYS["PPO"], "7b", "fp32") == 20 * (policy + scorer)
    # in bf16: weights 2, gradient 4, Adam's averages and the weights once more 12; a frozen trunk 2
    assert hydra.predicted(hydra.WAYS["Hydra-PPO"], "7b", "bf16") == 2 * policy + 2 * 18 * adapters
    one, ppo, full = (hydra.predicted(hydra.WAYS[name], "7b", "bf16") for name in ("Hydra-ReMax", "PPO", "ReMax"))
    assert one / ppo < 0.08 and one / full < 0.13 and one < 24e9
    assert {name: way.held for name, way in hydra.WAYS.items()} == {
        "PPO": "4 / 0",
        "LoRA-PPO": "4 / 2",
        "Dynamic-LoRA-PPO": "2 / 2",
        "J-Hydra-PPO": "1 / 1",
        "Hydra-PPO": "1 / 2",
        "ReMax": "3 / 0",
        "LoRA-ReMax": "3 / 1",
        "Dynamic-LoRA-ReMax": "2 / 1",
        "Hydra-ReMax": "1 / 1",
    }


# ----------------------------------------------------------------------------------------------------- memory, planned


@pytest.fixture(scope="module")
def memory(root):
    """benchmarks/memory.py."""
    import importlib

    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(root / "benchmarks")
    yield importlib.import_module("memory")
    patch.undo()


def test_the_planner_stands_beside_what_was_measured(memory, root, tmp_path):
    measured = json.loads((root / "docs/results/memory.json").read_text())
    case = next(case for case in memory.CPU_CASES if case.name == "ReMax, ZeRO 2")
    found = list(memory.compared(case, measured[case.name], cuda=False))
    assert [phase for phase, *_ in found] == ["rollout", "scoring", "update", "step", "evaluation"]
    for phase, real, size in found:
        assert size == pytest.approx(real, rel=0.1), phase
    document = tmp_path / "memory.md"
    document.write_text("# Title\n<!-- begin cpu -->\nold\n<!-- end cpu -->\nWhat it means.\n")
    memory.fill(document, {"cpu": ["| new |"]})
    assert document.read_text() == "# Title\n<!-- begin cpu -->\n| new |\n<!-- end cpu -->\nWhat it means.\n"
