"""Answers from an OpenAI-compatible endpoint: the model that is to be drafted for, served by a larger machine.

Conversations are asked side by side, each turn after the answer to the one before. The answers are text; the local
model's tokenizer encodes them, and the local model reads the first ones to check that it could have written them
(`agreement`). A request that fails for a passing reason is repeated, within bounds of time (`patiently`); a
conversation that the server refuses is dropped alone, with the reason.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import count
from queue import Queue
from random import random
from threading import Event, Thread
from time import monotonic
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai

from foretell.api import LLM
from foretell.conversations import Conversation
from foretell.errors import ForetellError, UsageError
from foretell.files import one_line
from foretell.requests import SamplingParams
from foretell.results import Result
from foretell.train.agreement import FLOOR, Agreement
from foretell.train.data import REFUSED

Reply = TypeVar("Reply")

KEY = "OPENAI_API_KEY"
"""Environment variable that holds the key, if the endpoint wants one."""
REJECTED = (400, 413, 422)
"""Statuses that are about one request: other conversations may be answered."""
PASSING = (408, 409, 425, 429)
"""Statuses after which a request is repeated, beside all from 500 up."""
TOO_LONG = re.compile("context|length|too long|maximum", re.IGNORECASE)
"""Matches what servers answer where a conversation does not fit into the context."""
CONNECT_SECONDS, SECONDS = 10.0, 600.0
"""Longest wait for a connection, and for one answer."""
PATIENCE = 120.0
"""Seconds between all repetitions of a request, added up: rates are limited by the minute."""
MIN_WAIT, MAX_WAIT = 0.5, 8.0
"""Seconds before the first repetition, doubled at each, and the most that this comes to."""
TIMEOUT_RETRIES = 2
"""Repetitions after a server that did not answer in time: it may hang for good."""
CONNECT_RETRIES = 2
"""Repetitions of the first request: an address that is wrong should not take two minutes to be reported."""
MIN_REFUSALS = 3
"""So many refusals before the first answer mean that the server is set up wrongly."""


@dataclass
class Endpoint:
    """A server, and the model that it serves.

    Attributes:
        url: up to and including /v1.
        model: the name it is served by; by default the first that the endpoint lists.
        other_model: accepts answers of another model than the local one.
        agreement: of the first answers with the local model.
    """

    url: str
    model: str = ""
    other_model: bool = False
    agreement: Agreement = field(default_factory=Agreement, init=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        if not _is_address(self.url):
            raise UsageError(f"The endpoint {self.url!r} is not a URL; give one such as http://localhost:8000/v1.")

    def connect(self) -> str:
        """Returns the name of the served model.

        Raises:
            ForetellError: the endpoint does not answer, or does not serve the model.
        """
        with self._client() as client, self._errors():
            reply = patiently(
                lambda timeout: client.models.with_raw_response.list(extra_headers=self._headers, timeout=timeout),
                retries=CONNECT_RETRIES,
            )
        try:
            names = [model["id"] for model in json.loads(reply.text)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise self._unreadable(reply) from error
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

        After an error nothing new is asked, and it is raised once the requests under way have ended and been yielded.

        Yields:
            (index, replies) in the order in which conversations end. The last reply has one of the finish reasons
            `REFUSED`, and the server's words for text, where the server refused to answer.

        Raises:
            ForetellError: the endpoint fails, refuses all of the first conversations, or serves another model.
        """
        end, todo = turn_end(llm), deque(enumerate(conversations))
        few = max(MIN_REFUSALS, min(rows, len(todo)))
        refused: list[tuple[int, list[Result]]] = []  # held back until the first answer: they may be asked again
        failed: Exception | None = None
        any_answer = False
        client = self._client()
        ended = in_threads(todo, rows, lambda *talk: self._answer(client, llm, end, params, *talk))
        with closing(ended):
            for index, replies in ended:
                if isinstance(replies, Exception):
                    failed = failed or replies
                    continue
                for reply in replies:
                    on_reply(reply)
                answered = replies[0].finish_reason not in REFUSED
                any_answer = any_answer or answered
                refused.append((index, replies))
                if any_answer:
                    yield from refused
                    refused.clear()
                    if answered and not failed:
                        self.agreement.add(llm, conversations[index].turns[0], replies[0], params.temperature)
                        failed = self._disagreement() if self.agreement.complete else None
                elif len(refused) == few:
                    failed = failed or ForetellError(
                        f"{self.url} answers none of the first {few} prompts (the last: {replies[0].text}); fix "
                        "what it reports, then give the same command: it asks them again."
                    )
                if failed:
                    todo.clear()
        # Closed only here, where no request is under way. Where this ends early, the client stays open until the last
        # thread lets go of it: a socket that is closed just as a thread begins to wait for it leaves the thread waiting
        # for whatever gets its number next.
        client.close()
        failed = failed or self._disagreement()
        if failed:
            raise failed
        yield from refused

    def _answer(
        self, client: openai.OpenAI, llm: LLM, end: list[int], params: SamplingParams, conversation: Conversation,
        stopped: Event,
    ) -> list[Result]:  # fmt: skip
        """Asks the turns of one conversation; the replies."""
        messages: list[Any] = []
        replies: list[Result] = []
        options: dict[str, Any] = {"temperature": params.temperature, "top_p": params.top_p}
        if params.temperature and params.seed is not None:
            options["seed"] = (params.seed * 1_000_003 + conversation.line) % 2**31
        for turn in conversation.turns:
            messages.append({"role": "user", "content": turn})
            try:
                with self._errors(REJECTED):
                    reply = patiently(
                        lambda timeout: client.chat.completions.with_raw_response.create(
                            model=self.model,
                            messages=messages,
                            max_tokens=params.max_new_tokens,
                            extra_headers=self._headers,
                            timeout=timeout,
                            **options,
                        ),
                        stopped,
                    )
            except openai.APIStatusError as error:
                reason = "too long" if TOO_LONG.search(error.response.text) else "rejected"
                return [*replies, Result([], _status(error), reason)]
            try:
                choice = json.loads(reply.text)["choices"][0]
                text, finished = choice["message"]["content"] or "", choice["finish_reason"]
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise self._unreadable(reply) from error
            if finished not in ("stop", "length"):  # a filter's words, or a tool's, are not the model's
                return [*replies, Result([], f"finish_reason {finished!r}", "unfinished")]
            replies.append(Result(llm.tokenizer.encode(text) + (end if finished == "stop" else []), text, finished))
            messages.append({"role": "assistant", "content": text})
        return replies

    def _client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=os.environ.get(KEY) or "none", max_retries=0)

    @property
    def _headers(self) -> dict[str, Any]:
        """Leaves out the key that the client insists on, where there is none."""
        return {} if os.environ.get(KEY) else {"Authorization": openai.Omit()}

    @contextmanager
    def _errors(self, let_through: Sequence[int] = ()) -> Iterator[None]:
        """Turns errors of the client into one sentence, except replies of the statuses in `let_through`."""
        try:
            yield
        except openai.OpenAIError as error:
            trouble = one_line(error.__cause__ or error)
            if isinstance(error, openai.APIStatusError):
                if error.status_code in let_through:
                    raise
                trouble = _status(error)
                if wait := error.response.headers.get("Retry-After"):
                    trouble += f", to be asked again after {wait} s"
            raise ForetellError(
                f"{self.url} does not answer as an OpenAI-compatible server does ({trouble}); check the address and "
                f"{KEY}, then give the same command: it goes on where it was."
            ) from error

    def _disagreement(self) -> ForetellError | None:
        """The error of an endpoint that serves another model than the local one."""
        if self.other_model or not self.agreement.poor:
            return None
        return ForetellError(
            f"{self.url} seems to serve another model ({self.model}): the local one agrees with its answers "
            f"{self.agreement.share:.0%} as often as with its own, where {FLOOR:.0%} is the least for the same model; "
            "serve the same one, or allow it with `other_model=True`."
        )

    def _unreadable(self, reply: Any) -> ForetellError:
        return ForetellError(f"{self.url} answered with something else: {reply.status_code} {_words(reply.text)}.")


def patiently(
    request: Callable[[openai.Timeout], Reply], stopped: Event | None = None, retries: int | None = None
) -> Reply:
    """Makes a request, and repeats it while the trouble may pass; returns the reply.

    The waits between repetitions grow, differ by chance so that conversations do not ask all at once, and add up to
    `PATIENCE` at most; all tries and waits together end after `SECONDS` + `PATIENCE`. A `Retry-After` in seconds is
    waited for if it is longer than the wait would have been; one beyond what is left is not, and the error is raised
    at once. A `Retry-After` that is a date is not read. (The client's own repetitions, which are turned off, bound
    their number alone, so that a server that hangs takes its timeout as often.)

    Args:
        request: called with its timeout.
        stopped: ends the waiting when it is set.
        retries: most repetitions; without a bound of their number by default.

    Raises:
        openai.OpenAIError: the last error.
    """
    began, waited, timeouts = monotonic(), 0.0, 0
    stopped = stopped or Event()
    for attempt in count():
        left = max(0.01, began + SECONDS + PATIENCE - monotonic())
        try:
            return request(openai.Timeout(min(SECONDS, left), connect=min(CONNECT_SECONDS, left)))
        except (openai.APIConnectionError, openai.APIStatusError) as error:
            status = error.status_code if isinstance(error, openai.APIStatusError) else None
            timeouts += isinstance(error, openai.APITimeoutError)
            asked = _retry_after(error)
            left = min(PATIENCE - waited, began + SECONDS + PATIENCE - monotonic())
            if (
                (status is not None and status not in PASSING and status < 500)
                or attempt == retries or timeouts > TIMEOUT_RETRIES or asked > left or left <= 0
            ):  # fmt: skip
                raise
            wait = min(max(asked, min(MIN_WAIT * 2**attempt, MAX_WAIT)) * (1 + random() / 4), left)
            waited += wait
            if stopped.wait(wait):
                raise
    raise AssertionError("count() does not end")


def _retry_after(error: openai.APIError) -> float:
    """Seconds that the server asks to wait; 0 where it does not."""
    text = error.response.headers.get("Retry-After", "") if isinstance(error, openai.APIStatusError) else ""
    return float(text) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text.strip()) else 0.0


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        return False


def _status(error: openai.APIStatusError) -> str:
    return f"{error.status_code} {_words(error.response.text or error.response.reason_phrase)}"


def _words(text: str) -> str:
    """A server's words, short enough for a sentence."""
    return one_line(Exception(text or "nothing"), 100)


def in_threads(
    todo: deque[tuple[int, Conversation]], rows: int, answer: Callable[[Conversation, Event], list[Result]]
) -> Generator[tuple[int, list[Result] | Exception], None, None]:
    """Calls `answer` for everything in `todo`, in `rows` threads; yields in the order of ending.

    After an exception, or once the caller clears `todo`, nothing more is taken from it. The event that `answer` is
    given is set when the generator is closed.
    """
    done, stopped = Queue[tuple[int, list[Result] | Exception] | None](), Event()

    def work() -> None:
        while todo and not stopped.is_set():
            try:
                index, conversation = todo.popleft()
            except IndexError:  # another thread was faster
                break
            try:
                done.put((index, answer(conversation, stopped)))
            except Exception as error:  # raised by the reader, who would wait for ever if it were lost here
                todo.clear()
                done.put((index, error))
        done.put(None)

    working = min(rows, len(todo))
    try:
        for _ in range(working):  # daemons: a program that ends does not wait for answers
            Thread(target=work, name="endpoint", daemon=True).start()
        while working:
            if found := done.get():
                yield found
            else:
                working -= 1
    finally:
        stopped.set()


def turn_end(llm: LLM) -> list[int]:
    """The token with which the model ends its turn: the text of an answer lacks it."""
    ends = llm.backbone.config.eos_ids
    question = [{"role": "user", "content": "?"}]
    answered = [*question, {"role": "assistant", "content": "!"}]
    before = llm.tokenizer.chat(question)
    after = llm.tokenizer.chat(answered, add_generation_prompt=False)[len(before) :]
    return [token for token in after if token in ends][:1] or list(ends[:1])
