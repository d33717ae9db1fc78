"""llama.cpp's own server, in process (xllamacpp), on a GGUF file.

A stream leaves out tokens that end within a character; where some are missing the answer is requested once more, as
a whole and untimed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import xllamacpp
from protocol import Answer, Clock, Request, serve


def make(config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    params = xllamacpp.CommonParams()
    params.model.path = config["gguf"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = config["threads"]
    params.n_parallel, params.n_ctx = config["rows"], config["rows"] * config["context"]
    params.cache_prompt, params.verbosity = False, -1
    if "ngram" in config["options"]:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
    server = xllamacpp.Server(params)

    def complete(request: Request, prompt: list[int], stream: bool, receive: Callable[[dict[str, Any]], None]) -> None:
        def on_chunk(chunk: dict[str, Any]) -> None:
            if "error" in chunk:
                raise RuntimeError(chunk["error"])
            receive(chunk["__verbose"])

        server.handle_completions(
            {"prompt": prompt, "max_tokens": request["new_tokens"], "temperature": request["temperature"],
             "seed": request["seed"], "top_k": 0, "top_p": 1.0, "min_p": 0.0, "cache_prompt": False, "stream": stream,
             "return_tokens": True, "verbose": True},
            on_chunk,
        )  # fmt: skip

    def timed(request: Request, prompt: list[int]) -> tuple[Clock, dict[str, Any], float]:
        clock, last = Clock(), {}

        def receive(chunk: dict[str, Any]) -> None:
            clock.add(chunk["tokens"])
            last.update(chunk)

        complete(request, prompt, True, receive)
        return clock, last, clock.answer()["seconds"]

    def finished(request: Request, prompt: list[int], clock: Clock, last: dict[str, Any], seconds: float) -> Answer:
        if len(clock.ids) != last["tokens_predicted"]:
            complete(request, prompt, False, lambda chunk: clock.missed(chunk["tokens"]))
        times = last["timings"]
        known: dict[str, Any] = {"seconds": seconds, "prefill_seconds": times["prompt_ms"] / 1e3}
        if "ngram" in config["options"]:
            accepted = times.get("draft_n_accepted", 0)
            known |= {"drafted": times.get("draft_n", 0), "accepted": accepted, "steps": len(clock.ids) - accepted}
        return clock.answer(**known)

    def answer(request: Request) -> list[Answer]:
        prompts = request["prompts"]
        with ThreadPoolExecutor(len(prompts)) as pool:
            streamed = list(pool.map(lambda prompt: timed(request, prompt), prompts))
        return [finished(request, prompt, *answer) for prompt, answer in zip(prompts, streamed, strict=True)]

    about = {"version": version("xllamacpp"), "file": config["gguf"].rsplit("/", 1)[-1]}
    return answer, about | {"system": " ".join(str(xllamacpp.get_system_info()).split())}


serve(make)
