"""HAMburger: verified drafts change no token; fused decoding writes what its training computes, one slot a segment."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import (
    Output,
    assert_changes_no_token,
    assert_same,
    decoder_of,
    finish,
    plainly,
    watched,
)
from random_backbones import BF16, FP32, KERNELS, Model, using
from test_medusa import LLAMA, VOCAB, WIDTH, backbone_of, requests
from test_medusa2 import DATA, batch_of
from tiny_models import save_tiny
from torch import Tensor
from trainables import trainable

from foretell import drafters
from foretell.backbone import Backbone, Nodes
from foretell.backbone.load import assemble
from foretell.contracts import FINAL_NORM
from foretell.drafters.hamburger.drafter import HAMburger
from foretell.drafters.hamburger.learning import MacroSteps, MicroDrafts, Segments, features_of
from foretell.drafters.hamburger.segments import SURE, entropies, entropy_at, segment
from foretell.drafting.checkpoint import Checkpoint
from foretell.engine import FusedDecoder, decoder_for
from foretell.errors import UsageError
from foretell.requests import SamplingParams
from foretell.train.features import TEACHER
from foretell.trees import chain
from foretell.verify import Typical

pytestmark = pytest.mark.usefixtures("one_thread")

# --- segments -------------------------------------------------------------------------------------------------------

ENTROPIES = [2.0, 0.5, 0.7, 0.01, 0.03, 0.04, 0.02, 0.01, 1.0, 0.29, 0.31, 0.001]


@pytest.mark.parametrize(
    ("rule", "least", "sizes"),
    [
        ("falling", math.inf, [2, 4, 2, 2, 2]),
        ("ratio", math.inf, [2, 4, 1, 1, 2, 2]),
        ("sure", 4.1394, [4, 4, 4]),
        ("sure", 0.7866, [1, 4, 3, 1, 3]),
    ],
)
def test_segments_are_those_of_the_released_code(rule: str, least: float, sizes: list[int]) -> None:
    assert segment(ENTROPIES, 4, rule, least) == sizes


def test_a_segment_never_grows_beyond_its_most() -> None:
    assert segment([0.0] * 10, 4) == [4, 4, 2]
    assert segment([3.0, 3.0, 3.0], 4) == [1, 1, 1]
    assert segment([0.04, 0.2, 0.05], 4) == [1, 2]
    assert segment([], 4) == []


def test_thresholds_are_those_of_the_released_code() -> None:
    assert entropy_at(SURE, 128256) == pytest.approx(0.7866, abs=1e-4)
    assert entropy_at(0.7, 128256) == pytest.approx(4.1394, abs=1e-4)
    assert entropy_at(1.0, 10) == 0.0


def test_entropies_are_those_of_the_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    states, head = (torch.randn(shape, generator=generator) for shape in ((300, WIDTH), (VOCAB, WIDTH)))
    p = torch.softmax(states.double() @ head.double().T, -1)
    assert torch.allclose(entropies(states, head).double(), -(p * p.log()).sum(-1), atol=0.02)
    assert len(entropies(states[:0], head)) == 0


def test_segments_end_with_their_text() -> None:
    tokens = torch.zeros(1, 7, dtype=torch.int64)
    with pytest.raises(UsageError, match=r"^Segments of 8 tokens do not fit a text of 7; cut them at its end\.$"):
        Segments.of(tokens, [[4, 4]], [[False, True]])
    assert Segments.of(tokens, [[4, 3]], [[False, True]]).begin_G.tolist() == [0, 4]


# --- random grafts --------------------------------------------------------------------------------------------------


def noisy(module: MicroDrafts, size: float = 0.3, seed: int = 0) -> Any:
    """With grafts that say something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parts().values():
            weight.add_(torch.randn(weight.shape, generator=generator) * size / max(weight.shape) ** 0.5)
            weight.copy_(weight.bfloat16())  # what a checkpoint keeps
    return module.eval()


def random_grafts(backbone: Backbone, folder: Path | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    given = {"draft_vocab": 40, "blocks": 2} | ({"adapt": "lora", "rank": 4} if folder else {}) | options
    return noisy(trainable(HAMburger, backbone, torch.arange(backbone.config.vocab).flip(0), folder, **given))


def drafter_of(backbone: Backbone, module: MicroDrafts, nodes: int | None = None, **options: Any) -> HAMburger:
    tensors, arch = module.checkpoint()
    found = Checkpoint("hamburger", "tiny", backbone.fingerprint, WIDTH, VOCAB, arch)
    nodes = (0 if options.get("mode") == "fused" else 16) if nodes is None else nodes
    return watched(HAMburger(backbone, HAMburger.Options(nodes=nodes, **options), (found, tensors)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return assemble(folder, dtype="fp32", threads=1)


@pytest.fixture(scope="module")
def module(backbone: Backbone, folder: Path) -> MacroSteps:
    return random_grafts(backbone, folder)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of all sizes: a random model is never surer of one token than of another."""

    def by_turns(entropies: list[float], most: int, *_: Any) -> list[int]:
        sizes: list[int] = []
        while sum(sizes) < len(entropies):
            sizes.append(min(most, [1, 3, 2, 4][len(sizes) % 4], len(entropies) - sum(sizes)))
        return sizes

    monkeypatch.setattr("foretell.drafters.hamburger.learning.segment", by_turns)


# --- verified -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    "kind", [{}, {"blocks": 1, "most": 7, "draft_vocab": 0}, {"most": 2, "output": "tied"}], ids=str
)
def test_random_grafts_change_no_token(kind: dict[str, Any], dtype: torch.dtype) -> None:
    backbone = backbone_of(dtype)
    truth, module = plainly(backbone, requests()), random_grafts(backbone, **kind)
    for turn, nodes in enumerate((2, 5, 16, 40), int(dtype == BF16)):
        assert_changes_no_token(backbone, drafter_of(backbone, module, nodes), requests(), truth, turn)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_keeps_the_promise(kernel: str) -> None:
    with using(kernel):
        backbone = Model(LLAMA).build(kernel, BF16)
        truth = plainly(backbone, requests())
        drafter = drafter_of(backbone, random_grafts(backbone))
        assert_same(finish(decoder_of(backbone, drafter, max_rows=2), requests()), truth)


def test_drafts_are_the_guesses_of_training(backbone: Backbone, module: MacroSteps) -> None:
    """Whatever path is verified: the micro-step decoder at work gives each next token what it gave it in training."""
    tokens = DATA[-1].tokens
    batch = batch_of(backbone, module, [DATA[-1]])
    learnt = MicroDrafts.read(module, batch, torch.arange(len(tokens) - module.heads - 1))  # [K, P, d]
    drafter = drafter_of(backbone, module)
    cache = backbone.new_cache(1, 100)
    hidden, taps = backbone.run_layers(
        backbone.embed(torch.tensor(tokens)), Nodes.chains([0], [0], [len(tokens)]), cache,
        taps=[tap for tap in module.taps if tap != FINAL_NORM],
    )  # fmt: skip
    taps[FINAL_NORM] = backbone.norm(hidden)
    features_PFd = torch.stack([taps[tap] for tap in module.taps], 1)
    for p in range(0, learnt.shape[1], 5):
        own = drafter._micro.new_cache()
        after = backbone.embed(torch.tensor(tokens[p + 1 : p + 1 + module.heads]))
        own.reserve({0: 16})
        first = drafter._micro.begin(own, [0], features_PFd[p : p + 1], after[:1])
        nodes = Nodes([chain(module.heads - 1)], [0], [len(module.taps)], [1])
        out = torch.cat([first, drafter._micro.run(after[1:], nodes, own)])
        assert torch.allclose(out, learnt[:, p], atol=0.05, rtol=0.02)


# --- fused ----------------------------------------------------------------------------------------------------------


def fused(backbone: Backbone, module: MacroSteps, rows: int = 1, confidence: float = 0.5) -> FusedDecoder:
    drafter = drafter_of(backbone, module, mode="fused")
    assert drafter.fused
    assert not drafter.lossless
    drafter.fused.confidence = confidence
    decoder = decoder_for(backbone, drafter, max_rows=rows)
    assert isinstance(decoder, FusedDecoder)
    return decoder


def ragged(new: int = 17) -> list[tuple[list[int], SamplingParams]]:
    """Greedy and sampled, with penalties and log-probabilities, of different lengths."""
    prompts = [[5, 9, 2, 33, 7], [1], [60, 3, 3, 8, 21, 40, 2], [11, 12, 13], [5, 9, 2]]
    params = [
        SamplingParams(max_new_tokens=new, ignore_eos=True),
        SamplingParams(max_new_tokens=new - 6, temperature=1.0, seed=3, ignore_eos=True),
        SamplingParams(max_new_tokens=new + 5, repetition_penalty=1.3, logprobs=2, ignore_eos=True),
        SamplingParams(max_new_tokens=1, ignore_eos=True),
        SamplingParams(max_new_tokens=new, temperature=0.7, top_p=0.9, seed=5, presence_penalty=0.5, logprobs=0),
    ]
    return list(zip(prompts, params, strict=True))


def same_outputs(ours: list[Output], theirs: list[Output]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.ids, mine.logprobs, mine.finish_reason) == (other.ids, other.logprobs, other.finish_reason)


@pytest.mark.parametrize("rows", [1, 3])
def test_without_confidence_it_is_plain_decoding(backbone: Backbone, module: MacroSteps, rows: int) -> None:
    """Bit for bit: log-probabilities too, and the cache holds a slot for every token."""
    decoder = fused(backbone, module, rows, confidence=1.01)
    outputs = finish(decoder, ragged())
    same_outputs(outputs, plainly(backbone, ragged()))
    for output in outputs:
        assert output.statistics.slots == len(output.ids) == output.statistics.steps
        assert not any(output.drafted)


@pytest.mark.parametrize("confidence", [0.3, 0.5, 0.6])
def test_a_batch_writes_what_each_row_writes_alone(backbone: Backbone, module: MacroSteps, confidence: float) -> None:
    """Rows emit different numbers of tokens a step, join and leave."""
    alone = [finish(fused(backbone, module, 1, confidence), [each])[0] for each in ragged()]
    keyed = [finish(fused(backbone, module, 1, confidence), [each], [i])[0] for i, each in enumerate(ragged())]
    assert alone[0].ids == keyed[0].ids
    together = finish(fused(backbone, module, 3, confidence), ragged())
    same_outputs(together, keyed)
    assert any(output.statistics.slots < len(output.ids) for output in together)


def test_slots_and_tokens_are_counted(backbone: Backbone, module: MacroSteps) -> None:
    """After m macro steps the cache holds T + m - 1 slots, and 1 to 4 tokens were written by each."""
    decoder = fused(backbone, module, confidence=0.0)
    prompt = [5, 9, 2, 33]
    request = decoder.submit(prompt, SamplingParams(max_new_tokens=30, ignore_eos=True))
    steps = 0
    while decoder.pending([request]):
        events = decoder.step()
        for event in events:
            steps += 1
            assert 1 <= len(event.tokens) <= 4
            assert event.drafted == [False] + [True] * (len(event.tokens) - 1)
            if not event.finish_reason:
                assert len(event.tokens) == 4  # nothing stops it
                assert decoder.cache.lengths[0] == len(prompt) + steps - 1
    assert steps == 8
    assert event.statistics is not None
    assert (event.statistics.slots, event.statistics.new_tokens) == (8, 30)


def test_a_lower_confidence_never_shortens_a_step(backbone: Backbone, module: MacroSteps) -> None:
    """At the same state, and the first token is the model's own."""
    params, first = SamplingParams(max_new_tokens=9, ignore_eos=True), list[list[int]]()
    for confidence in (1.01, 0.7, 0.55, 0.5, 0.45, 0.3, 0.0):
        decoder = fused(backbone, module, confidence=confidence)
        decoder.submit([5, 9, 2], params)
        first.append(decoder.step()[0].tokens)  # the prompt is read in the same step
    assert first[0] == plainly(backbone, [([5, 9, 2], params)])[0].ids[:1]
    for shorter, longer in itertools.pairwise(first):
        assert longer[: len(shorter)] == shorter
    assert (len(first[0]), len(first[-1])) == (1, 4)


@pytest.mark.usefixtures("cut")
def test_forced_segments_give_what_training_computes(
    backbone: Backbone, module: MacroSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and stops of every token of every segment, where decoding is made to write them."""
    data = [replace(DATA[-1], answers=[(5, len(DATA[-1].tokens))])]
    batch = batch_of(backbone, module, data)
    segments = module.segments(batch)
    with torch.no_grad():
        x_Pd, place_P, last_P = module.steps(batch.tokens_BT, segments)
        logits_PV, stops_P = x_Pd @ module.output_Vd.float().T, module.stop(x_Pd).sigmoid()
    sizes = segments.size_G[segments.written_G].tolist()
    assert max(sizes) > 1
    assert (sum(sizes), int(last_P.sum())) == (len(place_P), len(sizes))
    decoder, tokens, seen = fused(backbone, module), data[0].tokens, list[tuple[Tensor, float]]()
    left: list[int] = []

    def forced(steps: Any, states_Rd: Tensor) -> None:
        step = steps[0]
        if not step.emitted:
            left[:] = [sizes[len(step.row.segments) - 1]]
        seen.append((backbone.logits(states_Rd)[0], decoder.fused.stops(states_Rd)[0]))
        step.emitted.append(tokens[len(step.tokens)])
        step.tokens.append(tokens[len(step.tokens)])
        left[0] -= 1
        decoder.fused.confidence = 0.0 if left[0] else 2.0

    monkeypatch.setattr(decoder, "_choose", forced)
    [output] = finish(decoder, [(tokens[:5], SamplingParams(max_new_tokens=len(tokens) - 5, ignore_eos=True))])
    assert output.ids == tokens[5:]
    assert output.statistics.slots == len(sizes)
    assert torch.allclose(torch.stack([logits for logits, _ in seen]), logits_PV, atol=1e-4)
    assert torch.allclose(torch.tensor([stop for _, stop in seen]), stops_P, atol=1e-4)


@pytest.mark.usefixtures("cut")
def test_later_tokens_change_nothing_before_them(backbone: Backbone, module: MacroSteps) -> None:
    batch = batch_of(backbone, module, [DATA[-1]])
    segments = module.segments(batch)
    with torch.no_grad():
        before, place_P, _ = module.steps(batch.tokens_BT, segments)
        changed = batch.tokens_BT.clone()
        at = int(place_P[len(place_P) // 2])
        changed[0, at] = (changed[0, at] + 1) % VOCAB
        after, _, _ = module.steps(changed, segments)
    same = (before == after).all(-1)
    assert same[place_P <= at].all()
    assert not same[place_P > at].all()


@pytest.mark.usefixtures("cut")
def test_conversations_side_by_side_do_not_meet(backbone: Backbone, module: MacroSteps) -> None:
    """A padded batch gives what each conversation gives alone."""
    batch = batch_of(backbone, module)
    with torch.no_grad():
        together, _, _ = module.steps(batch.tokens_BT, module.segments(batch))
        alone = []
        for talk in DATA:
            one = batch_of(backbone, module, [talk])
            alone.append(module.steps(one.tokens_BT, module.segments(one))[0])
    assert torch.allclose(together, torch.cat(alone), atol=1e-3)


def test_the_merger_reads_the_order_of_tokens(backbone: Backbone, module: MacroSteps) -> None:
    """At work it gives what it gives in training; of one token the embedding; in any order the same without places."""
    decoder = fused(backbone, module)
    segments = [[5], [9, 2], [1, 2, 3, 4], [4, 3, 2, 1]]
    padded = torch.tensor([each + [0] * (4 - len(each)) for each in segments])
    sizes = torch.tensor(list(map(len, segments)))
    with torch.no_grad():
        learnt = module.merger(module.embedded(padded), sizes)
    ours = decoder.fused.fuse(segments)
    assert torch.allclose(ours, learnt, atol=1e-5)
    assert torch.equal(ours[0], backbone.embed(torch.tensor([5]))[0])
    assert not torch.allclose(learnt[2], learnt[3], atol=1e-4)
    places = module.merger.pos_Sp.data.clone()
    module.merger.pos_Sp.data.zero_()
    with torch.no_grad():
        unplaced = module.merger(module.embedded(padded), sizes)
    module.merger.pos_Sp.data.copy_(places)
    assert torch.allclose(unplaced[2], unplaced[3], atol=1e-5)


@pytest.mark.usefixtures("cut")
def test_the_first_token_is_the_models_own(backbone: Backbone, module: MacroSteps) -> None:
    """Whatever the micro-step decoder says."""
    batch = batch_of(backbone, module, [DATA[-1]])
    with torch.no_grad():
        segments = module.segments(batch)
        before, place_P, _ = module.steps(batch.tokens_BT, segments)
        kept = {name: weight.clone() for name, weight in module.parts().items() if name.startswith("micro.")}
        for name in kept:
            module.parts()[name].mul_(1.5).add_(0.1)
        after, _, _ = module.steps(batch.tokens_BT, segments)
        for name, weight in kept.items():
            module.parts()[name].copy_(weight)
    first_P = torch.isin(place_P, segments.begin_G)
    assert torch.equal(before[first_P], after[first_P])
    assert not torch.allclose(before[~first_P], after[~first_P])


def taught(backbone: Backbone, tokens: list[int]) -> Tensor:
    """The most probable next tokens with their probabilities, as features keep them, [V]."""
    states = backbone.forward(
        torch.tensor(tokens), Nodes.chains([0], [0], [len(tokens)]), backbone.new_cache(1, 100)
    )  # fmt: skip
    p_V = backbone.logits(states[-1:])[0].softmax(-1)
    best = p_V.topk(TEACHER)
    return torch.zeros_like(p_V).scatter_(0, best.indices, best.values)


# --- learning -------------------------------------------------------------------------------------------------------


def test_the_last_answer_is_cut_by_what_the_frozen_model_knew(backbone: Backbone, module: MacroSteps) -> None:
    """By the entropy of the distribution of each token of it; everything before it is a slot for each token."""
    module.options, rule = replace(module.options, rule="sure"), module.options
    batch = batch_of(backbone, module)
    given = []
    for talk in DATA:
        nodes = Nodes.chains([0], [0], [len(talk.tokens)])
        states = backbone.forward(torch.tensor(talk.tokens), nodes, backbone.new_cache(1, 100))
        log_p = backbone.logits(states).log_softmax(-1)
        given.append((-(log_p.exp() * log_p).sum(-1)).tolist())
    middle = sorted(entropy for each in given for entropy in each)[sum(map(len, given)) // 2]
    module.least, least = middle, module.least
    segments = module.segments(batch)
    module.options, module.least = rule, least
    for b, (talk, entropy) in enumerate(zip(DATA, given, strict=True)):
        begin, end = talk.answers[-1]
        right = segment([entropy[t - 1] for t in range(begin, end)], module.most, "sure", middle)
        own = segments.conversation_G == b
        assert segments.size_G[own].tolist() == [1] * begin + right
        assert segments.written_G[own].tolist() == [False] * begin + [True] * len(right)
    assert segments.size_G.max() > 1


def test_conversations_without_an_answer_teach_nothing(backbone: Backbone, module: MacroSteps) -> None:
    """Beside others they change no loss; alone there is none."""
    silent = replace(DATA[0], answers=[])
    assert module.losses(batch_of(backbone, module, [silent])) == {}
    one = module.segments(batch_of(backbone, module, [DATA[-1]]))
    both = module.segments(batch_of(backbone, module, [silent, DATA[-1]]))
    assert torch.equal(one.size_G, both.size_G)
    assert set(both.conversation_G.tolist()) == {1}
    whole = replace(DATA[-1], answers=[(0, len(DATA[-1].tokens))])
    assert not module.segments(batch_of(backbone, module, [whole])).written_G[0]  # nothing comes before it


def test_features_are_spread_over_the_layers() -> None:
    assert features_of(30) == (8, 15, 23, FINAL_NORM)
    assert features_of(16) == (4, 8, 12, FINAL_NORM)
    assert features_of(3) == (1, 2, 2, FINAL_NORM)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("soft", [0.0, 0.5, 1.0])
def test_the_loss_is_that_of_its_tokens(
    backbone: Backbone, module: MacroSteps, soft: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cross-entropy over the whole vocabulary, against the token and what the frozen model says in its place; and of
    where segments end."""
    monkeypatch.setattr(module, "soft", soft)
    batch = batch_of(backbone, module)
    segments = module.segments(batch)
    with torch.no_grad():
        terms = module.losses(batch)
        x_Pd, place_P, last_P = module.steps(batch.tokens_BT, segments)
        right_P = batch.tokens_BT.flatten()[place_P]
        log_q_PV = (x_Pd @ module.output_Vd.float().T).log_softmax(-1)
        told_PV = torch.zeros_like(log_q_PV)
        for p, place in enumerate(place_P.tolist()):
            b, t = divmod(place, batch.tokens_BT.shape[1])
            told_PV[p, right_P[p]] += 1 - soft
            told_PV[p] += soft * taught(backbone, DATA[b].tokens[:t])
        text = -(told_PV * log_q_PV).sum(-1).mean()
        stop = torch.nn.functional.binary_cross_entropy_with_logits(module.stop(x_Pd), last_P.float())
    assert terms["text"].item() == pytest.approx(text.item(), rel=0.02)
    assert terms["stop"].item() == pytest.approx(stop.item(), rel=1e-4)
    assert len(place_P) == sum(end - begin for begin, end in (talk.answers[-1] for talk in DATA))


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("confidence", "sentence"), [(0.0, "confidence is 0.0; it must lie above 0"), (1.5, "1.5")])
def test_confidences_that_mean_nothing_are_refused(
    backbone: Backbone, module: MacroSteps, confidence: float, sentence: str
) -> None:
    def build() -> None:
        drafters.parsed("hamburger", {"mode": "fused", "confidence": confidence})
        drafter_of(backbone, module, mode="fused", confidence=confidence)

    with pytest.raises(UsageError, match=sentence):
        build()


def test_grafts_of_a_frozen_model_cannot_be_fused(backbone: Backbone) -> None:
    frozen = random_grafts(backbone)
    with pytest.raises(UsageError, match=r"was trained on a frozen model, which cannot read fused tokens; train one"):
        drafter_of(backbone, frozen, mode="fused")


def test_joint_training_begins_with_grafts_of_the_frozen_model(backbone: Backbone, folder: Path) -> None:
    """The micro-step decoder goes on; an output matrix that only drafts had is left behind."""
    frozen = random_grafts(backbone, output="tied")
    tensors, arch = frozen.checkpoint()
    joint = random_grafts(backbone, folder, output="tied")
    joint.start(arch, tensors)
    for name, weight in frozen.parts().items():
        assert torch.equal(joint.parts()[name], weight)
    assert joint.checkpoint()[1]["output"] == "shared"
    with pytest.raises(UsageError, match=r"^It is made with other options; train with `most=4` and `blocks=2`\.$"):
        random_grafts(backbone, blocks=1).start(arch, tensors)


def test_fused_decoding_has_no_trees(backbone: Backbone, module: MacroSteps) -> None:
    with pytest.raises(UsageError, match=r"^Fused decoding drafts no trees; leave `nodes=8` out"):
        drafter_of(backbone, module, mode="fused", nodes=8)
    drafter = drafter_of(backbone, module, mode="fused")
    with pytest.raises(ValueError, match=r"^A drafter that writes macro steps is for `engine\.decoder_for`\.$"):
        decoder_of(backbone, drafter)


def test_what_needs_verification_is_refused(backbone: Backbone, module: MacroSteps) -> None:
    drafter = drafter_of(backbone, module, mode="fused")
    with pytest.raises(UsageError, match=r"^Typical acceptance judges guesses, and fused decoding verifies none"):
        decoder_for(backbone, drafter, rule=Typical())
    from foretell.drafters.prompt_lookup import WithLookup

    with pytest.raises(UsageError, match=r"^Fused decoding verifies no guesses, so prompt lookup cannot add any"):
        WithLookup(drafter)
