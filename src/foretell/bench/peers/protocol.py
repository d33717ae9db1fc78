"""How the benchmark talks with a peer: JSON lines over the pipes of a process that has an environment of its own.

    -> {"model": "...", "dtype": "bf16", "threads": 2, ...}                          once
    <- {"ready": {"version": "..."}}                                                 or {"error": "..."}
    -> {"prompts": [[1, 2]], "new_tokens": 128, "temperature": 0, "seed": 0, "ends": [2]}
    <- {"answers": [{"ids": [...], "seconds": 1.2, "arrivals": [[1, 0.1], ...]}]}

This file runs in the peer's environment, where there is no foretell: standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Request = dict[str, Any]
Answer = dict[str, Any]


def serve(make: Callable[[dict[str, Any]], tuple[Callable[[Request], list[Answer]], dict[str, Any]]]) -> None:
    """Answers requests until stdin ends.

    Args:
        make: of the first line, makes the function that answers, and what is to be told of it.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand among the answers

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        answer, about = make(json.loads(sys.stdin.readline()))
    except Exception as error:  # whatever a foreign library raises is told to whoever started us
        say({"error": f"{type(error).__name__}: {error}"})
        return
    say({"ready": about})
    for line in sys.stdin:
        try:
            say({"answers": answer(json.loads(line))})
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


class Clock:
    """Notes when tokens come."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.ids: list[int] = []
        self.arrivals: list[tuple[int, float]] = []

    def add(self, ids: list[int]) -> None:
        if ids:
            self.ids += ids
            self.arrivals.append((len(ids), time.perf_counter() - self.began))

    def missed(self, ids: list[int]) -> None:
        """Learns all ids, some of which were not heard: those came with the next that was.

        Where they are not what was heard and more, nobody knows when they came.
        """
        ends = list(_places(ids, self.ids))
        arrivals, begin, heard = [], 0, 0
        for count, at in self.arrivals if len(ends) == len(self.ids) else []:
            heard += count
            end = ends[heard - 1] if heard < len(ends) else len(ids)
            arrivals.append((end - begin, at))
            begin = end
        self.ids, self.arrivals = ids, arrivals

    def answer(self, **known: Any) -> Answer:
        return {"ids": self.ids, "seconds": time.perf_counter() - self.began, "arrivals": self.arrivals, **known}


def _places(ids: list[int], some: list[int]) -> Iterator[int]:
    """Behind which of `ids` each of `some` of them ends, as far as they go in order."""
    at = 0
    for token in some:
        if token not in ids[at:]:
            return
        at = ids.index(token, at) + 1
        yield at
