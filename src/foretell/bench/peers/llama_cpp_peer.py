"""llama.cpp's own server, in process (xllamacpp), on a GGUF file."""

from __future__ import annotations

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

    def one(request: Request, prompt: list[int]) -> Answer:
        clock, told = Clock(), {}

        def hear(chunk: dict[str, Any]) -> None:
            if "error" in chunk:
                raise RuntimeError(chunk["error"])
            clock.add(chunk["__verbose"]["tokens"])
            told.update(chunk["__verbose"].get("timings", {}))

        server.handle_completions(
            {"prompt": prompt, "max_tokens": request["new_tokens"], "temperature": request["temperature"],
             "seed": request["seed"], "top_k": 0, "top_p": 1.0, "min_p": 0.0, "cache_prompt": False, "stream": True,
             "return_tokens": True, "verbose": True},
            hear,
        )  # fmt: skip
        known = {"prefill_seconds": told["prompt_ms"] / 1e3} if "prompt_ms" in told else {}
        if told.get("draft_n"):
            known |= {"drafted": told["draft_n"], "accepted": told["draft_n_accepted"]}
            known["steps"] = len(clock.ids) - told["draft_n_accepted"]
        return clock.answer(**known)

    def answer(request: Request) -> list[Answer]:
        with ThreadPoolExecutor(len(request["prompts"])) as pool:
            return list(pool.map(lambda prompt: one(request, prompt), request["prompts"]))

    return answer, {"version": version("xllamacpp"), "file": config["gguf"].rsplit("/", 1)[-1]}


serve(make)
