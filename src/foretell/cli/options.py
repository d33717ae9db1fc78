"""Options that several verbs share, as dataclasses: a verb asks for a whole group by one annotated parameter.

    def generate(prompt: str, loading: Loading, sampling: Sampling) -> None:
        llm = loading.load()

`flat` spreads the groups into the single options that typer reads. torch is imported when a group is used, not
here: `--help` must be quick.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from foretell import drafters
from foretell.cli.terminal import load_progress, note
from foretell.errors import UsageError

if TYPE_CHECKING:
    from foretell.api import LLM
    from foretell.contracts import SamplingParams
    from foretell.verify import Typical

_MODEL, _SAMPLING = "Model", "Sampling"


def _model(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_MODEL)


def _sampling(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_SAMPLING)


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Which model, which drafter, and how they compute."""

    model: Annotated[
        str, _model("--model", "-m", help="A catalogue name, a hub id (org/name), a folder or a .gguf file.")
    ] = "smollm2-135m"
    drafter: Annotated[str, _model("--drafter", "-d", help="What guesses; see the list below.")] = "plain"
    option: Annotated[
        list[str] | None, _model("--option", "-o", help="An option of the drafter, as key=value; repeatable.")
    ] = None
    dtype: Annotated[
        Literal["bf16", "fp32"] | None,
        _model("--dtype", help="Number type; by default what suits this machine."),
    ] = None
    device: Annotated[
        str | None, _model("--device", help="cpu or cuda; by default the GPU if there is one.")
    ] = None
    threads: Annotated[
        int | None, _model("--threads", help="CPU threads; by default the cores this process may use.")
    ] = None
    kernel: Annotated[
        str | None, _model("--kernel", help="eager, or a compiled build by name; by default the best one.")
    ] = None
    cache_dir: Annotated[
        Path | None, _model("--cache-dir", help="Where fetched models are kept; else FORETELL_CACHE.")
    ] = None
    offline: Annotated[bool, _model("--offline", help="Fetch nothing.")] = False

    def load(self) -> LLM:
        """The model with its drafter; says what limits the promise. Options are checked before the fetch."""
        import foretell

        options = dict(_option(self.drafter, text) for text in self.option or ())
        with load_progress() as progress:
            llm = foretell.load(
                self.model, self.drafter, dtype=self.dtype, device=self.device, threads=self.threads,
                kernel=self.kernel, cache_dir=self.cache_dir, offline=self.offline or None, progress=progress,
                **options,
            )  # fmt: skip
        if llm.backbone.inexact:
            note(f"note: {llm.backbone.inexact}")
        if not llm.drafter.lossless:
            note(f"note: {self.drafter} is lossy: its output need not be the model's own.")
        return llm


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; `SamplingParams` checks the values."""

    max_new_tokens: Annotated[int, _sampling("--max-new-tokens", "-n", help="Most tokens of an answer.")] = (
        256
    )
    temperature: Annotated[
        float, _sampling("--temperature", "-t", help="0 takes the most probable token; above 0 samples.")
    ] = 0.0
    top_p: Annotated[
        float, _sampling("--top-p", help="Sample from the smallest set of this probability.")
    ] = 1.0
    top_k: Annotated[int, _sampling("--top-k", help="Sample from so many tokens; 0 for all.")] = 0
    min_p: Annotated[float, _sampling("--min-p", help="Drop tokens below this share of the greatest.")] = 0.0
    repetition_penalty: Annotated[
        float, _sampling("--repetition-penalty", help="Above 1 makes tokens seen before less probable.")
    ] = 1.0
    presence_penalty: Annotated[
        float, _sampling("--presence-penalty", help="Taken once from tokens of the answer.")
    ] = 0.0
    frequency_penalty: Annotated[
        float, _sampling("--frequency-penalty", help="Taken from tokens of the answer each time they occur.")
    ] = 0.0
    logit_bias: Annotated[
        list[str] | None, _sampling("--logit-bias", help="ID=VALUE, added to that token's logit; repeatable.")
    ] = None
    seed: Annotated[
        int, _sampling("--seed", help="The same seed draws the same tokens with every drafter.")
    ] = 0
    stop: Annotated[list[str] | None, _sampling("--stop", help="A text that ends an answer; repeatable.")] = (
        None
    )
    stop_id: Annotated[list[int] | None, _sampling("--stop-id", help="A token id that does; repeatable.")] = (
        None
    )
    ignore_eos: Annotated[bool, _sampling("--ignore-eos", help="Go on past the model's end of text.")] = False
    logprobs: Annotated[
        int | None, _sampling("--logprobs", help="With --json: log-probabilities, with so many rivals.")
    ] = None
    typical: Annotated[
        str | None,
        _sampling(
            "--typical", help="EPS,DELTA or 'default': typical acceptance. Lossy: not the model's own tokens."
        ),
    ] = None
    no_adapt: Annotated[
        bool, _sampling("--no-adapt", help="Always speculate, even where plain steps measure faster.")
    ] = False

    def params(self) -> SamplingParams:
        from foretell.contracts import SamplingParams

        return SamplingParams(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k,
            min_p=self.min_p, repetition_penalty=self.repetition_penalty, presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty, logit_bias=dict(_bias(text) for text in self.logit_bias or ()),
            seed=self.seed, stop=tuple(self.stop or ()), stop_ids=tuple(self.stop_id or ()),
            ignore_eos=self.ignore_eos, logprobs=self.logprobs,
        )  # fmt: skip

    def rule(self) -> Typical | None:
        """Typical acceptance if it was asked for, said aloud because it is lossy."""
        if self.typical is None:
            return None
        from foretell.verify import Typical

        given = {"temperature": self.temperature} if self.temperature else {}
        if self.typical != "default":
            try:
                epsilon, delta = (float(part) for part in self.typical.split(","))
            except ValueError:
                raise UsageError(
                    f"--typical {self.typical!r} is not EPS,DELTA; write 0.09,0.3 or default."
                ) from None
            given |= {"epsilon": epsilon, "delta": delta}
        rule = Typical(**given)
        note("note: typical acceptance is lossy: its output need not be the model's own.")
        return rule


def drafter_table() -> str:
    """The drafters by name, read when help is printed: one registered from outside is in it."""
    width = max(map(len, drafters.DRAFTERS))
    rows = [f"  {name:{width}}  {help}".replace("[", "\\[") for name, (_, help) in drafters.DRAFTERS.items()]
    return "\n".join(["Drafters:", *rows])


def flat(function: Callable[..., None]) -> Callable[..., None]:
    """The function with each parameter that is a dataclass of options replaced by the options themselves."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    spread: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in groups:
            spread.append(
                parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
            )
            continue
        group = groups[parameter.name]
        inner = get_type_hints(group, include_extras=True)
        for each in fields(group):
            keyword = inspect.Parameter.KEYWORD_ONLY
            spread.append(
                inspect.Parameter(each.name, keyword, default=each.default, annotation=inner[each.name])
            )

    @wraps(function)
    def call(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{each.name: given.pop(each.name) for each in fields(group)})
        function(**given)

    call.__signature__ = inspect.Signature(spread)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in spread}
    return call


# -- one value -----------------------------------------------------------------------------------------------


def _typed(text: str, default: object) -> Any:
    """An option's text in the type of its default; where that says nothing, as what it looks like."""
    if isinstance(default, str):
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.lower(), text)


def _option(drafter: str, text: str) -> tuple[str, Any]:
    """key=value as an option of the drafter; refuses one it does not have, or a value of another type."""
    from foretell.contracts import Drafter

    name, equals, value_text = text.partition("=")
    name = name.replace("-", "_")
    if not (equals and name):
        raise UsageError(f"--option {text!r} is not key=value; write, say, -o nodes=16.")
    cls = drafters.drafter_class(drafter)
    builds_itself = cls.build.__func__ is not Drafter.build.__func__  # type: ignore[attr-defined]
    parameters = dict(inspect.signature(cls.build if builds_itself else cls).parameters)
    parameters.pop("backbone", None)
    takes_any = [n for n, p in parameters.items() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    known = {n: p.default for n, p in parameters.items() if n not in takes_any}
    if name not in known and (not takes_any or name in _RESERVED):
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise UsageError(f"Drafter {drafter!r} has no option {name!r}; {has}.")
    default = known.get(name)
    value, wanted = _typed(value_text, default), _KINDS.get(type(default))
    if wanted and not (type(value) is type(default) or (type(default) is float and type(value) is int)):
        raise UsageError(f"Option {name!r} of drafter {drafter!r} is {value!r}; it must be {wanted}.")
    return name, value


_RESERVED = {each.name for each in fields(Loading)} | {"progress"}
_KINDS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise UsageError(f"--logit-bias {text!r} is not ID=VALUE; write, say, 42=-5.") from None
