"""States that wait until a drafter reads them, against a twin that copies all at once; and drafters with many."""

import weakref

import pytest
import torch
from decoding import assert_same, decoder_of, finish, plainly
from hypothesis import given, settings
from hypothesis import strategies as st
from random_backbones import Model
from test_paying import MADE
from tiny_models import DIMENSIONS

from foretell.drafting import waiting
from foretell.drafting.waiting import WaitingStates
from foretell.requests import SamplingParams

calls = st.tuples(st.sampled_from(["add", "add", "keep"]), st.integers(0, 2), st.integers(0, 100))


@settings(max_examples=100, deadline=None)
@given(st.lists(calls, max_size=30), st.integers(2, 9))
def test_states_wait_in_the_order_in_which_they_came(made: list[tuple[str, int, int]], steps: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(waiting, "STEPS", steps)
        check_waiting(made)


def check_waiting(made: list[tuple[str, int, int]]) -> None:
    states, twin = WaitingStates(), [torch.empty(2, 0, 3) for _ in range(3)]
    for call, row, number in made:
        if call == "add":
            streams = list(torch.rand(2, number + 7, 3))
            states.add(row, streams, 4, number)
            twin[row] = torch.cat([twin[row], torch.stack(streams)[:, 4 : 4 + number]], 1)
        else:
            states.keep(row, number)
            twin[row] = twin[row][:, :number]
        for each, held in enumerate(twin):
            assert states.count(each) == held.shape[1]
            assert not held.shape[1] or states.of(each).equal(held)


def test_tensors_of_a_step_are_let_go_and_copies_are_not_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "STEPS", 4)
    states, steps, copied = WaitingStates(), list[weakref.ref[torch.Tensor]](), list[int]()
    joined = waiting._joined
    monkeypatch.setattr(waiting, "_joined", lambda parts: copied.append(sum(n for *_, n, _ in parts)) or joined(parts))
    for _ in range(23):
        streams = list(torch.rand(2, 5, 3))
        steps += map(weakref.ref, streams)
        states.add(0, streams, 1, 2)
        del streams
    assert [step() is None for step in steps] == [True] * 2 * 20 + [False] * 2 * 3
    assert copied == [8] * 5
    whole = states.of(0)
    states.keep(0, 3)
    kept, _ = states._rows[0]
    assert states.of(0).equal(whole[:, :3])
    assert kept[0][0].untyped_storage().nbytes() == 2 * 3 * 3 * 4  # and not all that waited


@pytest.mark.parametrize("method", ["hydra++", "kangaroo"])
def test_many_states_are_read_though_no_draft_needs_them(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Model({"model_type": "llama", **DIMENSIONS}).build()
    monkeypatch.setattr(waiting, "MOST_BYTES", 20 * 4 * backbone.config.hidden)
    drafter = MADE[method](backbone, lambda rows, context, *_: 6 if context > 60 else 1)
    decoder = decoder_of(backbone, drafter, max_rows=2)
    requests = [([1 + i, 2, 3], SamplingParams(max_new_tokens=80, ignore_eos=True)) for i in range(3)]
    most = 0
    for prompt, params in requests:
        decoder.submit(prompt, params)
    while decoder.busy:
        decoder.step()
        held = decoder.drafter._waiting if method == "kangaroo" else decoder.drafter._prefix._waiting
        most = max(most, *(held.count(row) for row in range(2)))
    assert 5 <= most <= 20  # of one stream or several
    assert_same(finish(decoder, requests), plainly(backbone, requests))


@pytest.mark.parametrize("method", ["hydra++", "kangaroo"])
def test_the_size_of_a_tree_depends_on_what_must_be_read_and_what_is_left(method: str) -> None:
    """Where a long prompt is not worth reading for the few tokens that are left, it stays unread."""
    backbone, asked = Model({"model_type": "llama", **DIMENSIONS}).build(), list[tuple[int, int, float]]()

    def size(rows: int, context: int, unread: int = 0, left: float = 0, share: float = 1) -> int:
        asked.append((rows, unread, left))
        return 1 if len(asked) < 4 else 6

    requests = [([*range(1, 21)], SamplingParams(max_new_tokens=16, ignore_eos=True))]
    outputs = finish(decoder_of(backbone, MADE[method](backbone, size)), requests)
    assert_same(outputs, plainly(backbone, requests))
    assert asked[:4] == [(1, 19 + step, 16 - step) for step in range(4)]
    for (_, unread, left), (_, _, before) in zip(asked[4:], asked[3:], strict=False):
        assert unread == before - left
    assert outputs[0].statistics.suspended_steps == 3
