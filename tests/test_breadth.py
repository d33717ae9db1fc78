"""Exactness at the sizes of real models, on models that are tiny in every other way.

Contexts of thousands of tokens, heads as wide as families have them, whole vocabularies: each changes which blocks,
panels and buffers the arithmetic passes through, and must not change a bit between one row and many.
"""

import pytest
import torch
from decoding import answers, assert_same, decoder_of, finish, plainly
from random_backbones import BF16, COMPILED, FP32, KERNELS, Batch, Model, prefilled, run, same, using
from tiny_models import DIMENSIONS
from toy_drafters import RandomTrees

from foretell.backbone import Backbone, Nodes
from foretell.requests import SamplingParams
from foretell.trees import TokenTree, chain

every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_type = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
TREE = TokenTree((-1, 0, 0, 1, 1, 2, 3, 6, 6, 8))


def select_frontier(**changes: object) -> Model:
    """One layer, two query heads over one key head."""
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return Model({"model_type": "llama", **DIMENSIONS, "max_position_embeddings": 16384, **heads, **changes})


def tokens_of(backbone: Backbone, count: int) -> torch.Tensor:
    return torch.randint(backbone.config.vocab, (count,), generator=torch.Generator().manual_seed(count))


# -- long contexts --------------------------------------------------------------------------------------------------


@every_kernel
@every_type
@pytest.mark.parametrize("length", [2000, 8000])
def test_a_tree_behind_a_long_context_computes_what_its_paths_do(kernel: str, dtype: torch.dtype, length: int) -> None:
    """Beside a row with a short one, too; what is committed may be anything."""
    with using(kernel):
        backbone = select_frontier().build(kernel, dtype, 2)
        caches = [backbone.new_cache(2, length + len(TREE)) for _ in range(2)]
        for tensor, other in zip(*((cache.keys, cache.values) for cache in caches), strict=True):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(length)))
            other.copy_(tensor)
        tokens = tokens_of(backbone, 2 * len(TREE))
        together = run(backbone, tokens, Nodes([TREE, TREE], [1, 0], [length, 33]), caches[0])
        for row, slot, committed in ((0, 1, length), (1, 0, 33)):
            for path in map(TREE.path, TREE.leaves):
                for depth, node in enumerate(path):
                    at = row * len(TREE) + node
                    alone = run(
                        backbone, tokens[at : at + 1], Nodes([chain(0)], [slot], [committed + depth]), caches[1]
                    )
                    assert same(alone[0], together[at])


@pytest.mark.parametrize("kernel", COMPILED)  # the eager modules would gather every key of every token: minutes
@every_type
@pytest.mark.parametrize("length", [2000, 8000])
def test_a_long_prompt_reads_the_same_in_chunks(kernel: str, dtype: torch.dtype, length: int) -> None:
    with using(kernel):
        backbone = select_frontier().build(kernel, dtype, 2)
        tokens = tokens_of(backbone, length)
        whole, hidden = prefilled(backbone, tokens)
        cache, parts = backbone.new_cache(1, length), []
        for part in tokens.split(701):
            parts.append(run(backbone, part, Nodes.chains([0], [cache.lengths[0]], [len(part)]), cache))
            cache.commit([0], [range(len(part))])
        assert same(torch.cat(parts), hidden)
        assert all(same(ours, theirs) for ours, theirs in zip(cache.read(0), whole.read(0), strict=True))


@every_type
@pytest.mark.parametrize(("kernel", "length"), [("", 2000), ("", 8000), ("eager", 2000)])
def test_drafts_behind_a_long_prompt_change_no_token(kernel: str, dtype: torch.dtype, length: int) -> None:
    if not kernel and not COMPILED:
        pytest.skip("needs compiled kernels")
    with using(kernel):
        assert_drafts_change_nothing(select_frontier().build(kernel, dtype, 2), length)


def assert_drafts_change_nothing(backbone: Backbone, length: int, count: int = 12) -> None:
    """A greedy and a sampled request, drafted in trees that hold the right tokens at times, are as alone and plain."""
    prompts = tokens_of(backbone, length).tolist(), tokens_of(backbone, 40).tolist()
    requests = [
        (prompts[0], SamplingParams(max_new_tokens=count, ignore_eos=True, logprobs=2)),
        (prompts[1], SamplingParams(max_new_tokens=count, ignore_eos=True, logprobs=2, temperature=0.9, top_p=0.95)),
    ]
    truth = plainly(backbone, requests)
    drafter = RandomTrees(backbone.config.vocab, 16, seed=length, answers=answers(requests, truth))
    ours = finish(decoder_of(backbone, drafter), requests)
    assert_same(ours, truth)
    assert sum(output.statistics.accepted for output in ours) > 0


# -- wide heads -----------------------------------------------------------------------------------------------------


@every_kernel
@every_type
@pytest.mark.parametrize("width", [80, 96, 128, 256])
def test_heads_of_every_width_are_canonical_and_like_their_twin(kernel: str, dtype: torch.dtype, width: int) -> None:
    model = Model({"model_type": "qwen3", **DIMENSIONS, "head_dim": width, "num_hidden_layers": 2})
    batch = Batch([TREE, chain(3)], [70, 33], [1, 0])
    with using(kernel):
        backbone = model.build(kernel, dtype, 2)
        hidden = batch.together(backbone)[1]
        for row in (0, 1):
            for path, _, streams in batch.alone(backbone, row):
                assert same(hidden[row][path], streams)
        twin = batch.together(model.build("eager", dtype))[1]
        close = 1e-4 if dtype == FP32 else 0.1
        for ours, theirs in zip(hidden, twin, strict=True):
            assert (ours - theirs).abs().max() < close * theirs.abs().max()


# -- whole vocabularies ---------------------------------------------------------------------------------------------


@every_kernel
@every_type
@pytest.mark.parametrize("vocab", [32_000, 151_936])
def test_drafts_over_a_whole_vocabulary_change_no_token(kernel: str, dtype: torch.dtype, vocab: int) -> None:
    with using(kernel):
        assert_drafts_change_nothing(
            select_frontier(vocab_size=vocab, tie_word_embeddings=dtype == BF16).build(kernel, dtype, 2), 20
        )
