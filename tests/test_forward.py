"""The plain forward pass of training: as near to the exact states as decoding's own pass is, and no nearer is asked.

Exact are the states that decoding computes in float32 from the same weights. Where weights are bfloat16, decoding
rounds on its way too: how far it then lies from the exact states is the noise of the number type, and the plain pass
may lie as far, but for a share of chance.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from random_backbones import BF16, FP32, Model, build, check, examples, models, prefilled
from test_real import QUESTIONS, backbone_of
from torch import Tensor

from foretell.backbone import Backbone, Nodes
from foretell.contracts import FINAL_NORM
from foretell.loading import Tokenizer
from foretell.train import forward as forwarding
from foretell.train.data import Distilled
from foretell.train.features import TEACHER, ComputedFeatures, side_by_side
from foretell.train.forward import Forward, most_probable

pytestmark = pytest.mark.usefixtures("one_thread")

NOISE = 2.0**-9
"""The mean relative error of rounding to bfloat16 is at most this."""

Talks = list[list[int]]


def canonical(backbone: Backbone, tokens: Sequence[int], taps: Sequence[int]) -> dict[int, Tensor]:
    """States [T, d] of a conversation by decoding's own pass."""
    cache = backbone.new_cache(1, len(tokens))
    nodes = Nodes.chains([0], [0], [len(tokens)])
    layers = [tap for tap in taps if tap != FINAL_NORM]
    hidden, states = backbone.run_layers(backbone.embed(torch.tensor(tokens)), nodes, cache, taps=layers)
    return states | {FINAL_NORM: backbone.norm(hidden)}


def padded(talks: Talks) -> Tensor:
    return side_by_side([Distilled(i, tokens, []) for i, tokens in enumerate(talks)])[0]


def every_tap(backbone: Backbone) -> list[int]:
    return [*range(backbone.config.layers + 1), FINAL_NORM]


def apart(found: Tensor, truth: Tensor) -> float:
    """Distance relative to the norm of the truth, token by token, in the mean."""
    error_T, norm_T = (found.double() - truth.double()).norm(dim=-1), truth.double().norm(dim=-1)
    return float((error_T / norm_T.clamp_min(1e-3 * float(norm_T.max()) + 1e-30)).mean())


def mean_distance(states: list[dict[int, Tensor]], truth: list[dict[int, Tensor]], tap: int) -> float:
    return apart(torch.cat([each[tap] for each in states]), torch.cat([each[tap] for each in truth]))


def unpadded(states: dict[int, Tensor], talks: Talks) -> list[dict[int, Tensor]]:
    return [
        {tap: states_BTd[row, : len(tokens)] for tap, states_BTd in states.items()} for row, tokens in enumerate(talks)
    ]


@st.composite
def some_talks(draw: st.DrawFn, vocab: int) -> Talks:
    """A ragged batch; conversations of one token and some around the edges of windows among them."""
    lengths = draw(st.lists(st.integers(1, 70) | st.sampled_from([1, 2, 32, 33, 64]), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Model, Talks]:
    # a norm over one number is its sign: it jumps where the number is near 0
    model = draw(models(least=4))
    return model, draw(some_talks(model.config.vocab))


# --- states -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["", "eager"], ids=["compiled", "eager"])
def test_in_float32_every_state_is_decodings(kernel: str) -> None:
    """Sums in another order: a few of float32's 24 bits, grown through three layers, so 1e-4 of a state is ample."""

    def property_(case: tuple[Model, Talks]) -> None:
        model, talks = case
        backbone = model.build(kernel)
        taps = every_tap(backbone)
        found = Forward(backbone).states(padded(talks), taps)
        assert found.keys() == set(taps)
        for states, tokens in zip(unpadded(found, talks), talks, strict=True):
            truth = canonical(backbone, tokens, taps)
            for tap in taps:
                assert states[tap].dtype == FP32
                error_T, norm_T = (states[tap] - truth[tap]).norm(dim=-1), truth[tap].norm(dim=-1)
                assert (error_T <= 1e-4 * norm_T + 1e-5).all(), tap

    check(kernel, 60, property_, cases())


@pytest.mark.parametrize("product", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", ["", "eager"], ids=["compiled", "eager"])
def test_in_bfloat16_states_are_as_near_as_decodings(kernel: str, product: str) -> None:
    def property_(case: tuple[Model, Talks]) -> None:
        model, talks = case
        assume(model.config.hidden >= 8)  # of fewer numbers the rounding of one is no mean
        rounded = {name: weight.bfloat16().float() for name, weight in model.weights().items()}
        exact, backbone = build(model.config, rounded, kernel), build(model.config, rounded, kernel, BF16)
        taps = every_tap(backbone)
        forward = Forward(backbone, product)
        assert forward.dtype == getattr(torch, product)
        states = unpadded(forward.states(padded(talks), taps), talks)
        truth, decoded = ([canonical(each, tokens, taps) for tokens in talks] for each in (exact, backbone))
        for tap in taps:
            noise = mean_distance(decoded, truth, tap)
            assert mean_distance(states, truth, tap) <= 2 * noise + NOISE, tap
            assert mean_distance(states, decoded, tap) <= 3 * noise + NOISE, tap

    check(kernel, 40, property_, cases())


@examples(15)
@given(cases(), st.data())
def test_a_state_does_not_depend_on_which_others_are_asked_for(case: tuple[Model, Talks], data: st.DataObject) -> None:
    model, talks = case
    forward = Forward(model.build())
    taps = every_tap(forward.backbone)
    every = forward.states(padded(talks), taps)
    asked = data.draw(st.lists(st.sampled_from(taps), unique=True))
    some = forward.states(padded(talks), asked)
    assert some.keys() == set(asked)
    assert all(torch.equal(some[tap], every[tap]) for tap in asked)


def test_layers_above_the_highest_tap_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, ran = Forward(Model({"model_type": "llama", **SIZES}).build()), list[int]()
    run = forward.run_layer
    monkeypatch.setattr(forward, "run_layer", lambda index, *rest: (ran.append(index), run(index, *rest))[1])
    for taps, layers in (([0], []), ([1], [0]), ([2, 0], [0, 1]), ([], []), ([FINAL_NORM], [0, 1, 2])):
        ran.clear()
        forward.states(padded([[1, 2, 3]]), taps)
        assert ran == layers


# --- the teacher --------------------------------------------------------------------------------------------

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip


@examples(60)
@given(
    st.integers(4, 70), st.integers(2, 150) | st.integers(800, 1500), st.integers(1, 40), st.integers(1, TEACHER),
    st.sampled_from([0.1, 1.0, 4.0]), st.booleans(), st.sampled_from([FP32, BF16]), st.sampled_from([1, 3000, 1 << 24]),
    st.integers(0, 99),
)  # fmt: skip
def test_the_most_probable_next_tokens_are_those_of_the_whole_softmax(
    width: int, vocab: int, positions: int, m: int, size: float, tied: bool, dtype: torch.dtype, at_once: int, seed: int
) -> None:
    """A logit that is rounded is off by so much, and every probability by a factor of e to that."""
    sizes = SIZES | {
        "hidden_size": width,
        "vocab_size": vocab,
        "num_hidden_layers": 1,
        "head_dim": 8,
        "tie_word_embeddings": tied,
    }
    model, m = Model({"model_type": "llama", **sizes}, seed=seed), min(m, vocab)
    rounded = {name: weight.to(dtype).float() for name, weight in model.weights().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(forwarding.LOGITS, "cpu", at_once)
        forward = Forward(build(model.config, rounded, dtype=dtype), str(dtype).removeprefix("torch."))
        states_Pd = (size * torch.randn(positions, width, generator=torch.Generator().manual_seed(seed))).to(dtype)
        ids_Pm, p_Pm = forward.most_probable_next(states_Pd, m)
    head_Vd = rounded["model.embed_tokens.weight" if tied else "lm_head.weight"]
    logits_PV = states_Pd.double() @ head_Vd.double().T
    largest = float(logits_PV.abs().max())
    half_a_unit = math.ldexp(1.0, math.frexp(largest)[1] - 9)  # of the last bit of a bfloat16
    off = (half_a_unit if dtype == BF16 else 1e-5 * largest) + 1e-6
    assert ids_Pm.dtype == torch.int64
    assert p_Pm.dtype == FP32
    assert ids_Pm.shape == p_Pm.shape == (positions, m)
    assert all(len(set(row)) == m for row in ids_Pm.tolist())
    assert (p_Pm.diff() <= 0).all()
    assert (p_Pm.sum(-1) <= 1 + 1e-5).all()
    truth = logits_PV.softmax(-1).gather(-1, ids_Pm)
    torch.testing.assert_close(p_Pm.double(), truth, rtol=math.expm1(off), atol=1e-12)
    best, found = logits_PV.topk(m).values, logits_PV.gather(-1, ids_Pm)
    assert (found >= best - 2 * off).all()  # tokens as probable as one another may be left out for each other
    assert (found.diff() <= 1e-5 * logits_PV.abs().max() + 1e-6).all()  # but what is found is in order


@given(st.integers(1, 9), st.integers(1, 900), st.integers(1, 20), st.integers(0, 99))
def test_the_most_probable_tokens_are_those_of_a_whole_sort(rows: int, vocab: int, count: int, seed: int) -> None:
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    count = min(count, vocab)
    values, ids = most_probable(logits, count)
    assert torch.equal(values, logits.sort(descending=True).values[:, :count])
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == count for row in ids.tolist())


# --- the demo model -----------------------------------------------------------------------------------------


def real_talks(folder: Path) -> list[Distilled]:
    """Questions and what the model answers, its most probable tokens."""
    tokenizer, backbone, found = Tokenizer.from_folder(folder), backbone_of(folder, "bf16"), list[Distilled]()
    for line, question in enumerate(QUESTIONS):
        prompt = tokenizer.chat([{"role": "user", "content": question}])
        cache, tokens = backbone.new_cache(1, len(prompt) + 24), list(prompt)
        unread = tokens
        for _ in range(24 - 6 * line):
            nodes = Nodes.chains([0], [cache.lengths[0]], [len(unread)])
            hidden, _ = backbone.run_layers(backbone.embed(torch.tensor(unread)), nodes, cache)
            cache.commit([0], [range(len(unread))])
            unread = [int(backbone.logits(backbone.norm(hidden[-1:])).argmax())]
            tokens += unread
        found.append(Distilled(line, tokens, [(len(prompt), len(tokens))]))
    return found


@pytest.mark.real
@pytest.mark.parametrize("product", ["float32", "bfloat16"])
def test_the_demo_models_states_are_as_near_as_decodings(demo_folder: Path, product: str) -> None:
    data = real_talks(demo_folder)
    backbone, exact = backbone_of(demo_folder, "bf16"), backbone_of(demo_folder, "fp32")
    talks, taps = [talk.tokens for talk in data], [0, 1, 8, 15, 22, 29, 30, FINAL_NORM]
    forward = Forward(backbone, product)
    found = unpadded(forward.states(padded(talks), taps), talks)
    truth, decoded = ([canonical(each, tokens, taps) for tokens in talks] for each in (exact, backbone))
    for tap in taps:
        noise = mean_distance(decoded, truth, tap)
        assert mean_distance(found, truth, tap) <= 1.5 * noise + NOISE, tap
        assert mean_distance(found, decoded, tap) <= 2.5 * noise + NOISE, tap


@pytest.mark.real
def test_the_demo_models_teacher_says_what_decoding_says(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How far apart: half the sum of the differences, over the most probable tokens of both."""
    data, backbone, exact = real_talks(demo_folder), backbone_of(demo_folder, "bf16"), backbone_of(demo_folder, "fp32")
    monkeypatch.setattr(ComputedFeatures, "by_decoding", False)
    batch = ComputedFeatures(backbone, data, ()).batch(range(len(data)))
    ours, noise, best = list[Tensor](), list[Tensor](), list[Tensor]()
    for row, talk in enumerate(data):
        for at in range(talk.answers[0][0] - 1, len(talk.tokens) - 1):
            best.append(batch.teacher_ids_BTm[row, at, 0] == talk.tokens[at + 1])
        decoded, truth = (
            each.logits(each.norm(prefilled(each, talk.tokens)[1])).double().softmax(-1) for each in (backbone, exact)
        )
        for at in range(talk.answers[0][0] - 1, len(talk.tokens) - 1):
            ids, p = batch.teacher_ids_BTm[row, at], batch.teacher_p_BTm[row, at].double()
            ours.append((p - truth[at, ids]).abs().sum() / 2)
            noise.append((decoded[at, ids] - truth[at, ids]).abs().sum() / 2)
    assert torch.stack(ours).mean() <= 1.5 * torch.stack(noise).mean() + NOISE
    assert torch.stack(best).float().mean() > 0.95
