"""When to leave the model at M2R2's exit: attention across depths of the fast stream beside the guess's probability.

    python tools/exit_gates.py --checkpoint FOLDER --data FOLDER [--held-out 100]

The gate of the paper (ARLA, arXiv 2502.02040) attends across depths for one token; its equations could not be read.
Ours: a query from the last fast stream, keys and values from all of them, each divided by its root mean square, and a
logistic output; it learns by binary cross-entropy whether the guess is the written token. The drafter's own gate is the
probability of its guess. Of the conversations that the drafter's training held out, the gate learns from most; both are
measured on the others, and so is a logistic function of both. Results: docs/results/hidden_streams.json, "gates".
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import core_figures as core
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import foretell
from foretell.drafters.m2r2 import M2R2, FastStream
from foretell.drafting import checkpoint
from foretell.drafting.learning.heads import targets
from foretell.drafting.options import parse
from foretell.train.data import ConversationStore
from foretell.train.features import ComputedFeatures
from foretell.train.start import initialise
from foretell.train.trainer import Settings, held_out_of

MODEL, LATENT = "smollm2-135m", 64
PRECISIONS = (0.99, 0.98, 0.95, 0.9)


class Arla(nn.Module):
    """Streams [P, E + 1, d] of a token by depth -> log-odds [P] that the guess is right."""

    def __init__(self, d: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(d, LATENT, bias=False) for _ in range(3))
        self.odds = nn.Linear(LATENT, 1)

    def forward(self, streams_PEd: Tensor) -> Tensor:
        x_PEd = F.rms_norm(streams_PEd, streams_PEd.shape[-1:])
        scores_PE = (self.key(x_PEd) @ self.query(x_PEd[:, -1:]).transpose(1, 2))[..., 0] / LATENT**0.5
        mixed_Pl = (scores_PE.softmax(-1)[..., None] * self.value(x_PEd)).sum(1)
        return self.odds(mixed_Pl)[:, 0]


@torch.no_grad()
def read(module: FastStream, features: ComputedFeatures, which: range) -> tuple[Tensor, Tensor, Tensor]:
    """Streams [P, E + 1, d] at each written position, log-odds [P] of the guess there, and whether it is right [P]."""
    streams, odds, right = list[Tensor](), list[Tensor](), list[Tensor]()
    for index in which:
        batch = features.batch([index])
        targets_P1, sources_P = targets(batch, 1, 1)
        if not len(sources_P):
            continue
        embedded_BTd = batch.states[0].float()
        depths = torch.stack([embedded_BTd, *module.streams(embedded_BTd)], 2).flatten(0, 1)[sources_P]
        normed_Pd = module.frozen.norm(depths[:, -1], module.frozen.final_norm_d).float()
        p_P, best_P = (normed_Pd @ module.head(0).T).softmax(-1).max(-1)
        streams.append(depths.half())
        odds.append(p_P.clamp(1e-6, 1 - 1e-6).logit())
        right.append(module.vocabulary_V[best_P] == targets_P1[:, 0])
    return torch.cat(streams), torch.cat(odds), torch.cat(right)


def learn(gate: nn.Module, inputs: Tensor, right_P: Tensor, epochs: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(gate.parameters(), lr=lr, weight_decay=0.0)
    steps = epochs * (len(right_P) // 512)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(2, steps))
    for _ in range(epochs):
        for some in torch.randperm(len(right_P)).split(512)[: steps // epochs]:
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(gate(inputs[some].float()).flatten(), right_P[some].float())
            loss.backward()
            optimizer.step()
            schedule.step()


def figures(odds_P: Tensor, right_P: Tensor) -> dict[str, Any]:
    """How well this order tells right guesses from wrong ones, and how many may be left unverified at a precision."""
    ordered_P = right_P[odds_P.argsort(descending=True)].double()
    right, wrong = ordered_P.sum(), (1 - ordered_P).sum()
    area = ((1 - ordered_P) * ordered_P.cumsum(0)).sum() / (right * wrong)
    precision_P = ordered_P.cumsum(0) / torch.arange(1, len(ordered_P) + 1)
    kept = {f"{least:g}": _kept(precision_P, least) for least in PRECISIONS}
    return {"area_under_roc": round(float(area), 4), "share_at_precision": kept}


def _kept(precision_P: Tensor, least: float) -> float:
    """Greatest share of the guesses, surest first, of which so many are right."""
    places = (precision_P >= least).nonzero()
    return round((int(places.max()) + 1) / len(precision_P), 4) if len(places) else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a folder of a trained m2r2")
    parser.add_argument("--data", type=Path, required=True, help="a folder that it was trained on")
    parser.add_argument("--held-out", type=int, default=100, help="conversations to measure on")
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    llm = foretell.load(MODEL, weights="bf16")
    found, tensors = checkpoint.load(args.checkpoint)
    names = {"exit": found.arch["exit"], "rank": found.arch["rank"], "output": found.arch["output"], "soft": 0.0}
    options = parse(M2R2.Training, names | {"draft_vocab": len(tensors["vocabulary"])})
    counts_V = torch.zeros(llm.backbone.config.vocab)
    counts_V[tensors["vocabulary"].long()] = 1
    module = M2R2.trainable(llm.backbone, options, counts_V)
    initialise(module, str(args.checkpoint), found, tensors)
    store = ConversationStore.open(args.data).conversations
    settings = Settings(**{name: found.provenance["settings"][name] for name in ("held_out", "seed")})
    talks = [store[i] for i in held_out_of(store, range(len(store)), settings)]
    features = ComputedFeatures(llm.backbone, talks, module.taps, teacher=False)
    print(f"reading {len(talks)} conversations ...", flush=True)
    ends = [0, *(round(share * (len(talks) - args.held_out)) for share in (0.8, 1)), len(talks)]
    gate_read, both_read, held = (read(module, features, range(*each)) for each in pairwise(ends))
    torch.manual_seed(0)
    gate, both = Arla(held[0].shape[-1]), nn.Linear(2, 1)
    learn(gate, gate_read[0], gate_read[2], args.epochs, 1e-3)

    @torch.no_grad()
    def odds_of(streams_PEd: Tensor) -> Tensor:
        return torch.cat([gate(part.float()) for part in streams_PEd.split(4096)])

    ours_P = odds_of(held[0])
    learn(both, torch.stack([both_read[1], odds_of(both_read[0])], 1), both_read[2], 10 * args.epochs, 3e-2)
    with torch.no_grad():
        together_P = both(torch.stack([held[1], ours_P], 1))[:, 0]
    core.RESULTS = core.RESULTS.with_name("hidden_streams.json")
    core.save(
        "gates",
        {
            "exit": found.arch["exit"], "learnt_from": len(gate_read[1]), "measured_on": len(held[1]),
            "right": round(float(held[2].double().mean()), 4),
            "parameters": sum(p.numel() for p in gate.parameters()),
            "gates": {
                "probability of the guess": figures(held[1], held[2]), "ARLA": figures(ours_P, held[2]),
                "both": figures(together_P, held[2]),
            },
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
