"""Conversations side by side: lists of user turns, answered by one decoder.

A turn is answered after everything said before it, so the turns of one conversation wait for each other;
conversations do not. The decoder holds as many of them as it has rows. A conversation's next turn is submitted
before any new conversation, while its row's cache still holds what was said.

The noise of sampling belongs to (seed, key, position), and a turn's key is line * 1024 + turn: neither the
batch size nor the order in which rows finish changes a token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence

from foretell.api import LLM, Message
from foretell.engine import Driver
from foretell.errors import ForetellError, UsageError
from foretell.prompt_files import MAX_TURNS, Conversation
from foretell.requests import Decoder, Event, Request, SamplingParams
from foretell.results import Result

__all__ = ["MAX_TURNS", "Conversation", "converse"]


def converse(
    llm: LLM,
    decoder: Decoder,
    conversations: Sequence[Conversation],
    params: SamplingParams,
    *,
    rows: int = 1,
    raw: bool = False,
    on_event: Callable[[int, Event], None] | None = None,
    on_error: Callable[[int, ForetellError], None] | None = None,
) -> Generator[tuple[int, list[Result]], None, None]:
    """Answers every conversation, `rows` at a time; yields (index, replies) as each one ends.

    First turns are checked before anything is decoded. Closing the generator cancels what is unfinished; the decoder
    stays usable.

    Args:
        raw: turns are plain text, without a chat template.
        on_event: called with (index, event) for all that the decoder emits.
        on_error: called with (index, error) when a later turn does not fit the model's context, or an answer ends
            with an error; the conversation ends with the replies it has, and the others continue. Without it, such a
            turn raises.

    Raises:
        UsageError: a turn does not fit the model's context; the sentence names the conversation.
        ForetellError: an answer ended with an error, likewise.
    """
    params = params.seeded()
    dialogues = [_Dialogue(llm, conversation, params, raw) for conversation in conversations]
    for dialogue in dialogues:
        dialogue.request(decoder)
    waiting = deque(range(len(dialogues)))
    with Driver[int](decoder) as driver:
        while waiting or driver.unfinished:
            while waiting and driver.unfinished < rows:
                index = waiting.popleft()
                driver.submit(index, dialogues[index].request(decoder))
            for index, event in driver.step():
                dialogue = dialogues[index]
                if on_event:
                    on_event(index, event)
                if not dialogue.add(event):
                    continue
                try:
                    dialogue.raise_error(event)
                    if dialogue.unanswered:
                        driver.submit(index, dialogue.request(decoder))
                        continue
                except ForetellError as error:
                    if on_error is None:
                        raise
                    on_error(index, error)
                yield index, dialogue.replies


class _Dialogue:
    """One conversation in progress: what was said, and the turns still to be answered."""

    def __init__(self, llm: LLM, conversation: Conversation, params: SamplingParams, raw: bool) -> None:
        self.llm, self.conversation, self.params, self.raw = llm, conversation, params, raw
        self.messages: list[Message] = []
        self.replies: list[Result] = []
        self.reply = Result()

    @property
    def unanswered(self) -> int:
        """Turns that have no answer yet."""
        return len(self.conversation.turns) - len(self.replies)

    def request(self, decoder: Decoder) -> Request:
        """The next turn, after everything said before it.

        Raises:
            UsageError: the decoder would refuse it; the sentence names the turn.
        """
        turn = len(self.replies)
        text = self.conversation.turns[turn]
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.llm.encode(text, raw=True) if self.raw else self.llm.encode(messages)
        try:
            decoder.check(ids, self.params)
        except UsageError as error:
            raise type(error)(self._named(str(error), turn)) from error
        return Request(ids, self.params, self.conversation.line * MAX_TURNS + turn)

    def add(self, event: Event) -> bool:
        """Appends what was emitted; returns whether the turn is answered."""
        self.reply.add(event)
        if not event.finish_reason:
            return False
        self.messages += [
            {"role": "user", "content": self.conversation.turns[len(self.replies)]},
            {"role": "assistant", "content": self.reply.text},
        ]
        self.replies.append(self.reply)
        self.reply = Result()
        return True

    def raise_error(self, event: Event) -> None:
        """Raises the error that ended the last answer, if one did."""
        if event.error:
            raise ForetellError(self._named(event.error, len(self.replies) - 1))

    def _named(self, sentence: str, turn: int) -> str:
        where = self.conversation.where + (f", turn {turn + 1}" if turn else "")
        return f"{where}: {sentence}" if where else sentence
