"""Answers from an OpenAI-compatible endpoint: the model that is to be drafted for, served by a larger machine.

Conversations are asked side by side, each turn after the answer to the one before. What comes back is text; it is
read with the local model's tokenizer, and of the first answers the local model says whether they could be its own.
Requests that fail for a passing reason are made again, later and later; a conversation that the server will not
answer is dropped alone, with the reason.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from queue import Queue
from random import random
from threading import Event, Thread
from typing import Any

import requests
import torch

from foretell.api import LLM, Result
from foretell.backbone import Nodes
from foretell.conversations import Conversation
from foretell.errors import ForetellError, UsageError
from foretell.files import one_line
from foretell.requests import SamplingParams
from foretell.train.data import REFUSED

KEY = "OPENAI_API_KEY"
"""Environment variable with the key to send, if the endpoint wants one."""
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""Replies after which a request is made again."""
REJECTED = (400, 413, 422)
"""Replies that are about the request itself: other conversations may be answered."""
TOO_LONG = re.compile("context|length|too long|maximum", re.IGNORECASE)
"""So do servers say that a conversation does not fit, or no longer."""
TRIES = 8
"""With waits of two minutes in all: what servers ration, they ration by the minute."""
SECONDS = 600.0
"""Longest wait for one answer, or before one request is made again."""
SILENT = 3
"""So many conversations without any answer, before there was one, are no accident."""

JUDGED, ENOUGH = 8, 32
"""Conversations, and tokens at least, that the local model reads before it judges the server."""
READ, LONGEST = 256, 2048
"""Most tokens of an answer that it reads, and of a prompt."""
FLOOR = 0.8
"""Least agreement of the same model, whose arithmetic costs a few per cent; of others few come as high."""


@dataclass
class Agreement:
    """How far answers are what the local model would have written itself.

    Counted are the tokens that it holds most probable, after the text before them. Of its own greedy answers all are;
    at temperature T it writes that token with probability max p_T only, so the count is measured against the sum of
    these. (With top-p it writes it more often, which makes the measure a mild one.)
    """

    conversations: int = 0
    tokens: int = 0
    chosen: int = 0
    expected: float = 0.0
    variance: float = 0.0

    @property
    def share(self) -> float:
        return self.chosen / self.expected

    @property
    def poor(self) -> bool:
        """Whether another model wrote this: chance, of two standard deviations, is on its side."""
        return self.tokens >= ENOUGH and self.chosen + 2 * self.variance**0.5 < FLOOR * self.expected

    def add(self, llm: LLM, turn: str, reply: Result, temperature: float) -> None:
        """Reads the answer to a first turn, in one pass; nothing more once it has read enough."""
        if self.conversations >= JUDGED and self.tokens >= ENOUGH:
            return
        prompt = llm.encode([{"role": "user", "content": turn}])
        told = reply.ids[: max(0, min(READ, llm.backbone.config.max_positions - len(prompt)))]
        if not told or len(prompt) > LONGEST:
            return
        backbone, count = llm.backbone, len(prompt) + len(told) - 1
        tokens = torch.tensor([*prompt, *told])
        states_Md = backbone.forward(tokens[:-1], Nodes.chains([0], [0], [count]), backbone.new_cache(1, count))
        logits_PV = backbone.logits(states_Md[len(prompt) - 1 :]).float().cpu()
        p_P = (logits_PV / temperature).softmax(-1).amax(-1) if temperature else torch.ones(len(told))
        self.conversations += 1
        self.tokens += len(told)
        self.chosen += int((logits_PV.argmax(-1) == tokens[len(prompt) :]).sum())
        self.expected += float(p_P.sum())
        self.variance += float((p_P * (1 - p_P)).sum())


@dataclass
class Endpoint:
    """Where the model is served.

    Attributes:
        url: up to and including /v1.
        model: the name it is served by; by default the first that the endpoint lists.
        pause: seconds before the first repetition; doubled at each.
        other_model: go on where another model than the local one answers.
        agreement: with the local model, of the first answers.
    """

    url: str
    model: str = ""
    pause: float = 1.0
    other_model: bool = False
    agreement: Agreement = field(default_factory=Agreement, init=False)

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

        After an error nothing new is asked, and it is raised when what was under way has ended and been yielded.

        Returns:
            (place, the replies) in the order in which conversations end; the last is `REFUSED`, with the server's
            words, where it would not answer.

        Raises:
            ForetellError: the endpoint fails, refuses the first conversations all alike, or serves another model.
        """
        end, left = turn_end(llm), deque(enumerate(conversations))
        few = max(SILENT, min(rows, len(left)))
        waiting: list[tuple[int, list[Result]]] = []  # until something is answered: a broken server drops nothing
        failed: Exception | None = None
        heard = False
        found = side_by_side(left, rows, lambda each, stopped: self._answer(llm, end, each, params, stopped))
        with closing(found):
            for index, replies in found:
                if isinstance(replies, Exception):
                    failed = failed or replies
                    continue
                for reply in replies:
                    on_reply(reply)
                answered = replies[0].finish_reason not in REFUSED
                heard = heard or answered
                waiting.append((index, replies))
                if heard:
                    yield from waiting
                    waiting.clear()
                    if answered and not failed:
                        self.agreement.add(llm, conversations[index].turns[0], replies[0], params.temperature)
                        failed = self._other() if self.agreement.conversations >= JUDGED else None
                elif len(waiting) == few:
                    failed = failed or ForetellError(
                        f"{self.url} answers none of the first {few} prompts (the last: {replies[0].text}); mend what "
                        "it complains of, then give the same command: it asks them again."
                    )
                if failed:
                    left.clear()
        failed = failed or self._other()
        if failed:
            raise failed
        yield from waiting

    def _other(self) -> ForetellError | None:
        """What is to be said where another model than the local one answers."""
        if self.other_model or not self.agreement.poor:
            return None
        return ForetellError(
            f"{self.url} seems to serve another model ({self.model}): the local one agrees with its answers "
            f"{self.agreement.share:.0%} as often as with its own, where {FLOOR:.0%} is the least for the same model; "
            "serve the same one, or allow it with --other-model."
        )

    def _answer(
        self, llm: LLM, end: list[int], conversation: Conversation, params: SamplingParams, stopped: Event
    ) -> list[Result]:
        messages: list[dict[str, str]] = []
        replies: list[Result] = []
        for turn in conversation.turns:
            messages.append({"role": "user", "content": turn})
            body: dict[str, Any] = {
                "model": self.model, "messages": messages, "max_tokens": params.max_new_tokens,
                "temperature": params.temperature, "top_p": params.top_p,
            }  # fmt: skip
            if params.temperature and params.seed is not None:
                body["seed"] = (params.seed * 1_000_003 + conversation.line) % 2**31
            reply = self._reply("POST", "/chat/completions", body, stopped)
            if reply.status_code in REJECTED:
                reason = "too long" if TOO_LONG.search(reply.text) else "rejected"
                return [*replies, Result([], f"{reply.status_code} {_said(reply)}", reason)]
            try:
                choice = reply.json()["choices"][0]
                text, finished = choice["message"]["content"] or "", choice["finish_reason"]
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise self._odd(reply) from error
            if finished not in ("stop", "length"):  # a filter's words, or a tool's, are not the model's
                return [*replies, Result([], f"finish_reason {finished!r}", "unfinished")]
            ids = llm.tokenizer.encode(text) + (end if finished == "stop" else [])
            replies.append(Result(ids, text, finished))
            messages.append({"role": "assistant", "content": text})
        return replies

    def _reply(
        self, verb: str, path: str, body: dict[str, Any] | None = None, stopped: Event | None = None
    ) -> requests.Response:
        """The endpoint's answer, be it 200 or a rejection; asked for again while the trouble may pass."""
        trouble, told, stopped = "", 0.0, stopped or Event()
        for attempt in range(TRIES):
            wait = max(told, self.pause * 2 ** (attempt - 1)) * (1 + random() / 4) if attempt else 0  # not all at once
            if stopped.wait(wait):
                raise ForetellError("The run was stopped.")
            try:
                reply = requests.request(verb, self.url + path, json=body, headers=self._headers, timeout=(10, SECONDS))
            except requests.RequestException as error:
                trouble, told = one_line(error), 0.0
                if verb == "GET":  # nobody was ever there
                    break
                continue
            if reply.status_code == 200 or reply.status_code in REJECTED:
                return reply
            trouble, told = f"{reply.status_code} {_said(reply)}", _retry_after(reply)
            if told > SECONDS:
                trouble += f", to be asked again after {told:.0f} s"
            if reply.status_code not in PASSING or told > SECONDS:
                break
        raise ForetellError(
            f"{self.url} does not answer as an OpenAI-compatible server does ({trouble}); check the address and {KEY}, "
            "then give the same command: it goes on where it was."
        )

    def _odd(self, reply: requests.Response) -> ForetellError:
        return ForetellError(f"{self.url} answered with something else: {reply.status_code} {_said(reply)}.")


def _said(reply: requests.Response) -> str:
    return one_line(Exception(reply.text or reply.reason or "nothing"), 100)


def _retry_after(reply: requests.Response) -> float:
    """Seconds that the server wants to be left alone for; a date there counts as nothing."""
    told = reply.headers.get("Retry-After", "").strip()
    return float(told) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", told) else 0.0


def side_by_side(
    left: deque[tuple[int, Conversation]], rows: int, act: Callable[[Conversation, Event], list[Result]]
) -> Generator[tuple[int, list[Result] | Exception], None, None]:
    """What `act` makes of all that is left, by `rows` threads, in the order of ending.

    After an exception no more is taken, and what was taken is done to its end; the same if `left` is cleared.
    """
    done, stopped, working = Queue[tuple[int, list[Result] | Exception] | None](), Event(), min(rows, len(left))

    def work() -> None:
        while not stopped.is_set():
            try:
                index, conversation = left.popleft()
            except IndexError:
                break
            try:
                done.put((index, act(conversation, stopped)))
            except Exception as error:  # the reader raises it, whatever it is: left here, it would wait for ever
                left.clear()
                done.put((index, error))
        done.put(None)

    try:
        for _ in range(working):  # daemons: where the reader stops, nobody waits for an answer that is not wanted
            Thread(target=work, name="endpoint", daemon=True).start()
        while working:
            found = done.get()
            if found:
                yield found
            else:
                working -= 1
    finally:
        stopped.set()


def turn_end(llm: LLM) -> list[int]:
    """The token with which the model ends its turn: text that comes back lacks it."""
    ends = llm.backbone.config.eos_ids
    asked = [{"role": "user", "content": "?"}]
    told = [*asked, {"role": "assistant", "content": "!"}]
    before = llm.tokenizer.chat(asked)
    after = llm.tokenizer.chat(told, add_generation_prompt=False)[len(before) :]
    return [token for token in after if token in ends][:1] or list(ends[:1])
