"""One caller's requests on a decoder: submitted, followed to their end, and cancelled if the caller leaves.

Everything that decodes drives its decoder through this file: `LLM.generate` and `stream`, conversations, the chat,
distillation, the benchmark. Several drivers may share a decoder; each sees the events of its own requests only.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

from foretell.requests import Decoder, Event, Request

Name = TypeVar("Name")
"""The caller's own id of a request."""


class Driver(Generic[Name]):
    """The requests of one caller, under names of the caller's choice.

        with Driver[int](decoder) as driver:
            driver.submit(0, Request(prompt, params))
            for index, event in driver:  # may submit more while it runs
                ...

    Leaving the block cancels what is unfinished, whatever the reason; the decoder stays usable.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self._names: dict[int, Name] = {}  # unfinished request -> its name

    def submit(self, name: Name, request: Request) -> None:
        """Queues a request.

        Raises:
            UsageError: the decoder refuses it (see `Decoder.check`).
        """
        self._names[self.decoder.submit(request.prompt, request.params, request.key)] = name

    @property
    def unfinished(self) -> int:
        """Requests whose last event is still to come; 0 once another caller has cancelled all that are left."""
        if self._names and not self.decoder.pending(self._names):
            self._names.clear()
        return len(self._names)

    def step(self) -> list[tuple[Name, Event]]:
        """Runs one step of the decoder; returns this caller's events, none while prompts are read."""
        emitted = []
        for event in self.decoder.events(self._names):
            finished = event.finish_reason is not None
            name = self._names.pop(event.request) if finished else self._names[event.request]
            emitted.append((name, event))
        return emitted

    def __iter__(self) -> Iterator[tuple[Name, Event]]:
        """(name, event) until every request is finished, those submitted meanwhile included."""
        while self.unfinished:
            yield from self.step()

    def cancel(self) -> None:
        """Cancels what is unfinished."""
        while self._names:
            request, _ = self._names.popitem()
            self.decoder.cancel(request)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.cancel()


def run(decoder: Decoder, requests: Iterable[Request]) -> Generator[tuple[int, Event], None, None]:
    """Answers all requests; yields (index of the request, event) until they are finished.

    Closing the generator cancels what is unfinished, and so does any exception.
    """
    with Driver[int](decoder) as driver:
        for index, request in enumerate(requests):
            driver.submit(index, request)
        yield from driver
