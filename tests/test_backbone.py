"""Canonical arithmetic: what a token computes depends on its position and its path, never on its company.

Everything the engine promises rests on this file. Each property holds bit for bit, for every compiled build that
this processor has and for the eager modules, in float32 and bfloat16, over random models, trees and batches. The
numbers themselves are held against the eager twin and against transformers.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from random_backbones import (
    BF16,
    COMPILED,
    DTYPES,
    FP32,
    KERNELS,
    LENGTHS,
    Batch,
    Model,
    batches,
    build,
    check,
    models,
    nodes_compute_what_they_do_alone,
    one_by_one,
    prefilled,
    run,
    same,
    using,
)  # fmt: skip
from tiny_models import DIMENSIONS, ROPES, VARIANTS, tiny_model
from torch.nn import functional as F

from foretell.backbone import SKIP_ATTENTION, SKIP_MLP, Adapters, Backbone, Beside, Nodes
from foretell.backbone.cpu import library
from foretell.backbone.eager.backbone import BLOCK, attend
from foretell.backbone.probe import probe
from foretell.drafting.kernels import adapters_of
from foretell.errors import ForetellError
from foretell.loading.families import model_config
from foretell.trees import TokenTree, chain

every_kernel = pytest.mark.parametrize("kernel", KERNELS)
compiled_only = pytest.mark.parametrize("kernel", COMPILED)
LLAMA = Model({"model_type": "llama", **DIMENSIONS})


# -- exactness ------------------------------------------------------------------------------------------------------


@every_kernel
def test_a_node_in_a_batch_of_trees_computes_what_it_does_alone(kernel: str) -> None:
    def holds(model: Model, dtype: torch.dtype, batch: Batch, chunk: int, threads: int) -> None:
        nodes_compute_what_they_do_alone(kernel, model, dtype, batch, chunk, threads)

    chunks = st.sampled_from([1, 3, 16, 33, 1000])
    check(kernel, 30, holds, models(), DTYPES, batches(), chunks, st.sampled_from([1, 2]))


@every_kernel
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_tree_may_be_deeper_than_the_window(kernel: str, dtype: torch.dtype, threads: int) -> None:
    model = Model({"model_type": "mistral", **DIMENSIONS, "sliding_window": 1})
    tree = TokenTree((-1, 0, 0, *range(2, 36)))  # below node 2 no key that is seen lies at the index of its slot
    nodes_compute_what_they_do_alone(kernel, model, dtype, Batch([tree], [30], [0]), 1000, threads)


@every_kernel
def test_a_prompt_reads_the_same_in_any_chunks(kernel: str) -> None:
    def holds(model: Model, dtype: torch.dtype, length: int, chunk: int) -> None:
        backbone = model.build(kernel, dtype)
        tokens = torch.randint(backbone.config.vocab, (length + 1,), generator=torch.Generator().manual_seed(1))
        whole, hidden = prefilled(backbone, tokens)
        slow, streams = one_by_one(backbone, tokens)
        chunked, parts = backbone.new_cache(1, length + 1), []
        for start in range(0, length + 1, chunk):
            part = tokens[start : start + chunk]
            parts.append(run(backbone, part, Nodes.chains([0], [start], [len(part)]), chunked))
            chunked.commit([0], [range(len(part))])
        assert same(hidden, streams)
        assert same(torch.cat(parts), streams)
        for keys_or_values in (0, 1):
            assert same(whole.read(0)[keys_or_values], slow.read(0)[keys_or_values])
            assert same(chunked.read(0)[keys_or_values], slow.read(0)[keys_or_values])

    check(kernel, 20, holds, models(), DTYPES, LENGTHS, st.integers(1, 70))


@every_kernel
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("share", [9, 16])
def test_many_query_heads_share_one_key_head(kernel: str, dtype: torch.dtype, share: int) -> None:
    model = Model(LLAMA.raw | {"num_attention_heads": share, "num_key_value_heads": 1, "head_dim": 8})
    tree = TokenTree((-1, 0, 0, 1, 2, 2, 4))
    batch = Batch([tree, tree], [40, 3], [1, 0])
    with using(kernel):
        backbone = model.build(kernel, dtype)
        _, hidden = batch.together(backbone)
        for row in (0, 1):
            for path, _, streams in batch.alone(backbone, row):
                assert same(hidden[row][path], streams)


@compiled_only
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_a_lone_query_attends_as_in_company(kernel: str, dtype: torch.dtype, head_dim: int) -> None:
    """A few queries take their keys in place where many have them packed."""
    model = Model(LLAMA.raw | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": head_dim})
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(40, 6, head_dim, generator=generator).to(dtype)
    with using(kernel):
        backbone: Any = model.build(kernel, dtype)
        cache = backbone.new_cache(2, 200)
        for tensor in (cache.keys, cache.values):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        for length in (0, 1, 30, 31, 32, 63, 64, 100, 150):
            together = backbone.attention(queries, Nodes.chains([1], [length], [40]), cache)
            for node in (0, 1, 2, 33, 39):
                alone = backbone.attention(queries[node : node + 1], Nodes.chains([1], [length + node], [1]), cache)
                assert same(alone[0], together[node])


@every_kernel
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_number_of_threads_changes_no_bit(kernel: str, dtype: torch.dtype) -> None:
    batch = Batch([TokenTree((-1, 0, 0, 1, 2, 2, 4)), chain(20)], [70, 33], [0, 2])
    with using(kernel):
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)  # what the eager modules go by; `using` puts it back
            backbone = LLAMA.build(kernel, dtype, threads)
            cache, hidden = batch.together(backbone)
            states = backbone.norm(torch.cat(hidden))
            results.append((states, backbone.logits(states), backbone.argmax(states), cache.read(0)[0]))
        for other in results[1:]:
            assert all(same(a, b) for a, b in zip(results[0], other, strict=True))


# -- opened layers --------------------------------------------------------------------------------------------------


@every_kernel
def test_layers_run_in_parts_are_layers_run_at_once(kernel: str) -> None:
    """Split anywhere, taps on the way, and a second start from the stored stream half-way up."""

    def holds(model: Model, dtype: torch.dtype, batch: Batch) -> None:
        backbone = model.build(kernel, dtype)
        layers = backbone.config.layers
        cache, nodes = batch.prefill(backbone), batch.nodes()
        hidden = backbone.embed(torch.cat(batch.tokens(backbone.config.vocab)[1]))
        before = hidden.clone()
        top, taps = backbone.run_layers(hidden, nodes, cache, taps=range(layers + 1))
        assert same(hidden, before)  # the input is left as it is
        assert same(taps[0], hidden)
        assert same(taps[layers], top)
        whole = cache.keys.clone(), cache.values.clone()
        for layer in range(layers + 1):
            cache = batch.prefill(backbone)
            lower, _ = backbone.run_layers(hidden, nodes, cache, 0, layer)
            assert same(lower, taps[layer])
            upper, more = backbone.run_layers(lower, nodes, cache, layer, taps=[layer, layers])
            assert same(upper, top)
            assert same(more[layer], lower)
            assert same(more[layers], top)
            for tensor, expected in zip((cache.keys, cache.values), whole, strict=True):
                for slot, end in zip(batch.slots, nodes.ends, strict=True):
                    begin = cache.start(slot)
                    assert same(tensor[:, :, begin : begin + end], expected[:, :, begin : begin + end])

    check(kernel, 20, holds, models(), DTYPES, batches())


@every_kernel
def test_a_tree_grown_level_by_level_is_the_tree_run_at_once(kernel: str) -> None:
    """`first`: earlier nodes have left their keys and values in the cache."""

    def holds(model: Model, dtype: torch.dtype, batch: Batch, data: st.DataObject) -> None:
        backbone = model.build(kernel, dtype)
        _, whole = batch.together(backbone)
        cache, guesses = batch.prefill(backbone), batch.tokens(backbone.config.vocab)[1]
        grown: list[list[torch.Tensor]] = [[] for _ in batch.trees]
        first = [0] * len(batch.trees)
        while any(done < len(tree) for done, tree in zip(first, batch.trees, strict=True)):
            rows = [b for b, tree in enumerate(batch.trees) if first[b] < len(tree)]
            ends = {b: data.draw(st.integers(first[b] + 1, len(batch.trees[b])), "nodes") for b in rows}
            part = [TokenTree(batch.trees[b].parents[: ends[b]]) for b in rows]
            nodes = Nodes(
                part, [batch.slots[b] for b in rows], [batch.lengths[b] for b in rows], [first[b] for b in rows]
            )
            tokens = torch.cat([guesses[b][first[b] : ends[b]] for b in rows])
            for b, states in zip(rows, run(backbone, tokens, nodes, cache).split(nodes.counts), strict=True):
                grown[b].append(states)
                first[b] = ends[b]
        for b, states in enumerate(whole):
            assert same(torch.cat(grown[b]), states)

    check(kernel, 20, holds, models(), DTYPES, batches(), st.data())


@every_kernel
def test_positions_may_be_given(kernel: str) -> None:
    with using(kernel):
        for dtype in (FP32, BF16):
            backbone = LLAMA.build(kernel, dtype)
            tokens = torch.arange(30)
            _, usual = prefilled(backbone, tokens)

            def at(positions: torch.Tensor, backbone: Backbone = backbone, tokens: Any = tokens) -> torch.Tensor:
                nodes = Nodes([chain(29)], [0], [0], positions=positions)
                return run(backbone, tokens, nodes, backbone.new_cache(1, 30))

            assert same(at(torch.arange(30)), usual)
            assert not same(at(torch.arange(30) * 2), usual)
            if dtype == FP32:  # a rotary embedding sees differences of positions only
                torch.testing.assert_close(at(torch.arange(30) + 17), usual, atol=1e-4, rtol=1e-4)


@every_kernel
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_skipping_every_sublayer_is_the_identity_and_writes_nothing(kernel: str, dtype: torch.dtype) -> None:
    with using(kernel):
        backbone = LLAMA.build(kernel, dtype)
        hidden = torch.randn(5, backbone.config.hidden)
        cache, nodes = backbone.new_cache(1, 5), Nodes([chain(4)], [0], [0])
        cache.keys.fill_(7)
        cache.values.fill_(7)
        both = bytes([SKIP_ATTENTION | SKIP_MLP] * 3)
        assert same(backbone.run_layers(hidden, nodes, cache, skip=both)[0], hidden)
        attention = bytes([SKIP_ATTENTION] * 3)
        assert not same(backbone.run_layers(hidden, nodes, cache, skip=attention)[0], hidden)
        assert (cache.keys == 7).all()
        assert (cache.values == 7).all()
        nothing, _ = backbone.run_layers(hidden, nodes, cache, skip=bytes(3))
        assert same(nothing, backbone.run_layers(hidden, nodes, cache)[0])


# -- against slower and other computations --------------------------------------------------------------------------


@compiled_only
def test_the_compiled_step_is_close_to_the_eager_one(kernel: str) -> None:
    def holds(model: Model, dtype: torch.dtype, batch: Batch, plan: list[int]) -> None:
        fast, slow = model.build(kernel, dtype), model.build("eager", dtype)
        guesses = torch.cat(batch.tokens(fast.config.vocab)[1])
        skip = bytes(plan[: fast.config.layers])
        results = []
        for backbone in (fast, slow):
            cache = batch.prefill(backbone)
            hidden = run(backbone, guesses, batch.nodes(), cache, skip=skip)
            results.append((hidden, backbone.norm(hidden), backbone.logits(backbone.norm(hidden))))
        for ours, theirs in zip(*results, strict=True):
            # weights keep lengths, so numbers are of order one; the few of a tiny vocabulary may all be near zero
            error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)
            assert error < (1e-4 if dtype == FP32 else 0.1)

    plans = st.lists(st.integers(0, 3), min_size=3, max_size=3) | st.just([0, 0, 0])
    # the norm of a few numbers that nearly cancel would magnify any difference
    check(kernel, 25, holds, models(least=24), DTYPES, batches(), plans)


@compiled_only
def test_attention_alone_is_close_to_its_twin(kernel: str) -> None:
    def holds(model: Model, dtype: torch.dtype, batch: Batch) -> None:
        fast = model.build(kernel, dtype)
        c, nodes = fast.config, batch.nodes()
        cache = fast.new_cache(len(batch.trees) + 1, max(nodes.ends))
        generator = torch.Generator().manual_seed(batch.seed)
        for tensor in (cache.keys, cache.values):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        queries = torch.randn(len(nodes), c.heads, c.head_dim, generator=generator).to(dtype)
        ours = fast.attention(queries, nodes, cache).float()  # type: ignore[attr-defined]
        starts_M = torch.tensor([cache.start(nodes.rows[sequence]) for sequence in nodes.sequence])
        _, paths_MT = nodes.on(torch.device("cpu"), BLOCK)
        theirs = attend(queries, cache.keys[0], cache.values[0], starts_M, paths_MT, c.windows[0])
        torch.testing.assert_close(
            ours, theirs, atol=1e-5 if dtype == FP32 else 2e-2, rtol=1e-5 if dtype == FP32 else 2e-2
        )

    check(kernel, 40, holds, models(layers=1), DTYPES, batches(most=64))


def test_the_twin_of_attention_is_a_plain_softmax() -> None:
    """One row, written out: scores over its own path, the last `window` of it."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 40, 8, generator=generator) for _ in range(2))
    queries, tree = torch.randn(5, 4, 8, generator=generator), TokenTree((-1, 0, 0, 1, 2))
    _, paths_MT = Nodes([tree], [1], [10]).on(torch.device("cpu"), BLOCK)
    mixed = attend(queries, keys, values, torch.full((5,), 20), paths_MT, 4)
    for node in range(5):
        slots = [*range(10), *(10 + i for i in tree.path(node))][-4:]
        for head in range(4):
            weights = (keys[head // 2, 20:][slots] @ queries[node, head] / 8**0.5).softmax(0)
            torch.testing.assert_close(mixed[node, head], weights @ values[head // 2, 20:][slots])


@every_kernel
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(kernel: str, variant: str) -> None:
    assert_like_transformers(kernel, VARIANTS[variant])


@pytest.mark.parametrize("rope", ROPES)
def test_logits_under_scaled_ropes_are_those_of_transformers(rope: str) -> None:
    assert_like_transformers(KERNELS[0], {"model_type": "llama", "rope_parameters": dict(ROPES[rope])})


def assert_like_transformers(kernel: str, changes: dict[str, Any]) -> None:
    """Over 40 tokens: several times the window of the models that have one."""
    model = tiny_model(**changes)
    tokens = torch.randint(64, (40,), generator=torch.Generator().manual_seed(3))
    with using(kernel), torch.no_grad():
        ours = build(model_config(model.config), dict(model.state_dict()), kernel, FP32, 2)
        logits = ours.logits(ours.norm(prefilled(ours, tokens)[1]))
        theirs = model(tokens[None]).logits[0]
    torch.testing.assert_close(logits, theirs, atol=1e-4, rtol=1e-4)


# -- which build


@pytest.mark.skipif(len(COMPILED) < 2, reason="needs two builds")
def test_a_backbone_keeps_its_build_when_another_is_loaded() -> None:
    """Builds may differ in their bits: switching one under a half-filled cache would break the promise."""
    batch = Batch([chain(5)], [40], [0])

    def logits(backbone: Backbone) -> tuple[torch.Tensor, str]:
        """And which build's code ran last, as that code itself says."""
        found = backbone.logits(backbone.norm(batch.together(backbone)[1][0]))
        return found, library.require().foretell_last_build().decode()

    with using(COMPILED[-1]):
        first = LLAMA.build(COMPILED[-1], BF16)
        before, ran_before = logits(first)
    with using(COMPILED[0]):
        second = LLAMA.build(COMPILED[0], BF16)
        _, ran_between = logits(second)
        after, ran_after = logits(first)
    assert (ran_before, ran_between, ran_after) == (COMPILED[-1], COMPILED[0], COMPILED[-1])
    assert same(before, after)


def test_kernels_that_this_processor_lacks_are_not_found() -> None:
    assert library.find("mmx") is None
    assert not COMPILED or library.default().name == COMPILED[0]
    best = library.find()
    assert (best.name if best else None) == next((name for name in library.BUILDS if library.find(name)), None)


@pytest.mark.skipif(len(COMPILED) < 2, reason="needs two builds")
def test_two_builds_run_side_by_side_in_threads() -> None:
    batch = Batch([TokenTree((-1, 0, 0, 1, 1, 2))], [40], [0])
    backbones = []
    for kernel in (COMPILED[0], COMPILED[-1]):
        with using(kernel):
            backbones.append(LLAMA.build(kernel, BF16))

    def states(backbone: Backbone) -> torch.Tensor:
        return batch.together(backbone)[1][0]

    truth = [states(backbone) for backbone in backbones]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(states, backbones * 40))
    assert all(same(each, truth[i % 2]) for i, each in enumerate(found))


@pytest.mark.slow
@pytest.mark.skipif(not COMPILED or not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_what_its_parent_did() -> None:
    """The parent's team of threads does not come along."""
    code = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from random_backbones import BF16, Batch, Model, chain
from tiny_models import DIMENSIONS
backbone = Model({"model_type": "llama", **DIMENSIONS}).build("", BF16, threads=3)
batch = Batch([chain(5)], [40], [0])
before = batch.together(backbone)[1][0]
child = os.fork()
if not child:
    signal.alarm(20)
    same = (batch.together(backbone)[1][0] == before).all()
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert (batch.together(backbone)[1][0] == before).all()
"""
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr


def test_damaged_weights_are_refused_at_load() -> None:
    weights = LLAMA.weights()
    weights["model.norm.weight"][3] = float("nan")
    with using(""), pytest.raises(ForetellError, match="not finite"):
        probe(build(LLAMA.config, weights))
    backbone = build(LLAMA.config, weights)
    assert backbone.argmax(torch.full((2, DIMENSIONS["hidden_size"]), float("nan"))).tolist() == [-1, -1]


@every_kernel
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("rank", [5, 64])
def test_adapters_draw_their_own_rows_ahead_and_no_other(kernel: str, dtype: torch.dtype, rank: int) -> None:
    """Layer by layer as by hand; the rows that go through none keep their bits, whoever else is in the pass.

    More rows than a tile has, and matrices in eight bits where drafts have them so.
    """
    with using(kernel):
        star = TokenTree((-1, *[0] * 40))
        backbone, batch = LLAMA.build(kernel, dtype), Batch([star, chain(3)], [40, 3], [1, 0])
        layers, d = backbone.config.layers, backbone.config.hidden
        generator = torch.Generator().manual_seed(rank)
        down_Lrd, up_Ldr = (torch.randn(2, *of, generator=generator) / 4 for of in ((rank, d), (d, rank)))
        adapters = adapters_of(backbone, down_Lrd, up_Ldr, layers - 2)
        rows_N = torch.tensor([*range(3, 41), 44])  # leaves, which nothing attends to
        nodes, caches = Nodes(batch.trees, batch.slots, batch.lengths), [batch.prefill(backbone) for _ in range(3)]
        entered = by_hand = torch.randn(len(nodes), d, generator=generator)
        plain, _ = backbone.run_layers(entered, nodes, caches[2], layers - 2)
        ours, taps = backbone.run_layers(
            entered, nodes, caches[0], layers - 2, taps=[layers - 1], beside=Beside(adapters, rows_N)
        )
        for index, (down, up) in zip((layers - 2, layers - 1), adapters.linears, strict=True):
            x_Nd = by_hand[rows_N]
            x_Nd = x_Nd / (x_Nd.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            after, _ = backbone.run_layers(by_hand, nodes, caches[1], index, index + 1)
            by_hand = after.index_add(0, rows_N, up(F.silu(down(x_Nd))))
            torch.testing.assert_close(taps.get(index + 1, ours), by_hand, rtol=2e-2, atol=5e-2)
        others = torch.ones(len(nodes), dtype=torch.bool)
        others[rows_N] = False
        assert same(ours[others], plain[others])
        assert not torch.allclose(ours[rows_N], plain[rows_N], atol=0.1)


@every_kernel
def test_adapters_that_do_not_fit_are_refused(kernel: str) -> None:
    with using(kernel):
        backbone, batch = LLAMA.build(kernel, FP32), Batch([chain(3)], [4], [0])
        d, layers = backbone.config.hidden, backbone.config.layers
        nodes, cache, hidden = (
            Nodes(batch.trees, batch.slots, batch.lengths),
            batch.prefill(backbone),
            torch.zeros(4, d),
        )
        pair = (backbone.linear(torch.ones(3, d), None), backbone.linear(torch.ones(d, 3), None))
        run = partial(backbone.run_layers, hidden, nodes, cache, layers - 1)
        with pytest.raises(ValueError, match=f"Adapters lie beside layers 0 to 1, not {layers - 1} to {layers}"):
            run(beside=Beside(backbone.adapters([pair]), torch.tensor([3])))
        for rows in ([4], [-1], [2, 2], [3, 1], [[2], [2]], [1.0]):
            with pytest.raises(ValueError, match="The rows with adapters are those of the pass, ascending"):
                run(beside=Beside(backbone.adapters([pair] * layers), torch.tensor(rows)))


@compiled_only
def test_adapters_of_other_shapes_and_kernels_are_refused(kernel: str) -> None:
    """Native code cannot see that a matrix is larger than it should be."""
    with using(kernel):
        backbone, other = LLAMA.build(kernel, FP32), LLAMA.build(kernel, FP32)
        d, layers = backbone.config.hidden, backbone.config.layers
        pairs = [(backbone.linear(torch.ones(r, d), None), backbone.linear(torch.ones(d, r), None)) for r in (3, 4)]
        rounded = LLAMA.build(kernel, BF16).linear(torch.ones(3, d), None), pairs[0][1]
        biased = backbone.linear(torch.ones(3, d), torch.ones(3)), pairs[0][1]
        for odd in ([pairs[0][::-1]], pairs, [biased]):
            with pytest.raises(ValueError, match=f"Adapters lead from {d} numbers to one rank and back, unbiased"):
                backbone.adapters(odd)
        for foreign in ([rounded], [(None, None)]):
            with pytest.raises(ValueError, match="Adapters are of the backbone's own kernels"):
                backbone.adapters(foreign)
        for begin, some in ((layers, pairs[:1]), (-1, pairs[:1]), (0, [])):
            with pytest.raises(ValueError, match=f"Adapters lie beside some of the {layers} layers"):
                backbone.adapters(some, begin)
        batch = Batch([chain(3)], [4], [0])
        nodes, cache, hidden = (
            Nodes(batch.trees, batch.slots, batch.lengths),
            batch.prefill(backbone),
            torch.zeros(4, d),
        )
        for theirs in (other.adapters(pairs[:1] * layers), Adapters(pairs[:1] * layers, 0)):
            with pytest.raises(ValueError, match="Adapters are of the backbone that runs"):
                backbone.run_layers(hidden, nodes, cache, beside=Beside(theirs, torch.tensor([3])))
