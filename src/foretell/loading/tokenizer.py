"""Text to token ids and back, and a conversation to the prompt the model was trained on.

The ids are those of transformers, but importing it takes most of a second, so its two jobs are done directly:
tokenizer.json is run by the `tokenizers` library, and the chat template, an untrusted Jinja program that came with
the weights, is rendered in the same kind of sandbox. transformers is imported only for folders without a
tokenizer.json.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretell.errors import ForetellError, ForetellWarning
from foretell.files import one_line, read_json
from foretell.loading.detokenizer import Detokenizer, Kind, follow

if TYPE_CHECKING:
    import jinja2
    import tokenizers

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}
ENDS = frozenset(
    ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>", "[EOT]", "<end_of_utterance>")
) | {"<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>"}  # fmt: skip
"""Marks that end a turn or a text if they are special tokens; checkpoints often declare only one of several."""


class Tokenizer:
    """The tokenizer of a model folder."""

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        settings: Mapping[str, Any],
        template: str | Mapping[str, str] | None,
        name: str,
    ) -> None:
        self._backend = backend
        self._template = template  # several by name: none of them is the default
        self._name = name  # for errors
        # a file may keep the truncation and padding of its training run
        backend.no_truncation()
        backend.no_padding()
        self._marks = {key: _content(value) for key, value in settings.items() if _is_mark(key, value)}

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Loads the tokenizer that lies beside the weights."""
        folder = Path(folder)
        settings_file = folder / "tokenizer_config.json"
        settings = read_json(settings_file) if settings_file.is_file() else {}
        marks_file = folder / "special_tokens_map.json"  # where older checkpoints keep them
        if marks_file.is_file():
            settings = {**read_json(marks_file), **settings}
        return cls(_load_backend(folder), settings, _read_template(folder, settings), str(folder))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text; `special` adds the marks the model expects around a bare text, such as BOS."""
        try:
            return self._backend.encode(text, add_special_tokens=special).ids
        except TypeError:  # the library's word for text that no UTF-8 can spell
            half = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
            if half is None:
                raise
            raise ForetellError(
                f"The text holds {half!r}, which is no character (broken UTF-8, or half a surrogate pair); "
                "save the text as UTF-8."
            ) from None

    def encode_raw(self, text: str) -> list[int]:
        """Returns token ids of a text to continue: with the marks around it, but never two start marks."""
        ids = self.encode(text, special=True)
        mark = next((mark for mark, index in self.special.items() if ids[:2] == [index, index]), None)
        plain = self.encode(text)
        if mark is None or ids[1 : 1 + len(plain)] != plain:
            return ids
        warnings.warn(
            f"The prompt begins with {mark}, which is put before every raw prompt; it is given to the model once.",
            ForetellWarning,
            stacklevel=2,
        )
        return ids[1:]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Returns the text of token ids exactly as spelled: no clean-up of spaces."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    @cached_property
    def special(self) -> dict[str, int]:
        """Special tokens, by their spelling."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    def follow(self, prompt: Sequence[int]) -> Detokenizer:
        """Returns a detokenizer of what follows a prompt, without special tokens.

        Its pieces together are the text of prompt and answer without the prompt's. `decode` of the answer alone may
        lack a space at its beginning.
        """
        return follow(self._backend, self._kind, frozenset(self.special.values()), prompt)

    @cached_property
    def _kind(self) -> Kind:
        return Kind.of(self._backend.decoder)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation, ready for the model to answer."""
        return self.encode(self.render_chat(messages, add_generation_prompt))

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Ids that end an answer, as far as vocabulary, settings and chat template tell."""
        added = self._backend.get_added_tokens_decoder().items()
        special = {token.content: index for index, token in added if token.special}
        known = [index for text, index in special.items() if text in ENDS]
        declared = self._backend.token_to_id(self._marks.get("eos_token", ""))
        rest = self._after_answer()
        turn = max((text for text in special if rest.startswith(text)), key=len, default=None)
        found = [declared, None if turn is None else special[turn], *known]
        return tuple(dict.fromkeys(index for index in found if index is not None))

    def _after_answer(self) -> str:
        """Returns the text that the chat template writes after an answer; empty where it cannot be told."""
        answer = "~ the answer ~"
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
        try:
            _, found, after = self.render_chat(turns, add_generation_prompt=False).rpartition(answer)
        except ForetellError:  # no template, or one that refuses these messages
            return ""
        return after.lstrip() if found else ""

    @property
    def has_chat_template(self) -> bool:
        """True if `chat` works."""
        return isinstance(self._template, str)

    @property
    def lacks_template(self) -> str:
        """The reason that `chat` cannot work, as the end of a sentence."""
        if not self._template:
            return "has no chat template"
        return f"has chat templates named {', '.join(sorted(self._template))}, but none named default"

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as one text, with its marks spelled out."""
        if not messages:
            raise ForetellError("The conversation is empty; give at least one message.")
        # None stands for "not given" in the OpenAI format, and templates would print it
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        plain = json.loads(json.dumps(messages))  # a template may touch a copy of plain types only
        template = self._compiled
        try:
            return template.render(
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._marks,
            )
        except Exception as error:  # an untrusted program: it may divide by zero or recurse without end
            raise ForetellError(
                f"The chat template of {self._name} refuses these messages ({one_line(error)}); "
                "change them, or pass the whole prompt as text (`raw=True`)."
            ) from error

    @cached_property
    def _compiled(self) -> "jinja2.Template":
        if not isinstance(self._template, str):
            raise ForetellError(
                f"{self._name} {self.lacks_template}, so it cannot read messages; "
                "pass the whole prompt as text (`raw=True`)."
            )
        try:
            return _sandbox().from_string(self._template)
        except Exception as error:  # from a wrong tag to more brackets than Python's own compiler takes
            raise ForetellError(
                f"The chat template of {self._name} is not valid Jinja ({one_line(error)}); "
                "pass the whole prompt as text (`raw=True`)."
            ) from error


def _load_backend(folder: Path) -> "tokenizers.Tokenizer":
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        return _rebuild_backend(folder)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ForetellError(f"{path} is damaged ({one_line(error)}); delete it and fetch the model again.") from error


def _rebuild_backend(folder: Path) -> "tokenizers.Tokenizer":
    """Rebuilds the tokenizer of a folder with only vocab.json and merges.txt, or a sentencepiece model."""
    if not any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "tokenizer_config.json")):
        raise ForetellError(f"{folder} has no tokenizer.json, so text cannot become tokens; fetch the model again.")
    from transformers import AutoTokenizer

    try:
        # without the False it asks on stdin whether to run the folder's own code
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return tokenizer.backend_tokenizer
    except Exception as error:  # missing sentencepiece, unknown class, slow-only tokenizers: all end the same
        if "trust_remote_code" in str(error):
            raise ForetellError(
                f"{folder} has no tokenizer.json but code of its own to make tokens, and such code is never run; "
                "use a model that comes with a tokenizer.json."
            ) from error
        raise ForetellError(
            f"{folder} has no tokenizer.json and transformers cannot rebuild one ({one_line(error)}); "
            "save one beside the weights with AutoTokenizer.save_pretrained."
        ) from error


def _read_template(folder: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Reads the default chat template: its own file in new checkpoints, a setting in older ones.

    Returns several by name where none is called default.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ForetellError(
                f"{path} cannot be read ({one_line(error)}); delete it and fetch the model again."
            ) from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, Mapping)]
        template = {str(entry["name"]): entry.get("template") for entry in entries if "name" in entry}
    if isinstance(template, Mapping):
        if "default" not in template:
            return {str(name): str(text) for name, text in template.items()}
        template = template["default"]
    if template is not None and not isinstance(template, str):
        raise ForetellError(
            f"{folder / 'tokenizer_config.json'} must hold chat_template as text, but it holds a "
            f"{type(template).__name__}; fetch the model again."
        )
    return template


def _is_mark(key: str, value: Any) -> bool:
    return key.endswith("_token") and (isinstance(value, str) or (isinstance(value, Mapping) and "content" in value))


def _content(value: Any) -> str:
    return value if isinstance(value, str) else value["content"]


def _sandbox() -> "jinja2.Environment":
    """Makes the environment that templates are written for: transformers'."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what to train on; here it only passes its content on."""

        tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """Like Jinja's, but without a way to the internals of Python objects."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, given = args[0], dict(*args[1:], **kwargs)
            jinja2.utils.Namespace.__init__(self)
            for name, value in given.items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a template may not set {name!r}")
            super().__setitem__(name, value)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own one escapes HTML

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        "namespace": Namespace,
    }
    return environment
