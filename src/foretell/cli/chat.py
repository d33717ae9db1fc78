"""`foretell chat`: a conversation in the terminal.

Every turn sends the whole conversation; the engine finds the part that its cache already holds, so that a
long conversation costs no more per turn than a short one. Ctrl-C stops an answer between two steps, where the cache
is in order.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foretell.cli.chat_files import read_conversation, save_conversation
from foretell.cli.chat_input import QUOTES, TurnReader, open_reader, unquoted
from foretell.cli.chat_output import AnswerWriter, dim
from foretell.cli.options import Loading, Sampling, flag
from foretell.cli.speculation_notes import held_back
from foretell.cli.terminal import interruptible, note
from foretell.cli.wording import note_error
from foretell.errors import ForetellError, UsageError
from foretell.prompt_files import check_text
from foretell.requests import Event, Request, SamplingParams, Statistics
from foretell.results import Result, total

if TYPE_CHECKING:
    from foretell.api import LLM, Message
    from foretell.requests import Decoder

COMMANDS = {
    "/system": ("[TEXT]", 'show or set the system prompt; "" removes it'),
    "/regen": ("", "answer the last turn anew"),
    "/save": ("FILE", "write the conversation as JSON"),
    "/load": ("FILE", "continue a saved conversation"),
    "/clear": ("", "start a new conversation"),
    "/stats": ("[on|off]", "how fast the answers were; on: after each answer"),
    "/help": ("", "this list"),
    "/exit": ("", "leave (so does Ctrl-D)"),
}
"""Name -> (arguments, what it does)."""

HELP = "\n".join(
    [
        *(f"{f'{name} {arguments}':18}{help}" for name, (arguments, help) in COMMANDS.items()),
        f"{QUOTES:18}begin and end a turn of several lines",
    ]
)

ANSWER_TOKENS, MIN_ANSWER_TOKENS = 1024, 64
"""Default limit of an answer, and how far it shrinks where the model's context ends."""


@dataclass(frozen=True, kw_only=True)
class ChatSampling(Sampling):
    """Sampling options of a chat."""

    max_new_tokens: int | None = flag(
        None,
        f"Maximum number of tokens of an answer; by default {ANSWER_TOKENS}, fewer at the end of the model's context.",
        "-n",
    )
    logprobs: int | None = flag(None, "Only for `foretell generate --json`.", hidden=True)

    def params(self) -> SamplingParams:
        limit = ANSWER_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        return Sampling.params(replace(self, max_new_tokens=limit))


def chat(
    loading: Loading,
    sampling: ChatSampling,
    system: Annotated[str | None, typer.Option("--system", help="Instructions before the first turn.")] = None,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D leaves; /help lists the commands."""
    if sampling.logprobs is not None:
        raise UsageError("--logprobs is for `foretell generate --json`; chat shows text only.")
    params = sampling.params()  # refuses bad values before a model is loaded
    if system is not None:
        check_text(system, "--system")
    loading.check()
    at_keyboard = sys.stdin.isatty()
    if at_keyboard:
        note(f"loading {loading.model} ...")
    reader = open_reader()
    with reader.silence():
        rule = sampling.rule()
        llm = loading.load()
        if not llm.tokenizer.has_chat_template:
            lacks = llm.tokenizer.lacks_template
            raise UsageError(f"{loading.model} {lacks}, so it cannot chat; use `foretell generate --raw`.")
        decoder = llm.decoder(1, rule, not sampling.no_adapt)
        conversation = Chat(llm, decoder, reader, params, shrinks=sampling.max_new_tokens is None)
        if system is not None:
            conversation.set_system(system)
    if at_keyboard:
        note(_banner(loading, llm))
    for turn in reader.turns():
        if turn == "/exit":
            break
        try:
            with reader.silence():
                conversation.take(turn)
        except ForetellError as error:
            note_error(error)


def _banner(loading: Loading, llm: LLM) -> str:
    from foretell.drafters.prompt_lookup import WithLookup

    lookup = " with lookup" if isinstance(llm.drafter, WithLookup) else ""
    return (
        f"{loading.model}, drafter {loading.drafter}{lookup}, context of {llm.backbone.config.max_positions} tokens. "
        "/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves."
    )


class Chat:
    """A conversation and the statistics of its answers.

    Args:
        params: of every answer.
        shrinks: an answer's limit is lowered to what the model's context has left.
    """

    def __init__(
        self, llm: LLM, decoder: Decoder, reader: TurnReader, params: SamplingParams, *, shrinks: bool
    ) -> None:
        self.llm, self.decoder, self.reader, self.params, self.shrinks = llm, decoder, reader, params, shrinks
        self.system: str | None = None
        self.messages: list[Message] = []  # the system prompt is not among them
        self.results: list[Result] = []  # without a finish reason: stopped
        self.shows_stats = False

    def take(self, turn: str) -> None:
        """Does a command, answers anything else; `turn` may stand between triple quotes.

        Raises:
            ForetellError: it cannot be done; the conversation is as before.
        """
        if turn.startswith("/"):
            self.command(turn)
        elif turn:
            self.answer(unquoted(turn))

    def answer(self, text: str) -> None:
        """Streams the answer to a turn and remembers both.

        Raises:
            ForetellError: the turn is refused, or the answer ended in an error; the conversation is as before.
        """
        check_text(text, "this turn")
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.llm.encode([*self._opening(self.system), *messages])
        params = self._limited(len(ids))
        result = self._stream(ids, params)
        if result.error:
            raise ForetellError(result.error)
        self.messages = [*messages, {"role": "assistant", "content": result.text}]
        self.results.append(result)
        if not result.finish_reason:
            note("(stopped)")
        elif result.finish_reason == "length":
            full = params.max_new_tokens < self.params.max_new_tokens
            remedy = ": the context is full; /clear starts anew" if full else "; --max-new-tokens allows more"
            note(f"(cut at {params.max_new_tokens} tokens{remedy})")
        if self.shows_stats:
            note(dim(self._speed(result)))

    def _limited(self, prompt_tokens: int) -> SamplingParams:
        """The parameters of an answer to a prompt of so many tokens.

        Raises:
            UsageError: the model's context has no room for it.
        """
        room, params = self.llm.backbone.config.max_positions, self.params
        if self.shrinks:
            limit = min(params.max_new_tokens, max(room - prompt_tokens, MIN_ANSWER_TOKENS))
            params = replace(params, max_new_tokens=limit)
        if prompt_tokens + params.max_new_tokens > room:
            raise UsageError(
                f"The conversation is now {prompt_tokens} tokens and leaves no room for an answer of "
                f"{params.max_new_tokens} in this model's context of {room}; /clear starts a new one."
            )
        return params

    def _stream(self, ids: list[int], params: SamplingParams) -> Result:
        """Shows an answer as it is decoded; one that is stopped has no finish reason, and statistics of its own."""
        result, writer, steps, began = Result(), AnswerWriter(), 0, time.perf_counter()
        for event in self._events(ids, params):
            result.add(event)
            steps += bool(event.tokens)
            writer.write(event.text)
        writer.close()
        if not result.finish_reason:
            seconds = time.perf_counter() - began
            result.statistics = Statistics(new_tokens=len(result.ids), steps=steps, seconds=seconds)
        return result

    def _events(self, ids: list[int], params: SamplingParams) -> Iterator[Event]:
        """Yields the decoder's events until the answer ends or Ctrl-C or Ctrl-D stops it."""
        from foretell.engine import Driver

        key = len(self.results)  # fixes the noise of sampling: no two answers share it
        with Driver[None](self.decoder) as driver, interruptible() as interrupted:
            driver.submit(None, Request(ids, params, key))
            while driver.unfinished and not (interrupted or self.reader.has_left()):
                for _, event in driver.step():
                    yield event

    # -- commands ---------------------------------------------------------------------------------------------------

    def command(self, line: str) -> None:
        """Does what a line beginning with a slash asks for.

        Raises:
            ForetellError: it cannot be done; the conversation is as before.
        """
        name, _, argument = line.partition(" ")
        match name, argument.strip():
            case "/help", "":
                note(HELP)
            case "/system", "":
                note(self.system or "There is no system prompt; the model's chat template may have one of its own.")
            case "/system", text:
                self.set_system(None if text == '""' else text)
            case "/regen", "":
                self._regenerate()
            case "/save", path if path:
                save_conversation(Path(path).expanduser(), [*self._opening(self.system), *self.messages])
                note(f"saved {path}")
            case "/load", path if path:
                self._load(Path(path).expanduser())
            case "/clear", "":
                self.messages, self.results = [], []
            case "/stats", "":
                self._note_totals()
            case "/stats", "on" | "off" as choice:
                self.shows_stats = choice == "on"
            case _ if name in COMMANDS:
                raise UsageError(f"{line!r} does not fit the command; write {f'{name} {COMMANDS[name][0]}'.strip()}.")
            case _:
                raise UsageError(f"There is no command {name}; /help lists them.")

    def set_system(self, text: str | None) -> None:
        """Changes the system prompt, from the next answer on.

        Raises:
            ForetellError: the chat template has no place for one.
        """
        if text is not None:
            check_text(text, "the system prompt")
            self.llm.encode([*self._opening(text), {"role": "user", "content": "hello"}])
        self.system = text

    @staticmethod
    def _opening(system: str | None) -> list[Message]:
        return [] if system is None else [{"role": "system", "content": system}]

    def _regenerate(self) -> None:
        if not self.messages:
            raise UsageError("There is no answer yet that could be written anew.")
        before = self.messages
        *self.messages, turn, _ = before
        try:
            self.answer(turn["content"])
        except BaseException:
            self.messages = before
            raise
        if self.messages == before and not self.params.temperature:
            note("(the same answer: it is always the most probable one; --temperature 0.7 samples)")

    def _load(self, path: Path) -> None:
        messages = read_conversation(path)
        opening = [message for message in messages[:1] if message["role"] == "system"]
        self.llm.encode(messages)  # what the chat template refuses is not taken over
        self.system = opening[0]["content"] if opening else None
        self.messages, self.results = messages[len(opening) :], []
        note(f"loaded {path}: turns: {len(self.messages) // 2}")

    def _note_totals(self) -> None:
        sums, stopped = total(self.results), sum(not result.finish_reason for result in self.results)
        note(
            f"answers: {len(self.results)}{f' ({stopped} stopped)' if stopped else ''}, tokens: {sums.new_tokens} at "
            f"{sums.tokens_per_second:.1f}/s, {sums.acceptance_length:.2f} tokens per step{sums.sharing}; in the cache "
            f"already: {sums.reused_tokens} of {sums.prompt_tokens} prompt tokens"
        )
        if reason := held_back(sums, self.llm.backbone):
            note(reason)

    @staticmethod
    def _speed(result: Result) -> str:
        stats = result.statistics
        held = f"; held back in {stats.suspended_steps} of {stats.steps} steps" if stats.suspended_steps else ""
        return (
            f"({stats.new_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, "
            f"{stats.acceptance_length:.2f} tokens per step{stats.sharing}{held})"
        )
