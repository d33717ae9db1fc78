"""Which guesses survive: each rule against a slow obvious twin, and sampling against the exact distribution.

Sampling is exact twice over. Token for token: verifying a tree draws what plain decoding would draw with the same
seed. In distribution: frequencies pass a chi-square test against probabilities written out in plain Python, a test
that the flawed way (draw again after a rejection) fails.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_backbones import drafts, examples, trees
from scipy import stats
from torch import Tensor
from toy_drafters import cartesian

from foretell.contracts import Draft, Verdict
from foretell.errors import UsageError
from foretell.requests import SamplingParams
from foretell.trees import TokenTree, chain
from foretell.verify import DAMAGED, Typical, by_row, distribution, process, sample, targets, typical, uniform, walk

VOCAB = 5


@dataclass
class State:
    """As much of a row as verification reads."""

    tokens: list[int]
    params: SamplingParams
    prompt_length: int = 1


def hashed(*words: int) -> int:
    """A made-up target: some token for every history."""
    return int(uniform(11, hash(words), 0) * VOCAB)


# -- walking --------------------------------------------------------------------------------------------------------

Choose = Callable[[int, list[int]], int]
"""(row, path from the root) -> the target's token after its last node."""


def everywhere(draft: Draft, choose: Choose) -> list[list[int]]:
    """The target's tokens after all nodes."""
    return [[choose(row, tree.path(node)) for node in range(len(tree))] for row, tree in enumerate(draft.trees)]


def walked(draft: Draft, choose: Choose) -> Verdict:
    """The slow twin of `walk`: asks for one token at a time, and no node that it does not reach."""
    paths, bonus = [], []
    for row, (tree, tokens) in enumerate(zip(draft.trees, draft.tokens, strict=True)):
        path = [0]
        while True:
            token = choose(row, path)
            following = [child for child in tree.children[path[-1]] if tokens[child] == token]
            if not following:
                break
            path.append(following[0])
        paths.append(path)
        bonus.append(token)
    return Verdict(paths, bonus)


def walk_twin(tree: TokenTree, tokens: list[int], target: Callable[[int, list[int]], int]) -> tuple[list[int], int]:
    """Tries every node: the accepted ones are those whose whole path the target would have written."""
    agreed = [0]
    for node in range(1, len(tree)):
        path = tree.path(node)
        if all(target(path[i], path[: i + 1]) == tokens[path[i + 1]] for i in range(len(path) - 1)):
            agreed.append(node)
    deepest = max(agreed, key=lambda node: (tree.depths[node], [-n for n in tree.path(node)]))  # of twins the first
    path = tree.path(deepest)
    return path, target(deepest, path)


@examples(150)
@given(drafts(24, VOCAB), st.integers(0, 3))
def test_walking_follows_the_target_as_far_as_the_tree_goes(draft: Draft, mood: int) -> None:
    """Twins share their future here, the target being a function of the tokens; the walk takes the first of them."""

    def target(row: int, path: list[int]) -> int:
        ids = [draft.tokens[row][n] for n in path]
        return hashed(row, mood, *ids)

    for tree, tokens in zip(draft.trees, draft.tokens, strict=True):
        if any(len({tokens[c] for c in children}) < len(children) for children in tree.children):
            return  # alike siblings: see the next test
    verdict = walk(draft, everywhere(draft, target))
    assert verdict == walked(draft, target)
    for row, (tree, tokens) in enumerate(zip(draft.trees, draft.tokens, strict=True)):
        path, bonus = walk_twin(tree, tokens, lambda node, path, row=row: target(row, path))
        assert (verdict.paths[row], verdict.bonus[row]) == (path, bonus)


@examples(100)
@given(drafts(24, VOCAB), st.integers(0, 3))
def test_what_is_emitted_is_what_the_target_writes_one_by_one(draft: Draft, mood: int) -> None:
    """For every tree, alike siblings or not: accepted tokens and bonus continue the root as plain decoding would."""
    verdict = walk(draft, everywhere(draft, lambda row, path: hashed(row, mood, *(draft.tokens[row][n] for n in path))))
    for row, (path, bonus) in enumerate(zip(verdict.paths, verdict.bonus, strict=True)):
        tokens = draft.tokens[row]
        assert path == draft.trees[row].path(path[-1])
        history = [tokens[0]]
        for _ in path:
            history.append(hashed(row, mood, *history))
        assert history == [*(tokens[n] for n in path), bonus]
        assert all(tokens[child] != bonus for child in draft.trees[row].children[path[-1]])


@examples(30)
@given(trees())
def test_an_oracle_gets_the_height_and_an_adversary_the_root(tree: TokenTree) -> None:
    deepest = tree.path(tree.depths.index(tree.height))
    draft = Draft([tree], [list(range(len(tree)))])  # every token different: the node's own number
    right = walk(draft, everywhere(draft, lambda row, path: ([*deepest, -1])[len(path)]))
    assert right == Verdict([deepest], [-1])
    assert walk(draft, [[-1] * len(tree)]) == Verdict([[0]], [-1])


@examples(150)
@given(drafts(24, VOCAB), st.integers(0, 3), st.sampled_from([0.0, 0.3, 0.6, 1.0]))
def test_a_guess_that_is_trusted_is_taken_whatever_the_target_says(draft: Draft, mood: int, least: float) -> None:
    """Per row; the slow twin asks at each node whether its best guess is trusted, and else what the target says."""
    draft.probabilities = [[uniform(3, node, mood) for node in range(len(tree))] for tree in draft.trees]
    trust = [least if row != 1 else None for row in range(len(draft.trees))]
    chosen = everywhere(draft, lambda row, path: hashed(row, mood, *path))
    verdict = walk(draft, chosen, trust)
    for row, (tree, tokens, p_N) in enumerate(zip(draft.trees, draft.tokens, draft.probabilities, strict=True)):
        path = [0]
        while children := tree.children[path[-1]]:
            best = sorted(children, key=lambda child: (-p_N[child], child))[0]
            held = [child for child in children if tokens[child] == chosen[row][path[-1]]]
            if row != 1 and p_N[best] > least:
                path.append(best)
            elif held:
                path.append(held[0])
            else:
                break
        assert (verdict.paths[row], verdict.bonus[row]) == (path, chosen[row][path[-1]])
    if least == 1:
        assert verdict == walk(draft, chosen)
    damaged = [[DAMAGED] * len(tree) for tree in draft.trees]  # nothing is accepted after states that are no numbers
    assert walk(draft, damaged, trust) == Verdict([[0]] * len(trust), [DAMAGED] * len(trust))


def test_what_is_trusted_says_how_probable_it_is() -> None:
    assert walk(Draft([chain(0)], [[4]]), [[2]], [0.5]) == Verdict([[0]], [2])
    with pytest.raises(ValueError, match=r"^A drafter whose guesses are trusted says how probable they are\.$"):
        walk(Draft([chain(1)], [[4, 1]]), [[2, 2]], [0.5])


def test_padding_is_never_accepted() -> None:
    """The target wants token 0 after a short leaf, where padded implementations hold a 0 that nobody guessed."""
    tree, tokens = TokenTree((-1, 0, 0, 2, 3)), [7, 1, 2, 0, 0]
    verdict = walk(Draft([tree], [tokens]), [[1, 0, 0, 0, 0]])
    assert verdict == Verdict([[0, 1]], [0])
    logits_NV = torch.zeros(5, 8)
    logits_NV[0, 1] = logits_NV[1, 0] = 99
    assert typical(Draft([tree], [tokens]), [logits_NV], Typical()) == Verdict([[0, 1]], [0])


# -- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("varied", range(3))
def test_noise_is_uniform_and_independent_along_each_of_its_arguments(varied: int) -> None:
    """Along positions, keys and seeds: uniform, pairs of neighbours uniform on the square, no serial correlation."""
    noise = []
    for i in range(20_000):
        words = [3, 5, 7]
        words[varied] = i
        noise.append(uniform(*words))
    assert all(0 <= u < 1 for u in noise)
    assert stats.kstest(noise, "uniform").pvalue > 1e-3
    for lag in (1, 2, 64):
        cells = Counter((int(a * 8), int(b * 8)) for a, b in zip(noise, noise[lag:], strict=False))
        assert stats.chisquare([cells[i, j] for i in range(8) for j in range(8)]).pvalue > 1e-3


def test_noise_of_neighbouring_seeds_keys_and_positions_is_unrelated() -> None:
    base = [uniform(0, 0, p) for p in range(5000)]
    for other in (
        [uniform(0, 1, p) for p in range(5000)],
        [uniform(1, 0, p) for p in range(5000)],
        base[1:] + base[:1],
    ):
        assert abs(stats.pearsonr(base, other).statistic) < 0.06
    assert len({uniform(s, k, p) for s in range(12) for k in range(12) for p in range(12)}) == 12**3
    assert uniform(-1, 0, 0) != uniform(1, 0, 0)


# -- the distribution -----------------------------------------------------------------------------------------------


def distribution_twin(logits: Sequence[float], params: SamplingParams) -> list[float]:
    """Temperature, then top-k, top-p, min-p; every tie with the last token kept is kept."""
    weights = [math.exp((x - max(logits)) / params.temperature) for x in logits]
    if params.top_k:
        least = sorted(weights, reverse=True)[: params.top_k][-1]
        weights = [w if w >= least else 0.0 for w in weights]
    if params.top_p < 1:
        goal, total, least = params.top_p * sum(weights), 0.0, 0.0
        for weight in sorted(weights, reverse=True):
            total, least = total + weight, weight
            if total >= goal:
                break
        weights = [w if w >= least else 0.0 for w in weights]
    weights = [w if w >= params.min_p * max(weights) else 0.0 for w in weights]
    return [w / sum(weights) for w in weights]


truncations = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    top_p=st.sampled_from([0.05, 0.3, 0.55, 0.9, 0.97, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 3, 7, 1000]),
    min_p=st.sampled_from([0.0, 0.06, 0.3, 0.97]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.7, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.3]),
    logit_bias=st.sampled_from([{}, {}, {0: 1.0, 3: -100.0}]),
    seed=st.integers(0, 9),
)
few_logits = st.lists(st.integers(-3, 3), min_size=2, max_size=12)  # whole numbers, so that ties are common


@examples(300)
@given(few_logits, truncations)
def test_the_distribution_is_its_definition(logits: list[int], params: SamplingParams) -> None:
    ours = distribution(torch.tensor(logits, dtype=torch.float32), params).tolist()
    assert ours == pytest.approx(distribution_twin(logits, params), abs=1e-12)


def test_tied_tokens_are_kept_or_dropped_together() -> None:
    tied = torch.tensor([1.0, 3.0, 3.0, 1.0, 3.0, 0.0])
    for params in (SamplingParams(temperature=1, top_k=1), SamplingParams(temperature=1, top_p=0.1)):
        assert distribution(tied, params).tolist() == pytest.approx([0, 1 / 3, 1 / 3, 0, 1 / 3, 0])
    two_ties = distribution(tied, SamplingParams(temperature=1, top_k=4))
    assert (two_ties > 0).tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("peaked", [True, False])
def test_a_nucleus_of_any_size_out_of_a_large_vocabulary(peaked: bool) -> None:
    """The partial sort and, where the nucleus is larger than that, the whole one."""
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * (6 if peaked else 0.1)
    params = SamplingParams(temperature=1, top_p=0.95)
    kept = distribution(logits, params) > 0
    assert (kept.sum() < 1024) == peaked
    twin = distribution_twin(logits.double().tolist(), params)
    assert kept.tolist() == [p > 0 for p in twin]


def chi_square(drawn: Sequence[int], probabilities: Sequence[float]) -> float:
    """P-value of the counts; a token of probability 0 must not occur at all."""
    counts = Counter(drawn)
    assert all(probabilities[token] > 0 for token in counts)
    possible = [token for token, p in enumerate(probabilities) if p > 0]
    if len(possible) == 1:
        return 1.0
    expected = [len(drawn) * probabilities[token] for token in possible]
    return float(stats.chisquare([counts[token] for token in possible], expected).pvalue)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=0),
        SamplingParams(temperature=0.5, seed=1),
        SamplingParams(temperature=2.0, seed=2, top_p=0.8),
        SamplingParams(temperature=1.0, seed=3, top_k=3),
        SamplingParams(temperature=1.0, seed=4, min_p=0.3),
        SamplingParams(temperature=1.3, seed=5, top_p=0.9, top_k=4, min_p=0.1),
    ],
)
def test_samples_have_the_frequencies_of_the_distribution(params: SamplingParams) -> None:
    logits = torch.tensor([0.3, -1.0, 1.2, 1.2, 0.0, -0.4])
    drawn = [sample(logits, params, uniform(params.seed, 0, position)) for position in range(4000)]
    assert chi_square(drawn, distribution_twin(logits.double().tolist(), params)) > 1e-3


def test_the_extremes_of_the_noise_select_possible_tokens() -> None:
    logits = torch.tensor([-100.0, 1.0, 1.0, -100.0])
    params = SamplingParams(temperature=1.0, top_k=2)
    last = 1 - 2**-53
    assert [sample(logits, params, u) for u in (0.0, 0.49, 0.51, last)] == [1, 1, 2, 2]
    for seed in range(50):  # sums that rounding leaves a little above or below one
        logits = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        token = sample(logits, params, last)
        assert distribution(logits, params)[token] > 0


# -- sampling over trees --------------------------------------------------------------------------------------------


def target_logits(history: Sequence[int]) -> Tensor:
    """A made-up model over a toy vocabulary: logits fixed by the last two tokens."""
    return torch.tensor([4 * uniform(5, hash(tuple(history[-2:])), v) for v in range(VOCAB)])


def verify(draft: Draft, state: State, key: int) -> list[int]:
    """What one step emits, verification as the engine does it."""
    (tree,), (tokens,) = draft.trees, draft.tokens
    nodes = [state.tokens[:-1] + [tokens[n] for n in tree.path(node)] for node in range(len(tree))]
    logits_NV = torch.stack([target_logits(history) for history in nodes])
    verdict = walk(draft, targets(draft, [state], [key], [logits_NV]))
    return [*(tokens[n] for n in verdict.paths[0][1:]), verdict.bonus[0]]


def plain(state: State, count: int, key: int) -> list[int]:
    """Token after token, each drawn from its own processed distribution."""
    history = list(state.tokens)
    for _ in range(count):
        logits = process(target_logits(history), state.params, history, state.prompt_length)
        if state.params.temperature == 0:
            history.append(int(logits.argmax()))
        else:
            history.append(sample(logits, state.params, uniform(state.params.seed, key, len(history))))
    return history[len(state.tokens) :]


@examples(150)
@given(
    drafts(16, VOCAB),
    truncations,
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
    st.integers(0, 3),
    st.booleans(),
)
def test_a_tree_draws_the_tokens_that_plain_decoding_draws(
    draft: Draft, params: SamplingParams, before: list[int], key: int, greedy: bool
) -> None:
    """With every processor: a guess on the path is history to the next one exactly as if it were committed."""
    if greedy:
        params = SamplingParams(**{**vars(params), "temperature": 0.0})
    for tree, tokens in zip(draft.trees, draft.tokens, strict=True):
        state = State([*before, tokens[0]], params, prompt_length=len(before))
        emitted = verify(Draft([tree], [tokens]), state, key)
        assert emitted == plain(state, len(emitted), key)


def test_rows_of_a_batch_draw_with_their_own_keys_and_parameters() -> None:
    draft = Draft([cartesian([3, 2]), chain(2)], [[1, 0, 1, 2, *[0, 1] * 3], [2, 3, 4]])
    states = [State([0, 1], SamplingParams(temperature=1.0, seed=0)), State([4, 2], SamplingParams(seed=9))]
    nodes = [
        states[row].tokens[:-1] + [draft.tokens[row][n] for n in tree.path(node)]
        for row, tree in enumerate(draft.trees)
        for node in range(len(tree))
    ]
    logits_MV = torch.stack([target_logits(history) for history in nodes])
    verdict = walk(draft, targets(draft, states, [6, 7], logits_MV.split([len(tree) for tree in draft.trees])))
    for row, state in enumerate(states):
        emitted = [*(draft.tokens[row][n] for n in verdict.paths[row][1:]), verdict.bonus[row]]
        assert emitted == plain(state, len(emitted), 6 + row)


def drawn_one_by_one(draft: Draft, states: Sequence[State], keys: Sequence[int], logits: Sequence[Tensor]) -> Choose:
    """The slow twin of `targets`: one node's token, from its logits and its path alone."""

    def choose(row: int, path: list[int]) -> int:
        state, logits_V = states[row], logits[row][path[-1]]
        if not bool(logits_V.isfinite().all()):
            return DAMAGED
        history = state.tokens + [draft.tokens[row][node] for node in path[1:]]
        logits_V = process(logits_V, state.params, history, state.prompt_length)
        if state.params.temperature == 0:
            return next(token for token, x in enumerate(logits_V.tolist()) if x == max(logits_V.tolist()))
        return sample(logits_V, state.params, uniform(state.params.seed or 0, keys[row], len(history)))

    return choose


@pytest.mark.slow
@examples(150)
@given(st.data(), st.lists(drafts(10, VOCAB), min_size=1, max_size=3), st.integers(0, 999))
def test_the_tokens_after_all_nodes_are_those_chosen_one_by_one(
    data: st.DataObject, made: list[Draft], seed: int
) -> None:
    """Every node, reached or not, read in any order: mixed batches, ties, logits that are not finite."""
    pairs = [pair for draft in made for pair in zip(draft.trees, draft.tokens, strict=True)]
    draft = Draft([tree for tree, _ in pairs], [tokens for _, tokens in pairs])
    states = []
    for _, tokens in pairs:
        params = data.draw(truncations)
        if data.draw(st.booleans()):
            params = SamplingParams(**{**vars(params), "temperature": 0.0})
        if data.draw(st.booleans()):
            params = SamplingParams(temperature=params.temperature, top_p=params.top_p, seed=params.seed)
        states.append(State([4, 0, tokens[0]], params, prompt_length=2))
    generator, keys = torch.Generator().manual_seed(seed), [seed + row for row in range(len(pairs))]
    logits = [torch.randint(-2, 3, (len(tree), VOCAB), generator=generator).float() for tree, _ in pairs]
    for odd in (math.nan, math.inf, -math.inf):
        row = data.draw(st.integers(0, len(pairs) - 1))
        node, token = data.draw(st.integers(0, len(logits[row]) - 1)), data.draw(st.integers(0, VOCAB - 1))
        logits[row][node, token] = odd
    choose = drawn_one_by_one(draft, states, keys, logits)
    found = targets(draft, states, keys, logits)
    expected = everywhere(draft, choose)
    assert walk(draft, found) == walked(draft, choose)
    for row in data.draw(st.permutations(range(len(pairs)))):
        for node in data.draw(st.permutations(range(len(pairs[row][0])))):
            assert found[row][node] == expected[row][node]
        assert list(found[row]) == expected[row] == list(found[row][:])
        assert len(found[row]) == len(expected[row])


def test_a_row_that_samples_reads_its_nodes_only_when_they_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []

    def counted(logits_V: Tensor, params: SamplingParams, noise: float) -> int:
        drawn.append(noise)
        return sample(logits_V, params, noise)

    monkeypatch.setattr("foretell.verify.target.sample", counted)
    tree = cartesian([3, 3])
    draft, state = Draft([tree], [[0] * len(tree)]), State([0, 0], SamplingParams(temperature=1, seed=0))
    logits_NV = torch.full((len(tree), VOCAB), -1000.0)
    logits_NV[:, 3] = 0  # which no node holds
    assert walk(draft, targets(draft, [state], [0], [logits_NV])) == Verdict([[0]], [3])
    assert len(drawn) == 1


def test_tokens_of_all_nodes_are_split_by_rows() -> None:
    draft = Draft([chain(2), chain(0), chain(1)], [[0, 0, 0], [0], [0, 0]])
    assert by_row(draft, [1, 2, 3, 4, 5, 6]) == [[1, 2, 3], [4], [5, 6]]


def test_sampling_needs_a_seed() -> None:
    draft, state = Draft([chain(0)], [[0]]), State([0], SamplingParams(temperature=1))
    with pytest.raises(UsageError, match="needs a seed"):
        targets(draft, [state], [0], [torch.zeros(1, VOCAB)])


def second_tokens(redraw: bool) -> tuple[list[int], list[float]]:
    """The token after [0, 1], decoded with a tree that guesses it, 4000 times; and its exact probabilities.

    `redraw` is the flaw of Medusa's first code: after a rejection the next token is drawn again, so a guess has
    two chances to be chosen.
    """
    params, drawn = SamplingParams(temperature=1.0, seed=0), []
    logits = target_logits([0, 1])
    for key in range(4000):
        tree, tokens = TokenTree((-1, 0, 0)), [1, 2, 3]
        state = State([0, 1], params)
        token = verify(Draft([tree], [tokens]), state, key)[0]
        if redraw and token not in tokens[1:]:
            token = sample(logits, params, uniform(1, key, 2))
        drawn.append(token)
    return drawn, distribution_twin(logits.double().tolist(), params)


def test_drafted_tokens_keep_the_distribution_and_drawing_again_does_not() -> None:
    assert chi_square(*second_tokens(redraw=False)) > 1e-3
    assert chi_square(*second_tokens(redraw=True)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("parents", [(-1, 0, 1), (-1, 0, 1, 0, 0, 1, 1)], ids=["chain", "comb"])
def test_chains_and_combs_keep_the_joint_distribution(parents: tuple[int, ...]) -> None:
    """Of two tokens: both drafted, the second a bonus, or the first one already; truncated, and 20,000 times."""
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=0)
    tokens = [1, 2, 3, 0, 4, 1, 2][: len(parents)]  # siblings differ
    drawn: list[int] = []
    for key in range(20_000):
        state = State([0, 1], params)
        said = verify(Draft([TokenTree(parents)], [tokens]), state, key)[:2]
        if len(said) < 2:
            said += plain(State([0, 1, *said], params), 1, key)
        drawn.append(said[0] * VOCAB + said[1])
    first = distribution_twin(target_logits([0, 1]).double().tolist(), params)
    pairs = [
        p * q
        for token, p in enumerate(first)
        for q in distribution_twin(target_logits([0, 1, token]).double().tolist(), params)
    ]
    assert chi_square(drawn, pairs) > 1e-3


# -- processors -----------------------------------------------------------------------------------------------------


def process_twin(logits: Sequence[float], params: SamplingParams, history: list[int], prompt: int) -> list[float]:
    out = []
    for token, x in enumerate(logits):
        if token in history:
            x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
        seen = history[prompt:].count(token)
        if seen:
            x -= params.presence_penalty + params.frequency_penalty * seen
        out.append(x + params.logit_bias.get(token, 0.0))
    return out


@examples(200)
@given(few_logits, truncations, st.data())
def test_processors_are_their_definition(logits: list[int], params: SamplingParams, data: st.DataObject) -> None:
    params = SamplingParams(
        **{**vars(params), "logit_bias": {t: b for t, b in params.logit_bias.items() if t < len(logits)}}
    )
    history = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=8))
    prompt = data.draw(st.integers(0, len(history)))
    given_logits = torch.tensor(logits, dtype=torch.float32)
    ours = process(given_logits, params, history, prompt)
    assert ours.tolist() == pytest.approx(process_twin(logits, params, history, prompt), rel=1e-5, abs=1e-5)
    assert given_logits.tolist() == logits  # the input is left as it is


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0.*between 1"),
        ({"temperature": -1.0}, "temperature is -1.0.*between 0 and 100"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1.*and 1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": 1000.0}, "presence_penalty is 1000.0"),
        ({"frequency_penalty": math.inf}, "frequency_penalty is inf"),
        ({"stop": 3}, "stop is 3.*a non-empty string, or a sequence of them"),
        ({"stop": ("",)}, "stop is .*a non-empty string"),
        ({"logprobs": 101}, "logprobs is 101.*0 and 100"),
    ],
)
def test_sampling_parameters_out_of_range_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        SamplingParams(**options)
    assert "\n" not in str(caught.value)
