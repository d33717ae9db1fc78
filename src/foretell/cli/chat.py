"""`foretell chat`: a conversation in the terminal.

Every turn sends the whole conversation; the engine finds the part that its cache already holds, so that a
long talk costs no more per turn than a short one. Ctrl-C stops an answer between two steps, where the cache
is in order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from foretell.cli.options import Loading, Sampling
from foretell.cli.speculation_notes import note_held_back
from foretell.cli.terminal import interruptible, note
from foretell.errors import ForetellError, UsageError

if TYPE_CHECKING:
    from foretell.api import LLM, Message, Result
    from foretell.engine import SpeculativeDecoder

HELP = """\
/clear  start a new conversation
/stats  how fast the answers were
/help   this list
/exit   leave (so does Ctrl-D)"""


def chat(
    loading: Loading,
    sampling: Sampling,
    system: Annotated[str | None, typer.Option("--system", help="Instructions before the first turn.")] = None,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D leaves; /help lists the commands."""
    if sampling.logprobs is not None:
        raise UsageError("--logprobs is for `foretell generate --json`; chat shows text only.")
    from foretell.prompt_files import check_text

    sampling.params()  # what can be refused is, before a model is loaded
    if system is not None:
        check_text(system, "--system")
    rule = sampling.rule()
    llm = loading.load()
    if not llm.tokenizer.has_chat_template:
        lacks = llm.tokenizer.lacks_template
        raise UsageError(f"{loading.model} {lacks}, so it cannot chat; use `foretell generate --raw`.")
    talk = Talk(llm, llm.decoder(1, rule, not sampling.no_adapt), sampling, system)
    if sys.stdin.isatty():
        note(f"{loading.model} with {loading.drafter}. /help lists the commands, Ctrl-D leaves.")
    for line in _lines():
        if line == "/exit":
            break
        if line.startswith("/"):
            talk.command(line)
        elif line:
            try:
                talk.answer(line)
            except ForetellError as mistake:
                note(f"error: {mistake}")


class Talk:
    """What was said so far, and the answers' statistics."""

    def __init__(self, llm: LLM, decoder: SpeculativeDecoder, sampling: Sampling, system: str | None):
        self.llm, self.decoder, self.params = llm, decoder, sampling.params()
        self.opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[Message] = list(self.opening)
        self.results: list[Result] = []

    def answer(self, text: str) -> None:
        """Streams the answer to a turn and remembers both; a turn that is refused is forgotten."""
        from foretell.api import Result
        from foretell.prompt_files import check_text

        check_text(text, "this turn")
        messages = [*self.messages, {"role": "user", "content": text}]
        ids, room = self.llm.encode(messages), self.llm.backbone.config.max_positions
        if len(ids) + self.params.max_new_tokens > room:
            raise UsageError(
                f"The conversation is now {len(ids)} tokens and leaves no room for an answer of "
                f"{self.params.max_new_tokens} in this model's context of {room}; /clear starts a new one."
            )
        result = Result()
        request = self.decoder.submit(ids, self.params, len(self.results))
        with interruptible() as interrupted:
            while self.decoder.busy and not interrupted:
                for event in self.decoder.events([request]):
                    result.add(event)
                    print(event.text, end="", flush=True)
        self.decoder.cancel(request)
        print(flush=True)
        if result.error:
            raise ForetellError(result.error)
        if interrupted:
            note("(stopped)")
        elif result.finish_reason == "length":
            note(f"(cut at {self.params.max_new_tokens} tokens; --max-new-tokens allows more)")
        self.messages = [*messages, {"role": "assistant", "content": result.text}]
        self.results.append(result)

    def command(self, line: str) -> None:
        from foretell.results import total

        match line:
            case "/clear":
                self.messages, self.results = list(self.opening), []
            case "/help":
                note(HELP)
            case "/stats":
                finished = [result for result in self.results if result.finish_reason]
                sums = total(finished)
                note(
                    f"answers: {len(finished)}, tokens: {sums.new_tokens} at {sums.tokens_per_second:.1f}/s, "
                    f"{sums.acceptance_length:.2f} tokens per step; in the cache already: "
                    f"{sums.reused_tokens} of {sums.prompt_tokens} prompt tokens"
                )
                note_held_back(sums, self.llm.backbone)
            case _:
                note(f"There is no command {line.split()[0]}; /help lists them.")


def _lines() -> Iterator[str]:
    """What the user types, or what is piped in, until it ends."""
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  gives input() its line editing
    while True:
        try:
            yield input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()
            return
        except UnicodeDecodeError as mistake:
            raise ForetellError("The input is not UTF-8 text; check the terminal's encoding.") from mistake
        except KeyboardInterrupt:
            if not terminal:
                raise
            note("\n(Ctrl-D or /exit leaves)")
