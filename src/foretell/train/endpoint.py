"""Answers from an OpenAI-compatible endpoint: the model that is to be drafted for, served by a larger machine.

Conversations are asked side by side, each turn after the answer to the one before. What comes back is text; it is
read with the local model's tokenizer. Requests that fail for a passing reason are made again, later and later.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Any

import requests

from foretell.api import LLM, Result
from foretell.backbone.files import one_line
from foretell.contracts import SamplingParams
from foretell.conversations import Conversation
from foretell.errors import ForetellError, UsageError

KEY = "OPENAI_API_KEY"
"""Environment variable with the key to send, if the endpoint wants one."""
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""Replies after which a request is made again."""
TRIES = 6
SECONDS = 600.0
"""Longest wait for one answer."""


@dataclass
class Endpoint:
    """Where the model is served.

    Attributes:
        url: up to and including /v1.
        model: the name it is served by; by default the first that the endpoint lists.
        pause: seconds before the first repetition; doubled at each.
    """

    url: str
    model: str = ""
    pause: float = 1.0

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"The endpoint {self.url!r} is no address; give one such as http://localhost:8000/v1.")

    @property
    def _headers(self) -> dict[str, str]:
        key = os.environ.get(KEY)
        return {"Authorization": f"Bearer {key}"} if key else {}

    def connect(self) -> str:
        """The name of the served model; refuses an endpoint that does not serve it.

        Raises:
            ForetellError: the endpoint does not answer, or does not know the model.
        """
        reply = self._reply("GET", "/models")
        try:
            names = [each["id"] for each in reply.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise self._odd(reply) from error
        if not names or (self.model and self.model not in names):
            raise ForetellError(
                f"{self.url} does not serve {self.model or 'a model'}; it serves {', '.join(names) or 'none'}."
            )
        self.model = self.model or names[0]
        return self.model

    def converse(
        self,
        llm: LLM,
        conversations: Sequence[Conversation],
        params: SamplingParams,
        *,
        rows: int,
        on_reply: Callable[[Result], None] = lambda reply: None,
    ) -> Generator[tuple[int, list[Result]], None, None]:
        """Answers all conversations, `rows` at a time.

        Returns:
            (place, the replies) in the order in which conversations end; fewer replies than turns where the context
            was full.
        """
        end, stopped = turn_end(llm), threading.Event()
        left, done = Queue[tuple[int, Conversation]](), Queue[tuple[int, list[Result] | Exception]]()
        for numbered in enumerate(conversations):
            left.put(numbered)

        def work() -> None:
            while not stopped.is_set():
                try:
                    index, conversation = left.get_nowait()
                except Empty:
                    return
                try:
                    done.put((index, self._answer(llm, end, conversation, params, stopped)))
                except Exception as error:  # the reader raises it, whatever it is: left here, it would wait for ever
                    done.put((index, error))
                    stopped.set()

        try:
            for _ in range(min(rows, len(conversations))):  # daemons: nobody waits for an answer that is not wanted
                threading.Thread(target=work, name="endpoint", daemon=True).start()
            for _ in conversations:
                index, found = done.get()
                if isinstance(found, Exception):
                    raise found
                for reply in found:
                    on_reply(reply)
                yield index, found
        finally:
            stopped.set()

    def _answer(
        self, llm: LLM, end: list[int], conversation: Conversation, params: SamplingParams, stopped: threading.Event
    ) -> list[Result]:
        messages: list[dict[str, str]] = []
        replies: list[Result] = []
        for turn in conversation.turns:
            messages.append({"role": "user", "content": turn})
            body: dict[str, Any] = {
                "model": self.model, "messages": messages, "max_tokens": params.max_new_tokens,
                "temperature": params.temperature, "top_p": params.top_p,
            }  # fmt: skip
            if params.temperature:
                body["seed"] = (params.seed * 1_000_003 + conversation.line) % 2**31
            reply = self._reply("POST", "/chat/completions", body, stopped)
            if reply.status_code == 400 and (replies or "context" in reply.text.lower()):
                break  # so do servers say that a conversation does not fit, or no longer
            try:
                choice = reply.json()["choices"][0]
                text, finished = choice["message"]["content"] or "", choice["finish_reason"]
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise self._odd(reply) from error
            ids = llm.tokenizer.encode(text) + (end if finished == "stop" else [])
            replies.append(Result(ids, text, finished))
            messages.append({"role": "assistant", "content": text})
        return replies

    def _reply(
        self, verb: str, path: str, body: dict[str, Any] | None = None, stopped: threading.Event | None = None
    ) -> requests.Response:
        """The endpoint's answer, be it 200 or 400; asked for again while the trouble may pass."""
        trouble, stopped = "", stopped or threading.Event()
        for attempt in range(TRIES):
            if stopped.wait(self.pause * 2 ** (attempt - 1) if attempt else 0):
                raise ForetellError("The run was stopped.")
            try:
                reply = requests.request(verb, self.url + path, json=body, headers=self._headers, timeout=(10, SECONDS))
            except requests.RequestException as error:
                trouble = one_line(error)
                if verb == "GET":  # nobody was ever there
                    break
                continue
            if reply.status_code in (200, 400):
                return reply
            trouble = f"{reply.status_code} {_said(reply)}"
            if reply.status_code not in PASSING:
                break
        raise ForetellError(
            f"{self.url} does not answer as an OpenAI-compatible server does ({trouble}); check the address and {KEY}, "
            "then give the same command: it goes on where it was."
        )

    def _odd(self, reply: requests.Response) -> ForetellError:
        return ForetellError(f"{self.url} answered with something else: {reply.status_code} {_said(reply)}.")


def _said(reply: requests.Response) -> str:
    return one_line(Exception(reply.text or reply.reason or "nothing"), 100)


def turn_end(llm: LLM) -> list[int]:
    """The token with which the model ends its turn: text that comes back lacks it."""
    ends = llm.backbone.config.eos_ids
    asked = [{"role": "user", "content": "?"}]
    told = [*asked, {"role": "assistant", "content": "!"}]
    before = llm.tokenizer.chat(asked)
    after = llm.tokenizer.chat(told, add_generation_prompt=False)[len(before) :]
    return [token for token in after if token in ends][:1] or list(ends[:1])
