"""transformers' `generate`: greedy or sampled, with prompt lookup, or drafting with its own first layers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from protocol import Answer, Clock, Request, serve
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer


class Arrivals(BaseStreamer):
    """Passes the tokens of each step to a clock; the first call carries the prompt."""

    def __init__(self, clock: Clock):
        self.clock, self.prompt = clock, True

    def put(self, value: Any) -> None:
        if not self.prompt:
            self.clock.add(value.flatten().tolist())
        self.prompt = False

    def end(self) -> None:
        pass


def make(config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    torch.set_num_threads(config["threads"])
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config["dtype"]]
    model = AutoModelForCausalLM.from_pretrained(config["model"], dtype=dtype).to(config["device"]).eval()
    options = dict(config["options"])
    if options.get("assistant_early_exit") == 0:
        options["assistant_early_exit"] = model.config.num_hidden_layers // 3

    def answer(request: Request) -> list[Answer]:
        prompts = request["prompts"]
        longest = max(map(len, prompts))
        sampling: dict[str, Any] = {"do_sample": False}
        if request["temperature"]:
            torch.manual_seed(request["seed"])
            sampling = {"do_sample": True, "temperature": request["temperature"], "top_k": 0, "top_p": 1.0}
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=config["device"])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=config["device"])
        clock = Clock()
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=request["new_tokens"], pad_token_id=0,
                eos_token_id=request["ends"], streamer=Arrivals(clock) if len(prompts) == 1 else None,
                **sampling, **options,
            )  # fmt: skip
        found = []
        for row in out[:, longest:].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in request["ends"]), len(row))
            found.append(clock.answer() | {"ids": row[:end]} | ({} if len(prompts) == 1 else {"arrivals": []}))
        return found

    return answer, {"version": transformers.__version__, "given": options}


serve(make)
