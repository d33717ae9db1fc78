"""The training loop: one pass of the backbone feeds every module that is trained at once.

Each module has a trainer of its own (weights, optimizer, state, log), and learns what it would learn alone, to the bit
on a processor: all see the same batches, and what one draws at random follows from its own seed. They are interrupted
and resumed together; one whose saved state is of a later step than the others' is left as it is until they reach it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from foretell.train import malloc
from foretell.train.forward import attention_on
from foretell.train.memory import fits
from foretell.train.trainer import Trainer

LOG_STEPS, LOG_SECONDS = 20, 10.0
"""A line of the log is written after so many steps, or so many seconds if that is earlier."""


def train(
    trainers: Sequence[Trainer],
    progress: Callable[[int, int], None] = lambda *_: None,
    stop: Callable[[], object] = lambda: False,
) -> None:
    """Trains to the end. An interruption saves the states first.

    Args:
        trainers: with the same settings and the same features, which hold all that their modules read.
        progress: called after each step with (steps done, all steps).
        stop: called before each step; the run ends there if the result is true.

    Raises:
        KeyboardInterrupt: `stop` returned something true.
        UsageError: the memory of the device does not suffice for a batch.
        ForetellError: a loss or a gradient is no longer finite, or a state cannot be written.
    """
    for trainer in trainers:
        if not trainer.resume():
            trainer.save()  # fails now, not after hours, where the folder cannot be written
        trainer.updating = False
    trainers[0].features.multiply_in(trainers[0].number_type)
    malloc.keep()
    try:
        with attention_on(trainers[0].device):
            _run(trainers, progress, stop)
    finally:
        for trainer in trainers:
            if not trainer.updating:  # an update that was cut off leaves weights of no step: the saved state stays
                trainer.save()


def _run(trainers: Sequence[Trainer], progress: Callable[[int, int], None], stop: Callable[[], object]) -> None:
    first, features = trainers[0], trainers[0].features
    step = min(trainer.step for trainer in trainers)
    tokens, logged, saved, timed = 0, *(time.perf_counter() for _ in range(3))
    for batches in first.batches(step):
        if stop():
            raise KeyboardInterrupt
        due = [trainer for trainer in trainers if trainer.step == step]
        for trainer in due:
            trainer.begin_step()
        for indices in batches:
            with fits(first.device, *_refusal(first, indices)):
                batch = features.batch(indices).to(first.device)
                for trainer in due:
                    trainer.learn(batch)
        with fits(first.device, *_refusal(first, max(batches, key=lambda indices: _size(first, indices)))):
            for trainer in due:
                trainer.update(alone=len(trainers) == 1)
        step += 1
        tokens += sum(len(features.data[i].tokens) for batch in batches for i in batch)
        now = time.perf_counter()
        for trainer in due:
            trainer.seconds += now - timed
        timed = now
        if step in (1, first.steps) or step % LOG_STEPS == 0 or now - logged >= LOG_SECONDS:
            for trainer in due:
                trainer.log_steps(tokens / (now - logged))
            tokens, logged = 0, time.perf_counter()
        progress(step, first.steps)
        if now - saved > first.settings.save_seconds:
            for trainer in trainers:
                trainer.save()
            saved = time.perf_counter()


def _size(trainer: Trainer, indices: Sequence[int]) -> int:
    """Tokens of a batch, padding included."""
    return len(indices) * max(len(trainer.features.data[i].tokens) for i in indices)


def _refusal(trainer: Trainer, indices: Sequence[int]) -> tuple[str, str]:
    """Returns what a batch is called where it does not fit into memory, and the remedy."""
    size = _size(trainer, indices)
    if len(indices) == 1:
        return f"A conversation of {size} tokens", "distill shorter ones (`max_new_tokens=`), and train on them alone"
    smaller = f"`batch_tokens={size // 2}`, `accumulate={2 * trainer.settings.accumulate}` and another `out=`"
    return f"A batch of {size} tokens", f"train with {smaller}"
