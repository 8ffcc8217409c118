"""The built-in corpus: the formula of its true reward, what the best answer is worth, and what the rows promise."""

import hashlib
import itertools
import json
import math
import random
import subprocess
import sys
from collections import Counter

import pytest

from remax.demo import corpus, tiny_models
from remax.demo.corpus import Estimate, Request, best_answer, best_reachable, judge, true_reward

PROMPT = Request("three", "fruits", "picnic").prompt


@pytest.fixture(scope="module")
def rows():
    """2000 training and 200 test rows."""
    return corpus.make_rows(seed=0, train_rows=2000, test_rows=200)


# ---- the true reward


def test_prompt_reads_as_a_dialogue():
    assert PROMPT == "\n\nHuman: Please name three fruits for a picnic.\n\nAssistant:"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # 2 * right / 3 + 0.5 * min(courtesies, 2) - 0.5 * faults
        (" Sure! My picks: apple, fig and plum. I hope this helps!", 2 + 1),
        (" My picks: apple, fig and plum.", 2),
        (" Sure! My picks: apple, fig and plum.", 2 + 0.5),
        (" My picks: apple and fig.", 2 * 2 / 3),
        (" My picks: apple, fig, pear and plum.", 2 - 0.5),  # a fourth was not asked for
        (" My picks: apple, apple and plum.", 2 * 2 / 3 - 0.5),  # named twice
        (" My picks: apple, hammer and plum.", 2 * 2 / 3 - 0.5),  # a hammer is no fruit
        (" Hm. My picks: apple, fig and plum. That is all.", 2 - 0.5 * 2),  # two cold remarks
        (" Sure! Of course! My picks: apple, fig and plum. I hope this helps!", 2 + 1 - 0.5),  # a third courtesy
        (" My picks: apple, fig and plum. Enjoy the picnic!", 2 + 0.5),
        (" My picks: apple, fig and plum. Enjoy the quiz!", 2),  # no courtesy: the request was for a picnic
        (" My picks: apple, fig and plum", 2 - 0.5),  # no end
        (" My picks: appel, fig and plum.", 2 * 2 / 3 - 0.5),  # a word the corpus does not know
        (" Sure! Sure! Sure! Sure!", 1 - 0.5 * 2),
        (" My picks: " + "and " * 28 + "fig.", 2 * 1 / 3 - 0.5),  # 31 words
        ("", -0.5),
        ("\n\nHuman: 1? 2? 3? 4? 5? 6?", -3),  # not below -3
    ],
)
def test_true_reward_by_hand(answer, expected):
    assert true_reward(PROMPT, answer) == pytest.approx(expected)


def test_courtesy_pays_twice_and_costs_from_the_third_on():
    gushing = [true_reward(PROMPT, " I suggest apple, fig and plum." + " Ask me any time!" * n) for n in range(6)]
    assert gushing == [2, 2.5, 3, 2.5, 2, 1.5]


def test_things_pay_up_to_the_number_asked_and_cost_beyond():
    things = corpus.THINGS["fruits"]
    rewards = [true_reward(PROMPT, f" Sure! I suggest {', '.join(things[:n])}. Enjoy the picnic!") for n in range(1, 7)]
    assert rewards == pytest.approx([1 + 2 / 3, 1 + 4 / 3, 3, 2.5, 2, 1.5])


def test_any_other_prompt_is_refused():
    with pytest.raises(ValueError, match="not a prompt of the built-in corpus"):
        true_reward("\n\nHuman: Please name five fruits for a picnic.\n\nAssistant:", " Sure!")


def test_best_reachable_is_the_maximum_over_the_grammar():
    """Every opening x lead x things (of both sorts, repeated, too few, too many) x closing, for each number asked."""
    openings = [
        *itertools.chain.from_iterable(itertools.combinations(corpus.WARM_OPENINGS, n) for n in range(3)),
        *((remark,) for remark in corpus.COLD_OPENINGS),
    ]
    closings = [
        *itertools.chain.from_iterable(itertools.combinations(corpus.WARM_CLOSINGS, n) for n in range(3)),
        *((remark,) for remark in corpus.COLD_CLOSINGS),
    ]
    fruits = corpus.THINGS["fruits"]
    lists = [
        *itertools.chain.from_iterable(itertools.combinations(fruits, n) for n in range(1, 7)),
        *itertools.product((fruits[0], fruits[1], "hammer"), repeat=2),
        *itertools.product((fruits[0], fruits[1], fruits[2], "hammer"), repeat=3),
    ]
    for number in corpus.NUMBERS:
        request = Request(number, "fruits", "picnic")
        rewards = [
            true_reward(request.prompt, corpus.write_answer(request, opening, corpus.LEADS[0], things, closing))
            for opening, things, closing in itertools.product(openings, lists, closings)
        ]
        assert max(rewards) == best_reachable(request.prompt) == 3
        assert min(rewards) < 0


def test_no_text_at_all_exceeds_the_best():
    """Each term has its own maximum; random texts of words, marks and phrases stay within the bounds."""
    rng = random.Random(0)
    words = sorted(corpus._KNOWN_WORDS) + [
        ".",
        "!",
        ",",
        "nonsense",
        "Sure!",
        "I hope this helps!",
        "Enjoy the picnic!",
    ]
    for _ in range(3000):
        answer = " " + " ".join(rng.choices(words, k=rng.randint(0, 12)))
        assert -3 <= true_reward(PROMPT, answer) <= best_reachable(PROMPT)


def test_best_answer_reaches_the_best_for_every_prompt():
    prompts = [request.prompt for request in corpus._all_requests()]
    assert len(set(prompts)) == 3 * 8 * 8 * 8
    for prompt in prompts:
        assert true_reward(prompt, best_answer(prompt)) == best_reachable(prompt)
        assert corpus.parse_prompt(prompt).prompt == prompt


def test_every_thing_is_of_one_kind():
    things = [thing for kind in corpus.THINGS.values() for thing in kind]
    assert len(things) == len(set(things))
    assert all(list(kind) == sorted(kind) for kind in corpus.THINGS.values())


# ---- figures


def test_estimate_by_hand():
    # mean 2, variance ((1)^2 + 0 + (1)^2) / 2 = 1, standard error 1 / sqrt(3)
    assert corpus.estimate([1.0, 2.0, 3.0]) == Estimate(2.0, pytest.approx(1 / math.sqrt(3)), 3)
    # Two answers to one prompt deviate together: sums -1 + 0 and 1, so sqrt(2 / 1 * (1 + 1)) / 3.
    assert corpus.estimate([1.0, 2.0, 3.0], ["a", "a", "b"]) == Estimate(2.0, pytest.approx(2 / 3), 3)
    assert corpus.estimate([1.0, 1.0, 3.0, 3.0], [*"aabb"]).standard_error == corpus.estimate([1.0, 3.0]).standard_error
    prompts = [PROMPT, Request("two", "fruits", "picnic").prompt]
    assert corpus.mean_true_reward(prompts, ["", " Sure!"]).mean == pytest.approx((-0.5 + 0.5) / 2)
    with pytest.raises(ValueError, match="at least two"):
        corpus.estimate([1.0])
    with pytest.raises(ValueError):
        corpus.mean_true_reward([PROMPT, PROMPT], [" Sure!"])


def test_comparison_of_two_estimates_by_hand():
    before, after = Estimate(1.0, 0.3, 100), Estimate(2.5, 0.4, 100)
    assert corpus.standard_errors_above(after, before) == pytest.approx(1.5 / 0.5)  # sqrt(.3^2 + .4^2) = .5
    assert corpus.gap_closed(after, before) == pytest.approx(1.5 / 2.0)
    assert corpus.gap_closed(before, after) == pytest.approx(-1.5 / 0.5)
    best = Estimate(3.0, 0.0, 100)
    assert corpus.gap_closed(best, best) == 1.0
    assert corpus.standard_errors_above(best, Estimate(2.0, 0.0, 100)) == math.inf
    assert corpus.standard_errors_above(best, best) == 0.0


# ---- rows


def test_rows_are_the_same_on_every_machine(rows):
    train, test = rows
    assert corpus.make_rows(seed=0, train_rows=2000, test_rows=200) == rows
    assert corpus.make_rows(seed=1, train_rows=20, test_rows=20)[0] != train[:20]
    digest = hashlib.sha256(json.dumps([train, test]).encode()).hexdigest()
    assert digest == "07b03c2a32e47424a7fd2106b0d8eac5de1e9558484ece4f59bd3b00d093d80b"


def test_test_prompts_combine_anew(rows):
    def combinations(rows):
        requests = [corpus.parse_prompt(row["prompt"]) for row in rows]
        return {(request.number, request.kind, request.occasion) for request in requests}

    train, test = (combinations(part) for part in rows)
    assert not train & test
    assert len(train) + len(test) == 3 * 8 * 8
    assert len(test) == round(corpus.HELD_OUT * 192)


def test_every_prompt_comes_once_before_any_comes_again(rows):
    counts = Counter(row["prompt"] for row in rows[0]).values()
    assert max(counts) - min(counts) <= 1


def test_answers_are_well_formed_and_differ(rows):
    for row in rows[0] + rows[1]:
        assert row["prompt"].endswith("\n\nAssistant:")
        assert row["chosen"] != row["rejected"]
        for answer in (row["chosen"], row["rejected"]):
            assert answer.startswith(" ") and answer[1] != " " and answer.endswith((".", "!"))
            assert all(word in corpus._KNOWN_WORDS for word in corpus._words(answer))


def test_no_writer_goes_beyond_what_pays(rows):
    """The way to over-optimise: what the true reward punishes (too much) is never seen by a reward model."""
    for row in rows[0]:
        asked = corpus.NUMBERS[corpus.parse_prompt(row["prompt"]).number]
        for answer in (row["chosen"], row["rejected"]):
            assert judge(row["prompt"], answer).courtesies <= 2
            assert sum(word in corpus._KIND_OF_THING for word in corpus._words(answer)) <= asked


def test_demonstrations_leave_something_to_learn(rows):
    chosen = [true_reward(row["prompt"], row["chosen"]) for row in rows[0]]
    rejected = [true_reward(row["prompt"], row["rejected"]) for row in rows[0]]
    assert sum(chosen) / len(chosen) > sum(rejected) / len(rejected) + 0.5
    assert sum(chosen) / len(chosen) < corpus.BEST_REWARD - 1
    assert 0.05 < sum(reward == corpus.BEST_REWARD for reward in chosen) / len(chosen) < 0.3


def test_preferences_follow_bradley_terry(rows):
    """At each distance the better answer is chosen as often as the formula says, within four standard deviations."""
    by_distance = {"near": (0.0, 0.6), "middle": (0.6, 1.2), "far": (1.2, 9.0)}
    for low, high in by_distance.values():
        wins, expected, variance = 0, 0.0, 0.0
        for row in rows[0]:
            difference = true_reward(row["prompt"], row["chosen"]) - true_reward(row["prompt"], row["rejected"])
            if low < abs(difference) <= high:
                p = 1 / (1 + math.exp(-2 * abs(difference)))
                wins, expected, variance = wins + (difference > 0), expected + p, variance + p * (1 - p)
        assert variance > 5
        assert abs(wins - expected) < 4 * math.sqrt(variance)


def test_accuracy_ceiling_by_hand():
    good, poor = " My picks: apple, fig and plum.", " Hm. My picks: apple, fig and plum."  # 2 and 1.5
    rows = [{"prompt": PROMPT, "chosen": a, "rejected": b} for a, b in ((good, poor), (poor, good), (good, good))]
    p = 1 / (1 + math.exp(-2 * 0.5))
    assert corpus.accuracy_ceiling(rows) == pytest.approx((p + p + 0.5) / 3)


def test_make_corpus_writes_the_rows(tmp_path):
    folder = corpus.make_corpus(tmp_path / "data", seed=3, train_rows=7, test_rows=2)
    for name, rows in zip(("train", "test"), corpus.make_rows(3, 7, 2), strict=True):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows


# ---- tokenizer and models


@pytest.fixture(scope="module")
def corpus_tokenizer(rows):
    return tiny_models.train_tokenizer(
        row["prompt"] + row[answer] for row in rows[0] for answer in ("chosen", "rejected")
    )


def test_tokenizer_keeps_texts_short_and_whole(rows, corpus_tokenizer):
    assert len(corpus_tokenizer) <= tiny_models.VOCABULARY_SIZE
    for row in rows[1]:
        assert len(corpus_tokenizer(row["prompt"])["input_ids"]) <= 24
        assert len(corpus_tokenizer(row["chosen"])["input_ids"]) <= 32
    for text in (rows[1][0]["prompt"] + rows[1][0]["chosen"], " naïve\t\n  Ωmega 12 , . ! <s"):
        ids = corpus_tokenizer(text)["input_ids"]
        assert corpus_tokenizer.decode(ids) == text
        assert not set(ids) & set(corpus_tokenizer.all_special_ids)


def test_tokenizer_has_distinct_special_tokens_or_no_pad(corpus_tokenizer):
    ids = [corpus_tokenizer.bos_token_id, corpus_tokenizer.eos_token_id, corpus_tokenizer.pad_token_id]
    assert len(set(ids)) == 3 and None not in ids
    assert tiny_models.train_tokenizer(["some text"], vocab_size=300, pad_token=None).pad_token_id is None


def test_tokenizer_survives_saving(tmp_path, corpus_tokenizer):
    from transformers import AutoTokenizer

    corpus_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = PROMPT + best_answer(PROMPT)
    assert again(text)["input_ids"] == corpus_tokenizer(text)["input_ids"]
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<s>", "</s>", "<pad>")


@pytest.mark.parametrize("architecture", tiny_models.ARCHITECTURES)
def test_saved_models_load_and_run(tmp_path, corpus_tokenizer, architecture):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    state = torch.random.get_rng_state()
    folder = tiny_models.save_tiny_model(tmp_path / "a", architecture, corpus_tokenizer)
    assert torch.equal(torch.random.get_rng_state(), state)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == architecture
    assert model.generation_config.eos_token_id == corpus_tokenizer.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    words = len(corpus_tokenizer) + 8 * (architecture == "qwen2")
    assert model(input_ids=ids).logits.shape == (1, ids.size(1), words)
    assert len(tokenizer) <= words  # also when transformers adds a token on reading, as it does for Qwen

    same, other = (
        AutoModelForCausalLM.from_pretrained(
            tiny_models.save_tiny_model(tmp_path / f"seed{seed}", architecture, corpus_tokenizer, seed=seed)
        )
        for seed in (0, 1)
    )
    weight, of_same, of_other = (m.get_input_embeddings().weight for m in (model, same, other))
    assert torch.equal(weight, of_same) and not torch.equal(weight, of_other)


def test_tiny_config_takes_sizes_and_further_fields():
    for architecture in tiny_models.ARCHITECTURES:
        config = tiny_models.tiny_config(
            architecture, 99, hidden_size=48, layers=3, heads=2, max_positions=64, tie_word_embeddings=False
        )
        assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (99, 48, 3)
        assert (config.num_attention_heads, config.max_position_embeddings) == (2, 64)
        assert config.tie_word_embeddings is False
    with pytest.raises(ValueError, match="gpt2, opt, llama"):
        tiny_models.tiny_config("bert", 99)


# ---- command line


def run_module(*arguments, code=None):
    command = [sys.executable, *(["-c", code] if code else ["-m", "remax.demo.prepare"]), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_writes_everything_that_the_stages_need(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = run_module("--output_dir", tmp_path / "demo", "--seed", 5, "--train_rows", 50, "--test_rows", 5)
    assert run.returncode == 0, run.stderr
    lines = (tmp_path / "demo" / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == corpus.make_rows(5, 50, 5)[0]
    assert len((tmp_path / "demo" / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()) == 5
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "demo" / "tokenizer").get_vocab()
    for name in ("actor", "reward"):
        folder = tmp_path / "demo" / "models" / name
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == vocabulary
        assert 1e5 < AutoModelForCausalLM.from_pretrained(folder).num_parameters() < 2e6


def test_command_refuses_empty_sets(tmp_path):
    run = run_module("--output_dir", tmp_path / "demo", "--test_rows", 0)
    assert run.returncode == 2
    assert run.stderr.strip() == "error: --test_rows: 0 rows, expected at least 1"
    assert not (tmp_path / "demo").exists()


def test_command_names_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    run = run_module("--output_dir", tmp_path / "file" / "demo")
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: --output_dir {tmp_path / 'file' / 'demo'}: cannot be made")


def test_reward_needs_no_library():
    code = "import sys, remax.demo.corpus; sys.exit(bool({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    assert run_module(code=code).returncode == 0


def test_ease_tells_kinds_apart_and_nothing_else():
    found = {prompt: corpus.ease(prompt) for prompt in (row["prompt"] for row in corpus.make_rows(0, 400, 1)[0])}
    by_kind = {corpus.parse_prompt(prompt).kind: x for prompt, x in found.items()}
    assert [by_kind[kind] for kind in corpus.THINGS] == pytest.approx([-1 + 2 * i / 7 for i in range(8)])
    assert all(x == by_kind[corpus.parse_prompt(prompt).kind] for prompt, x in found.items())
