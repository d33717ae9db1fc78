"""The products around the layers: embedding rows, the head and its argmax, packed and library linears."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantized import rounded
from random_backbones import BF16, COMPILED, DTYPES, FP32, KERNELS, Model, build, check, examples, models, same, using
from tiny_models import DIMENSIONS

from foretell.backbone.cpu import library
from foretell.backbone.cpu.formats import FORMATS, WITH_BLOCKS, WITH_INT8, PackedMatrix, draft_format
from foretell.backbone.cpu.linear import PackedLinear
from foretell.backbone.eager.linear import Linear
from foretell.drafting.cpu_heads import PackedHeads
from foretell.drafting.kernels import kernels_for
from foretell.loading.blocks import TYPES, Blocks

LLAMA = {"model_type": "llama", **DIMENSIONS}
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
compiled_only = pytest.mark.parametrize("kernel", COMPILED)


@every_kernel
def test_embedding_rows_are_the_weights(kernel: str) -> None:
    def holds(model: Model, dtype: torch.dtype, ids: list[int]) -> None:
        backbone, vocab = model.build(kernel, dtype), model.config.vocab
        tokens = torch.tensor([i % vocab for i in ids])
        assert same(backbone.embed(tokens), model.weights()["model.embed_tokens.weight"].to(dtype).float()[tokens])

    check(kernel, 10, holds, models(), DTYPES, st.lists(st.integers(0, 999), min_size=1, max_size=40))


@every_kernel
def test_argmax_is_the_first_greatest_logit(kernel: str) -> None:
    """Columns of the head are repeated, so that most rows have a tie for the first place."""

    def holds(model: Model, dtype: torch.dtype, rows: int, threads: int, copies: list[int]) -> None:
        weights, vocab = model.weights(), model.config.vocab
        config = replace(model.config, tied=False)
        head = weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"].clone())
        for place in copies:
            head[place % vocab] = head[copies[0] % vocab]
        backbone = build(config, weights, kernel, dtype, threads)
        states = torch.randn(rows, config.hidden, generator=torch.Generator().manual_seed(rows))
        states[0] = 0  # everything ties
        logits = backbone.logits(states)
        best = [row.tolist().index(max(row.tolist())) for row in logits]
        assert backbone.argmax(states).tolist() == logits.argmax(-1).tolist() == best

    places = st.lists(st.integers(0, 200), min_size=2, max_size=60)
    check(kernel, 20, holds, models(layers=1), DTYPES, st.integers(1, 70), st.integers(1, 4), places)


@every_kernel
def test_the_top_outputs_are_those_of_a_stable_sort(kernel: str) -> None:
    def holds(dtype: torch.dtype, rows: int, outputs: int, count: int, threads: int, alike: int) -> None:
        generator = torch.Generator().manual_seed(rows + outputs)
        weight = torch.randn(outputs, 8, generator=generator).to(dtype)
        weight[:: alike + 1] = weight[0].clone()  # ties
        backbone = Model(LLAMA | {"hidden_size": 8}).build(kernel, dtype, threads)
        linear = backbone.linear(weight, torch.zeros(outputs))
        x = torch.randn(rows, 8, generator=generator)
        values, ids = linear.top(x, min(count, outputs))
        order = linear(x).sort(dim=1, descending=True, stable=True)
        assert same(values, order.values[:, : values.shape[1]])
        if kernel != "eager":  # PyTorch's topk does not say which of equals it takes
            assert ids.tolist() == order.indices[:, : values.shape[1]].tolist()
        _, ids = linear.top(torch.full((2, 8), float("nan")), min(count, outputs))
        assert ((ids >= 0) & (ids < outputs)).all()

    sizes = (st.integers(1, 40), st.integers(1, 300), st.integers(1, 40), st.integers(1, 4), st.integers(0, 5))
    check(kernel, 25, holds, DTYPES, *sizes)


@compiled_only
def test_a_packed_linear_multiplies_and_no_row_sees_another(kernel: str) -> None:
    def holds(dtype: torch.dtype, rows: int, inputs: int, outputs: int, biased: bool, threads: int) -> None:
        generator = torch.Generator().manual_seed(rows + inputs)
        weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
        bias = torch.randn(outputs, generator=generator) if biased else None
        x = torch.randn(rows, inputs, generator=generator)
        linear = PackedLinear(weight, bias)
        y = linear(x, threads)
        truth = x.to(dtype).double() @ weight.double().T + (0 if bias is None else bias.double())
        torch.testing.assert_close(y.double(), truth, atol=1e-4, rtol=1e-4)
        assert same(torch.cat([linear(x[i : i + 1], 1) for i in range(rows)]), y)
        assert same(linear.matrix.rows(torch.arange(outputs)), weight.float())

    sizes, rows = st.integers(1, 200), st.integers(1, 80)
    check(kernel, 40, holds, DTYPES, rows, sizes, sizes, st.booleans(), st.integers(1, 3))


@every_kernel
def test_argmax_refuses_rows_whose_logits_are_not_all_finite(kernel: str) -> None:
    """One logit of one row is NaN or infinite, in any panel: -1 for that row, nothing changes for the others."""

    def holds(dtype: torch.dtype, rows: int, vocab: int, place: int, bad: float, threads: int) -> None:
        place %= vocab
        config = replace(Model(LLAMA | {"vocab_size": vocab, "hidden_size": 40}).config, tied=False)
        weights = Model(LLAMA | {"vocab_size": vocab, "hidden_size": 40}).weights()
        backbone = build(config, weights, kernel, dtype, threads)
        states = torch.randn(rows, 40, generator=torch.Generator().manual_seed(rows))
        states[:, 0] = 0
        before = backbone.argmax(states)
        assert (before >= 0).all()
        weights["lm_head.weight"][place, 0] = 1e38  # what the first number of a state multiplies
        damaged = build(config, weights, kernel, dtype, threads)
        row = place % rows
        assert same(damaged.argmax(states), before)
        states[row, 0] = bad
        found = damaged.argmax(states)
        assert not damaged.logits(states)[row, place].isfinite()
        assert found[row] == -1
        assert same(found[:row], before[:row])
        assert same(found[row + 1 :], before[row + 1 :])

    bad = st.sampled_from([1e30, -1e30, float("nan"), float("inf")])
    sizes = st.integers(1, 40), st.integers(1, 300), st.integers(0, 999)
    check(kernel, 25, holds, DTYPES, *sizes, bad, st.integers(1, 4))


@every_kernel
def test_heads_name_guesses_of_their_vocabulary_whatever_they_read(kernel: str) -> None:
    for dtype in (FP32, BF16):
        with using(kernel):
            backbone = Model(LLAMA | {"hidden_size": 8}).build(kernel, dtype, 2)
        block = [(torch.randn(8, 8), torch.zeros(8))]
        for choices, count in ((1, 1), (40, 3), (100, 100)):
            heads = kernels_for(backbone).heads([block], [torch.randn(choices, 8)])
            for bad in (float("nan"), float("inf"), -float("inf"), 3e38):
                store = torch.randn(3, 8)
                store[1, 2] = bad
                _, ids = heads.top(store, [[0], [1], [2]], count)
                assert ((ids >= 0) & (ids < choices)).all()


@every_kernel
@pytest.mark.parametrize("tied", [True, False])
def test_ids_outside_the_vocabulary_are_refused(kernel: str, tied: bool) -> None:
    with using(kernel):
        backbone = Model(LLAMA | {"tie_word_embeddings": tied}).build(kernel)
    for bad in (-1, 64, 2**40):
        with pytest.raises(IndexError, match=f"Id {bad} is outside the table; ids lie between 0 and 63"):
            backbone.embed(torch.tensor([3, bad, 5]))
        with pytest.raises(IndexError):
            backbone.head_rows(torch.tensor([bad]))
    with pytest.raises(TypeError, match=r"torch\.int32"):
        backbone.embed(torch.tensor([1], dtype=torch.int32))
    assert backbone.embed(torch.empty(0, dtype=torch.int64)).shape == (0, 32)
    every_second = torch.arange(20)[::2]
    assert same(backbone.embed(every_second), backbone.embed(every_second.clone()))


@compiled_only
@pytest.mark.parametrize("shape", [(64, 64), (576, 1536)])
def test_weights_that_are_not_contiguous_are_packed_as_their_copies(kernel: str, shape: tuple[int, int]) -> None:
    """The contiguous copy lives only as long as the call that reads it."""
    turned = torch.randn(shape).T
    with using(kernel):
        best = library.default()
        for _ in range(3):
            for row in (row for row in FORMATS.values() if row.activations):
                assert same(PackedMatrix(turned, row, best).blocks, PackedMatrix(turned.contiguous(), row, best).blocks)


@compiled_only
@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if row.activations])  # others: test_quants
def test_a_format_gives_back_its_numbers_and_multiplies_them(kernel: str, name: str) -> None:
    row, by_itself = FORMATS[name], name not in ("bf16_rows", "fp32_rows", "int8_both")

    def holds(rows: int, inputs: int, outputs: int, biased: bool, threads: int) -> None:
        generator = torch.Generator().manual_seed(rows + inputs)
        weight = torch.randn(outputs, inputs, generator=generator)
        numbers, scale = row.numbers(Blocks.of(weight))
        truth = numbers.float() if scale is None else numbers.float() * scale[:, None]
        matrix = PackedMatrix(weight, row, library.default())
        ids = torch.randint(outputs, (5,), generator=generator)
        assert same(matrix.rows(ids), truth[ids])
        if not by_itself:  # only read row by row; or a product of draft heads, tested with them
            return
        bias = torch.randn(outputs, generator=generator) if biased else None
        linear, x = PackedLinear(weight, bias, format=row), torch.randn(rows, inputs, generator=generator)
        y = linear(x, threads)
        wanted = x.to(row.activations).double() @ truth.double().T + (0 if bias is None else bias.double())
        torch.testing.assert_close(y.double(), wanted, atol=1e-4, rtol=1e-4)
        assert same(torch.cat([linear(x[i : i + 1], 1) for i in range(rows)]), y)

    sizes = st.integers(1, 200)
    check(kernel, 20, holds, st.integers(1, 80), sizes, sizes, st.booleans(), st.integers(1, 3))


def in_int8(weight: torch.Tensor) -> torch.Tensor:
    """The nearest of 255 even steps of each output's own size."""
    step = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (weight.float() / step).round() * step


def multiplied(x: torch.Tensor, weight: torch.Tensor, kernel: str, output: bool) -> torch.Tensor:
    """What draft heads make of x and a weight: of bfloat16 models in one of three roundings."""
    if weight.dtype == FP32 or kernel == "eager":
        return x.to(weight.dtype).float() @ weight.float().T
    format = draft_format(weight.shape[1], library.default(), output)
    if format.name == "q8_0":
        return (rounded(x) @ Blocks(TYPES["Q8_0"], format.numbers(Blocks.of(weight))[0]).floats().double().T).float()
    met = in_int8(x) if format.name == "int8_both" and kernel in WITH_INT8 else x.to(weight.dtype).float()
    return met @ in_int8(weight).T


@every_kernel
def test_heads_side_by_side_are_their_blocks_one_after_the_other(kernel: str) -> None:
    def holds(
        dtype: torch.dtype,
        rows: int,
        heads: int,
        layers: int,
        hidden: int,
        parts: int,
        choices: int,
        own: bool,
        linear: bool,
        count: int,
    ) -> None:
        generator = torch.Generator().manual_seed(rows + hidden)
        if not layers:  # the matrices alone read what comes
            parts, heads = 1, heads if own else 1

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

        backbone = Model(LLAMA | {"hidden_size": 8}).build(kernel, dtype, 1 + rows % 3)
        blocks = [
            [(random(hidden, hidden * (1 if layer else parts)).to(dtype), random(hidden)) for _ in range(heads)]
            for layer in range(layers)
        ]
        outputs = [random(choices, hidden).to(dtype) for _ in range(heads if own else 1)]
        store_Nd = torch.randn(rows * parts, hidden, generator=generator)
        which_BS = torch.randint(rows * parts, (rows, parts), generator=generator)  # some are read by several rows
        parts_BSd, which = store_Nd[which_BS], which_BS.tolist()
        x_BI = parts_BSd[:, 0]
        for part in parts_BSd[:, 1:].unbind(1):
            x_BI = torch.cat([x_BI, part * (part.square().mean(1, keepdim=True) + 1e-6).rsqrt()], 1)
        count = min(count, choices)
        together = kernels_for(backbone).heads(blocks, outputs, linear)
        values, ids = (t.contiguous() for t in together.top(store_Nd, which, count))
        for k in range(heads):
            x = x_BI
            for i, layer in enumerate(blocks):
                y = multiplied(x, layer[k][0], kernel, output=False) + layer[k][1]
                x = x[:, :hidden] + (y if linear and i + 1 == layers else torch.nn.functional.silu(y))
            truth = multiplied(x, outputs[k if own else 0], kernel, output=True).log_softmax(-1)
            near = {"rtol": 1e-4, "atol": 1e-4} if dtype == FP32 else {"rtol": 2e-2, "atol": 5e-2}
            torch.testing.assert_close(values[:, k], truth.topk(count).values, **near)
            torch.testing.assert_close(values[:, k], truth.gather(1, ids[:, k]), **near)
            assert all(len(set(row)) == count for row in ids[:, k].tolist())
        if dtype == BF16 and kernel != "eager":
            assert isinstance(together, PackedHeads)
            for packed, output in ((together._blocks, False), (together._outputs, True)):
                for each in packed:
                    assert each.matrix.format == draft_format(each.inputs, library.default(), output)
            in_blocks = kernel in WITH_BLOCKS and hidden % 32 == 0
            assert not in_blocks or {each.matrix.format.name for each in together._outputs} == {"q8_0"}
        if kernel != "eager":
            alone = [together.top(store_Nd, which[i : i + 1], count) for i in range(rows)]
            assert same(torch.cat([each[0] for each in alone]), values)
            assert same(torch.cat([each[1] for each in alone]), ids)

    sizes = (st.integers(1, 40), st.integers(1, 4), st.integers(0, 3), st.integers(1, 70), st.integers(1, 3))
    check(kernel, 30, holds, DTYPES, *sizes, st.integers(1, 100), st.booleans(), st.booleans(), st.integers(1, 20))


@pytest.mark.parametrize("packed", [True, False])
def test_a_padded_library_linear_multiplies_and_no_row_sees_another(packed: bool) -> None:
    def holds(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
        generator = torch.Generator().manual_seed(rows + inputs)
        weight, x = (torch.randn(n, inputs, generator=generator) for n in (outputs, rows))
        linear = Linear(weight.to(dtype), packed=packed)
        linear.min_rows = 64
        y = linear(x)
        truth = x.to(dtype).double() @ weight.to(dtype).double().T
        scale = 1e-5 if dtype == FP32 else 1e-2
        assert ((y - truth).abs() <= scale * truth.abs() + scale * inputs**0.5).all()
        assert same(torch.cat([linear(x[i : i + 1]) for i in range(rows)]), y)

    sizes = st.integers(1, 200)
    with using("eager"):
        examples(25)(given(DTYPES, st.integers(1, 150), sizes, sizes)(holds))()
