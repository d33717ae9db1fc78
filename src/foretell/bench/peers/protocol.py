"""The protocol between benchmark and peer: JSON lines over the pipes of a process in an environment of its own.

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
        make: given the first line, returns the function that answers, and a description for the report.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with the answers

    def send(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        answer, about = make(json.loads(sys.stdin.readline()))
    except Exception as error:  # any error of the peer's library is reported to the benchmark
        send({"error": f"{type(error).__name__}: {error}"})
        return
    send({"ready": about})
    for line in sys.stdin:
        try:
            send({"answers": answer(json.loads(line))})
        except Exception as error:
            send({"error": f"{type(error).__name__}: {error}"})


class Clock:
    """Records when tokens arrive."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.ids: list[int] = []
        self.arrivals: list[tuple[int, float]] = []

    def add(self, ids: list[int]) -> None:
        if ids:
            self.ids += ids
            self.arrivals.append((len(ids), time.perf_counter() - self.began))

    def missed(self, ids: list[int]) -> None:
        """Replaces the ids by the complete list: a token that the stream left out arrived with the next one.

        If the streamed ids are not a subsequence of `ids`, no arrival is known.
        """
        ends = list(_ends(ids, self.ids))
        arrivals, begin, streamed = [], 0, 0
        for count, at in self.arrivals if len(ends) == len(self.ids) else []:
            streamed += count
            end = ends[streamed - 1] if streamed < len(ends) else len(ids)
            arrivals.append((end - begin, at))
            begin = end
        self.ids, self.arrivals = ids, arrivals

    def answer(self, **known: Any) -> Answer:
        return {"ids": self.ids, "seconds": time.perf_counter() - self.began, "arrivals": self.arrivals, **known}


def _ends(ids: list[int], streamed: list[int]) -> Iterator[int]:
    """Yields the index in `ids` just after each streamed token, in order, until one is missing."""
    end = 0
    for token in streamed:
        if token not in ids[end:]:
            return
        end = ids.index(token, end) + 1
        yield end
