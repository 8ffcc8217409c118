"""A packed micro-batch: its rows cut into pieces that know nothing of one another, and the padded batch's numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from remax.checks.packing import check_packing, start_packing
from remax.core.logprobs import PolicyOutput
from remax.core.sequences import Sequences
from remax.engines.base import Engine, FrozenEngine
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.roles import Role
from remax.models.loading import prepare_training
from remax.models.lora import add_lora
from remax.models.packing import IN_PIECES, Packed, attend_in_pieces, band, prepare_packing, token_slots, unpacked
from remax.models.policy import PolicyModel, load_policy
from remax.models.reward_model import RewardModel
from remax.training.tasks import DirectPreference, Ranking, Supervised
from utils.data.batches import PairBatch, SupervisedBatch
from utils.run import UserError
from utils.tokenizer import load_tokenizer

FAMILIES = ["gpt2", "opt", "llama", "mistral", "qwen2", "cohere", "granite"]
WINDOW = 4  # of Mistral's attention; the rows are up to 18 tokens long


def folder_of(make, family: str):
    """make: `make_policy` or `make_scorer`."""
    return make(family, sliding_window=WINDOW) if family == "mistral" else make(family)


# --- where the tokens go


rows_of_tokens = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=9)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a loaded machine is no fault
@given(rows=rows_of_tokens, spare=st.integers(0, 3))
def test_packing_is_a_partition_of_the_rows(rows, spare):
    prompts, answers = (torch.tensor(lengths) for lengths in zip(*rows, strict=True))
    width = int((prompts + answers).max()) + spare
    ids = torch.arange(len(rows) * width).view(len(rows), width)  # every slot another number
    sequences = Sequences(ids, prompts, answers)
    packed = Packed.join(sequences)
    real = ids[sequences.mask]
    assert packed.input_ids.shape == packed.position_ids.shape == (1, len(real))
    assert sorted(packed.input_ids[0].tolist()) == real.tolist()  # each token once, and no other
    assert torch.equal(packed.position_ids[0], packed.input_ids[0] % width)  # its column
    assert token_slots(sequences, True) == len(real) and token_slots(sequences, False) == ids.numel()
    # unpack(pack(x)) = x on every token; behind a row's end stands its last one
    back = packed.at(packed.input_ids, torch.arange(width).expand_as(ids))
    assert packed.pieces == tuple((p + a,) for p, a in rows)
    last = ids.gather(1, sequences.end_index[:, None])
    assert torch.equal(back, torch.where(sequences.mask, ids, last))
    assert torch.equal(packed.at(packed.input_ids, sequences.end_index), last[:, 0])
    vectors = torch.stack([packed.input_ids, -packed.input_ids], -1)  # (1, N, 2)
    assert torch.equal(packed.at(vectors, sequences.end_index), torch.stack([last[:, 0], -last[:, 0]], -1))


def sharing(sequences: Sequences, prompt_of: list[int]) -> Sequences:
    """The rows, of which each gets the prompt of another, in front of its own answer."""
    ids = torch.zeros(len(sequences), int(sequences.prompt_lengths.max() + sequences.answer_lengths.max())).long()
    prompts = sequences.prompt_lengths[prompt_of]
    for i, j in enumerate(prompt_of):
        prompt = sequences.input_ids[j, : prompts[i]]
        answer = sequences.input_ids[i, sequences.prompt_lengths[i] : sequences.lengths[i]]
        ids[i, : len(prompt) + len(answer)] = torch.cat([prompt, answer])
    return Sequences(ids, prompts, sequences.answer_lengths)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=rows_of_tokens, choice=st.randoms(use_true_random=False))
def test_a_shared_prompt_is_there_once(rows, choice):
    prompts, answers = (torch.tensor(lengths) for lengths in zip(*rows, strict=True))
    ids = torch.arange(len(rows) * 12).view(len(rows), 12)
    prompt_of = [choice.randrange(len(rows)) for _ in rows]
    sequences = sharing(Sequences(ids, prompts, answers), prompt_of)
    packed = Packed.join(sequences, share=True)
    read = packed.input_ids[0].tolist()
    wanted = [ids[i, int(prompts[i]) :][: int(answers[i])] for i in range(len(rows))]
    wanted += [ids[j, : int(prompts[j])] for j in set(prompt_of)]
    assert sorted(read) == sorted(torch.cat(wanted).tolist())  # each answer once, each prompt once
    columns = torch.arange(12).expand_as(ids).clamp(max=sequences.end_index[:, None])
    assert torch.equal(packed.at(packed.input_ids, columns), sequences.at(sequences.input_ids, columns))
    assert torch.equal(packed.at(packed.position_ids, columns), columns)  # an answer goes on from its prompt
    assert sum(map(sum, packed.pieces)) == len(read)
    split = iter(torch.tensor(read).split([n for group in packed.pieces for n in group]))
    begins = [[int(next(split)[0]) for _ in group] for group in packed.pieces]
    firsts = [int(sequences.input_ids[min(i for i, j in enumerate(prompt_of) if j == p), 0]) for p in set(prompt_of)]
    assert sorted(group[0] for group in begins) == sorted(firsts)


def test_an_empty_answer_is_no_piece(make_policy):
    rows = Sequences(torch.tensor([[5, 6, 7], [5, 6, 0]]), torch.tensor([2, 2]), torch.tensor([1, 0]))
    assert Packed.join(rows, share=True).pieces == ((2, 1),)
    model = PolicyModel(AutoModelForCausalLM.from_pretrained(make_policy("gpt2")), packing=True)
    assert model(rows)[0].tolist()[1] == [0.0]


def test_a_window_of_two():
    # Token i sees itself and the one before it.
    assert band(3, 2, torch.device("cpu")).int().tolist() == [[[[1, 0, 0], [1, 1, 0], [0, 1, 1]]]]


# --- loss and gradient


class Whole:
    """An engine in one process: the model itself."""

    def __init__(self, model):
        self.model = model

    def logprobs(self, sequences: Sequences) -> PolicyOutput:
        return PolicyOutput(self.model(sequences)[0])

    def score(self, sequences: Sequences) -> torch.Tensor:
        return self.model(sequences)


class Frozen(Whole):
    @torch.no_grad()
    def logprobs(self, sequences: Sequences) -> torch.Tensor:
        return self.model(sequences)[0]


def preference_batch(sequences_of) -> PairBatch:
    chosen, rejected = sequences_of(1, 5, 300), sequences_of(2, 5, 300, longest=7)
    batch = {"prompt_lengths": torch.minimum(chosen.prompt_lengths, rejected.lengths - 1)}
    for name, rows in (("chosen", chosen), ("rejected", rejected)):
        batch |= {f"{name}_ids": rows.input_ids, f"{name}_lengths": rows.lengths}
    return PairBatch(**batch, weight=torch.ones(5))


def supervised_batch(sequences_of, loss_mask: bool) -> SupervisedBatch:
    rows = sequences_of(3, 6, 300)
    learned = torch.rand(rows.answer_mask.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    return SupervisedBatch(
        input_ids=rows.input_ids,
        lengths=rows.lengths,
        prompt_lengths=rows.prompt_lengths,
        loss_mask=learned & rows.answer_mask if loss_mask else None,
        weight=torch.ones(6),
    )


def build(kind: str, folder, packing: bool, checkpointing: bool):
    """(task, model), without dropout, in train mode."""
    auto = AutoModelForSequenceClassification if kind == "ranking" else AutoModelForCausalLM

    def load():
        hf = auto.from_pretrained(folder)
        for module in hf.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        if checkpointing:
            prepare_training(hf, True)
        return (RewardModel if kind == "ranking" else PolicyModel)(hf, packing=packing).train()

    model = load()
    if kind == "lora":
        torch.manual_seed(0)  # the adapters' start
        add_lora(model.hf, 3, "self_attn", True, "--lora_module_name")
    if kind == "ranking":
        return Ranking(Whole(model), []), model
    if kind == "dpo":
        reference = load()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.mul_(1.02)
        return DirectPreference(Whole(model), Frozen(reference), [], beta=0.5), model
    return Supervised(Whole(model), []), model


def loss_and_gradient(kind: str, folder, batch, *, packing: bool, checkpointing: bool = False):
    task, model = build(kind, folder, packing, checkpointing)
    loss, figures = task.loss(batch, task.count(batch))
    loss.backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradient, {name: float(figure.total) for name, figure in figures.items()}


CASES = [(kind, family) for kind in ("supervised", "loss_mask", "ranking", "dpo") for family in FAMILIES[:4]]
CASES += [("supervised", family) for family in FAMILIES[4:]] + [("lora", "llama")]


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_loss_and_gradient_equal_the_padded_ones(kind, family, make_policy, make_scorer, sequences_of):
    folder = folder_of(make_scorer if kind == "ranking" else make_policy, family)
    pairs = kind in ("ranking", "dpo")
    batch = preference_batch(sequences_of) if pairs else supervised_batch(sequences_of, kind == "loss_mask")
    padded = loss_and_gradient(kind, folder, batch, packing=False)
    checkpointed = {"checkpointing": True} if kind == "supervised" else {}
    packed = loss_and_gradient(kind, folder, batch, packing=True, **checkpointed)
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-5, atol=0)
    assert packed[1].keys() == padded[1].keys()
    norm = torch.cat([g.flatten() for g in padded[1].values()]).norm()
    assert norm > 1e-2
    difference = torch.cat([(packed[1][name] - g).flatten() for name, g in padded[1].items()])
    assert difference.norm() <= 1e-5 * norm
    assert packed[2] == pytest.approx(padded[2], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_piece_feels_another(family, make_policy, sequences_of):
    # The other rows' tokens are exchanged: what is said of the third row must stay the same to the last bit.
    model = PolicyModel(AutoModelForCausalLM.from_pretrained(folder_of(make_policy, family)), packing=True).eval()
    rows = sequences_of(4, 6, 300)
    ids = (rows.input_ids + 7) % 300
    ids[2] = rows.input_ids[2]
    with torch.no_grad():
        before, after = (
            model(Sequences(x, rows.prompt_lengths, rows.answer_lengths))[0] for x in (rows.input_ids, ids)
        )
    assert torch.equal(before[2], after[2]) and not torch.equal(before[3], after[3])


def test_a_window_counts_within_the_piece(make_policy, sequences_of):
    # Beyond the window of two layers (1 + 2 * 3 tokens back) nothing is seen, within it everything.
    folder = folder_of(make_policy, "mistral")
    model = PolicyModel(AutoModelForCausalLM.from_pretrained(folder), packing=True).eval()
    rows = sequences_of(5, 3, 300)
    values = []
    for column in (None, 10, 11):  # the first row has 18 tokens; its last answer token is predicted at column 16
        ids = rows.input_ids.clone()
        if column is not None:
            ids[0, column - 1] = (ids[0, column - 1] + 1) % 300
        with torch.no_grad():
            values.append(model.hidden(Sequences(ids, rows.prompt_lengths, rows.answer_lengths))[0, -1])
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_the_pieces_and_layers_of_a_batch_share_one_mask(make_policy, sequences_of):
    model = PolicyModel(AutoModelForCausalLM.from_pretrained(folder_of(make_policy, "mistral")), packing=True)
    rows = sequences_of(5, 3, 300)
    window, layers = model.hf.config.sliding_window, model.hf.config.num_hidden_layers
    long = int((rows.lengths > window).sum())
    band.cache_clear()
    model.hidden(rows)
    assert long > 1 and layers > 1
    assert band.cache_info().misses == 1 and band.cache_info().hits == long * layers - 1


SIX = [0, 0, 2, 0, 2, 5]  # whose prompt each of six rows has: three, two and one answer to a prompt


@pytest.mark.parametrize(
    ("family", "dtype"), [(family, torch.float64) for family in FAMILIES] + [("mistral", torch.float32)]
)
def test_answers_that_share_a_prompt_have_the_numbers_of_padded_rows(
    family, dtype, make_policy, make_scorer, sequences_of
):
    # Log-probs, scores, values before each token, and the gradient of all of them.
    rows = sharing(sequences_of(7, 6, 300), SIX)
    weights = torch.randn(rows.answer_mask.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    spared = 2 * int(rows.prompt_lengths[0]) + int(rows.prompt_lengths[2])
    readers = [(AutoModelForCausalLM, make_policy, PolicyModel, [{}])]
    if family not in ("cohere", "granite"):  # transformers has no classifiers of them
        readers += [(AutoModelForSequenceClassification, make_scorer, RewardModel, [{"every_token": True}, {}])]
    for auto, make, kind, reads in readers:
        found, slots = [], []
        for packing in (False, True):
            model = kind(auto.from_pretrained(folder_of(make, family), dtype=dtype), packing=packing).eval()
            embedding = model.hf.get_input_embeddings()
            embedding.register_forward_pre_hook(lambda module, args, to=slots: to.append(args[0].numel()))
            outputs = [model(rows, **how) for how in reads]
            values = [x[0] if isinstance(x, tuple) else x for x in outputs]
            sum((x * (weights if x.dim() > 1 else weights[:, 0])).sum() for x in values).backward()
            found.append((values, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        assert {*slots} == {rows.input_ids.numel(), rows.tokens - spared} and slots[0] > slots[-1]
        exact = dtype == torch.float64 and kind is PolicyModel and family in ("gpt2", "opt")  # nothing in float32 there
        bound = 1e-12 if exact else 1e-5
        for a, b in zip(found[0][0], found[1][0], strict=True):
            torch.testing.assert_close(b, a, rtol=bound, atol=10 * bound)
        norm = torch.cat([g.flatten() for g in found[0][1].values()]).norm()
        difference = torch.cat([(found[1][1][name] - g).flatten() for name, g in found[0][1].items()]).norm()
        assert norm > 1e-2 and difference <= bound * norm


# --- the check on the live model


def checked(model, dtype: str = "fp32", max_len: int = 18) -> None:
    engine = Engine()
    engine.model = engine.wrapped = model
    engine.config = EngineConfig(dtype=dtype)
    read = {"every_token": True} if isinstance(model, RewardModel) else {"hidden_only": True}
    check_packing(Role(engine), max_len, **read)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_passes_the_families(family, make_policy):
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        hf = AutoModelForCausalLM.from_pretrained(folder_of(make_policy, family), dtype=dtype)
        model = PolicyModel(hf, packing=True).train()
        checked(model, name)
        assert model.training and model.packing and hf.config._attn_implementation == IN_PIECES


def test_the_check_finds_a_leak(make_policy, make_scorer, monkeypatch):
    def leaking(*tensors, pieces, **options):
        return attend_in_pieces(*tensors, pieces=((sum(map(sum, pieces)),),), **options)

    def blind(*tensors, pieces, **options):  # answers that do not see the prompt they share
        return attend_in_pieces(*tensors, pieces=tuple((n,) for group in pieces for n in group), **options)

    for attention in (leaking, blind):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, IN_PIECES, attention)
        for model in (
            PolicyModel(AutoModelForCausalLM.from_pretrained(make_policy("opt")), packing=True),
            RewardModel(AutoModelForSequenceClassification.from_pretrained(make_scorer("llama")), packing=True),
        ):
            with pytest.raises(UserError, match="--packing: .*'(opt|llama)'.*change each other's values"):
                checked(model)


def test_packing_starts_where_it_pays_and_can(make_policy, monkeypatch):
    def role(family: str, **options) -> Role:
        hf = AutoModelForCausalLM.from_pretrained(make_policy(family), **options)
        return Role(FrozenEngine(PolicyModel(hf), EngineConfig()))

    def state(of: Role):
        return of.model.packing, of.model.hf.config._attn_implementation

    llama = role("llama")
    assert start_packing(llama, 18, False, hidden_only=True) == "" and state(llama) == (False, "sdpa")
    with monkeypatch.context() as patch:
        patch.setattr("remax.models.packing.device", lambda: torch.device("cuda"))
        assert "flash_attention_2" in start_packing(llama, 18, None, hidden_only=True)
        assert state(llama) == (False, "sdpa")
    assert start_packing(llama, 18, None, hidden_only=True) == "" and state(llama) == (True, IN_PIECES)

    def one_piece(*tensors, pieces, **options):
        return attend_in_pieces(*tensors, pieces=((tensors[1].shape[2],),), **options)

    for attention, of, reason in [
        (attend_in_pieces, role("opt", attn_implementation="eager"), "with models of the type 'opt' and eager"),
        (one_piece, role("opt"), "packed rows change each other's values"),
    ]:
        before = state(of)
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, IN_PIECES, attention)
        assert reason in start_packing(of, 18, None, hidden_only=True)
        assert state(of) == before  # goes on with padded rows
        with pytest.raises(UserError, match=f"--packing: .*{reason}"):
            start_packing(of, 18, True, hidden_only=True)


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-4), ("bf16", 3e-2)])
def test_the_check_refuses_what_rounding_cannot_explain(dtype, bound, make_policy):
    # The largest difference, as a share of the largest value.
    model = PolicyModel(AutoModelForCausalLM.from_pretrained(make_policy("llama")), packing=True)

    class OffBy(Engine):
        def __init__(self, size: float):
            self.model, self.config, self.size = model, EngineConfig(dtype=dtype), size

        def __call__(self, rows: Sequences) -> torch.Tensor:
            values = torch.full(rows.answer_mask.shape, -8.0)
            values[0, 0] += 8 * self.size * self.model.packing
            return values

    check_packing(Role(OffBy(0.8 * bound)), 9)
    with pytest.raises(UserError, match="change each other's values"):
        check_packing(Role(OffBy(1.2 * bound)), 9)


def test_the_check_reaches_beyond_the_window(make_policy, monkeypatch):
    def endless(*tensors, sliding_window, **options):
        return attend_in_pieces(*tensors, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, IN_PIECES, endless)
    model = PolicyModel(AutoModelForCausalLM.from_pretrained(make_policy("mistral", sliding_window=9)), packing=True)
    checked(model, max_len=9)  # no row is longer than the window
    with pytest.raises(UserError, match="'mistral'"):
        checked(model, max_len=10)


# --- what cannot be packed


def test_eager_attention_is_refused(make_policy):
    hf = AutoModelForCausalLM.from_pretrained(make_policy("opt"), attn_implementation="eager")
    with pytest.raises(UserError, match="--packing: .*'opt' and eager attention; leave the flag out, or set --attn"):
        prepare_packing(hf)
    gemma2 = make_policy("gemma2")  # some versions of transformers load it so by themselves
    with pytest.raises(UserError, match="'gemma2' and eager"):
        PolicyModel(AutoModelForCausalLM.from_pretrained(gemma2, attn_implementation="eager"), packing=True)


def test_models_without_positions_are_refused():
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2)
    hf = BloomForCausalLM._from_config(config)
    hf.config._attn_implementation = "sdpa"
    with pytest.raises(UserError, match="--packing: .*'bloom', which take no positions"):
        prepare_packing(hf)


def test_other_layers_are_refused(make_policy):
    hf = AutoModelForCausalLM.from_pretrained(make_policy("qwen2"))
    hf.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match="'qwen2', which have layers without attention"):
        prepare_packing(hf)


def test_the_attention_is_put_back_and_not_saved(make_policy, sequences_of, tmp_path):
    folder = folder_of(make_policy, "llama")
    model = load_policy(
        str(folder), "--model", dtype=torch.float32, tokenizer=load_tokenizer(str(folder)), packing=True
    )
    with unpacked(model):
        assert (model.packing, model.hf.config._attn_implementation) == (False, "sdpa")
    assert (model.packing, model.hf.config._attn_implementation) == (True, IN_PIECES)
    model.hf.save_pretrained(tmp_path)
    assert IN_PIECES not in (tmp_path / "config.json").read_text()


def test_attention_in_pieces_wants_to_know_them():
    # A model that does not hand the pieces on must not be taken for one row.
    q = torch.ones(1, 1, 2, 4)
    with pytest.raises(TypeError, match="pieces"):
        attend_in_pieces(torch.nn.Module(), q, q, q, None)
