"""The training loop: one pass of the backbone feeds every module that is trained at once.

Each module has a trainer of its own (weights, optimizer, state, log), and learns exactly what it would learn alone: all
see the same batches, and what one draws at random follows from its own seed. They are interrupted and resumed together;
one that was saved a step ahead waits for the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from foretell.errors import UsageError
from foretell.files import one_line
from foretell.train import malloc
from foretell.train.forward import attention_on
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
        ForetellError: a loss is no longer finite, or a state cannot be written.
    """
    for trainer in trainers:
        if not trainer.resume():
            trainer.save()  # fails now, not after hours, where the folder cannot be written
        trainer.updating = False
    malloc.keep()
    try:
        with attention_on(trainers[0].device):
            _run(trainers, progress, stop)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        raise _too_large(trainers[0], error) from error
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
            batch = features.batch(indices).to(first.device)
            for trainer in due:
                trainer.learn(batch)
        for trainer in due:
            trainer.update()
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


def _out_of_memory(error: Exception) -> bool:
    """Returns whether memory ran out; on a CPU, PyTorch has no error of its own for that."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _too_large(trainer: Trainer, error: Exception) -> UsageError:
    """The refusal of a batch that does not fit into memory."""
    size = trainer.settings.batch_tokens
    return UsageError(
        f"A batch of {size} tokens does not fit into the memory of {trainer.device} ({one_line(error)[:200]}); train "
        f"with `batch_tokens={max(1, size // 2)}`, `accumulate={2 * trainer.settings.accumulate}` and another `out=`."
    )
