"""vLLM's engine: plain or with its n-gram speculation, or with heads exported for it."""

from __future__ import annotations

from typing import Any

from protocol import Answer, Clock, Request, serve


def make(config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import vllm
    from vllm import EngineArgs, LLMEngine, SamplingParams

    options = dict(config["options"])
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=config["model"], dtype={"bf16": "bfloat16", "fp32": "float32"}[config["dtype"]],
            max_model_len=config["context"], max_num_seqs=max(1, config["rows"]), enforce_eager=True,
            enable_prefix_caching=False, speculative_config=options or None, disable_log_stats=True,
        )
    )  # fmt: skip
    count = 0

    def answer(request: Request) -> list[Answer]:
        nonlocal count
        params = SamplingParams(
            max_tokens=request["new_tokens"], temperature=request["temperature"], seed=request["seed"],
            stop_token_ids=request["ends"], detokenize=False,
        )  # fmt: skip
        clocks, done = {}, {}
        for prompt in request["prompts"]:
            count += 1
            clocks[str(count)] = Clock()
            engine.add_request(str(count), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                clock = clocks[output.request_id]
                clock.add(list(output.outputs[0].token_ids)[len(clock.ids) :])
                if output.finished:
                    done[output.request_id] = clock.answer()
        return [done[name] for name in clocks]

    return answer, {"version": vllm.__version__}


if __name__ == "__main__":  # the engine may start processes that import this file again
    serve(make)
