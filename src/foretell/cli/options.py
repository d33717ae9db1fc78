"""Options that several verbs share, as dataclasses: a verb asks for a whole group by one annotated parameter.

    def generate(prompt: str, loading: Loading, sampling: Sampling) -> None:
        llm = loading.load()

`flat` spreads the groups into the single options that typer reads. torch is imported when a group is used,
not here: `--help` must be quick.
"""

# ruff: noqa: RUF009  (flag is dataclasses.field)
from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_type_hints

import typer

from foretell import drafters
from foretell.cli.terminal import load_progress, note
from foretell.errors import UsageError

if TYPE_CHECKING:
    from foretell.api import LLM
    from foretell.requests import SamplingParams
    from foretell.train.trainer import Settings
    from foretell.verify import Typical


def flag(default: Any, help: str, *short: str) -> Any:
    """A field that becomes an option of the same name."""
    return field(default=default, metadata={"help": help, "short": short})


@dataclass(frozen=True, kw_only=True)
class Base:
    """Which model, and how it computes."""

    PANEL: ClassVar[str] = "Model"
    model: str = flag(
        "smollm2-135m",
        "A name from `foretell models`, a hub id, a folder, a .gguf file; + an adapter.",
        "-m",
    )
    dtype: Literal["bf16", "fp32"] | None = flag(None, "Number type; by default what suits this machine.")
    device: str | None = flag(None, "Where to compute: cpu or cuda; by default the GPU if there is one.")
    threads: int | None = flag(None, "CPU threads; by default the cores this process may use.")
    kernel: str | None = flag(None, "How to compute: eager, or a compiled build by name; by default the best.")
    cache_dir: Path | None = flag(None, "Where fetched models are kept; else FORETELL_CACHE.")
    offline: bool = flag(False, "Fetch nothing.")

    def load(self, drafter: str = "plain", lookup: bool = False, **options: Any) -> LLM:
        """The model with a drafter; says what limits the promise."""
        import foretell

        with load_progress() as progress:
            llm = foretell.load(
                self.model, drafter, lookup=lookup, dtype=self.dtype, device=self.device, threads=self.threads,
                kernel=self.kernel, cache_dir=self.cache_dir, offline=self.offline or None, progress=progress,
                **options,
            )  # fmt: skip
        if llm.backbone.nondeterminism:
            note(f"note: {llm.backbone.nondeterminism}")
        if llm.backbone.kernels == "eager" and llm.backbone.device.type == "cpu" and self.kernel is None:
            note(
                "note: no compiled kernels here, so this is slow; install foretell again where there is a C++ compiler."
            )
        return llm


@dataclass(frozen=True, kw_only=True)
class Loading(Base):
    """Which model, which drafter, and how they compute."""

    drafter: str = flag("plain", "What guesses; see the list below.", "-d")
    option: list[str] | None = flag(None, "An option of the drafter, as key=value; repeatable.", "-o")
    lookup: bool = flag(False, "Merge candidates of prompt lookup into the drafter's trees.")

    def load(self, drafter: str = "", lookup: bool = False, **options: Any) -> LLM:
        """Options are checked before anything is fetched."""
        llm = super().load(
            drafter or self.drafter, lookup or self.lookup, **drafter_options(self.drafter, self.option), **options
        )
        if not llm.drafter.lossless:
            note(f"note: {self.drafter} is lossy: its output need not be the model's own.")
        return llm


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and how fast a drafter learns; `train.trainer.Settings` checks the values."""

    PANEL: ClassVar[str] = "Training"
    epochs: float = flag(4.0, "Passes over the data.")
    learning_rate: float = flag(1e-3, "At its peak.", "--lr")
    batch_tokens: int = flag(8192, "Tokens of a batch.")
    accumulate: int = flag(1, "Batches per step.")
    warmup: float = flag(0.05, "Share of the steps that lead up to the peak.")
    weight_decay: float = flag(0.0, "Of AdamW.")
    held_out: float = flag(0.03, "Share of the conversations kept for measuring (400 at most of each folder).")
    save_seconds: float = flag(300.0, "Seconds between saved states.")
    seed: int = flag(0, "Of the order of the data.")

    def settings(self) -> Settings:
        from foretell.train.trainer import Settings

        return Settings(**vars(self))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; `SamplingParams` checks the values."""

    PANEL: ClassVar[str] = "Sampling"
    max_new_tokens: int = flag(256, "Most tokens of an answer.", "-n")
    temperature: float = flag(0.0, "0 takes the most probable token; above 0 samples.", "-t")
    top_p: float = flag(1.0, "Sample from the smallest set of this probability.")
    top_k: int = flag(0, "Sample from so many tokens; 0 for all.")
    min_p: float = flag(0.0, "Drop tokens below this share of the most probable.")
    repetition_penalty: float = flag(1.0, "Above 1 makes tokens seen before less probable.")
    presence_penalty: float = flag(0.0, "Taken once from tokens of the answer.")
    frequency_penalty: float = flag(0.0, "Taken from tokens of the answer for each time they occur.")
    logit_bias: list[str] | None = flag(None, "ID=VALUE, added to that token's logit; repeatable.")
    seed: int | None = flag(
        None, "Of sampling: the same seed draws the same tokens with every drafter. By default a new one each time."
    )
    stop: list[str] | None = flag(None, "A text, or a special token, that ends an answer; repeatable.")
    stop_id: list[int] | None = flag(None, "A token id that does; repeatable.")
    ignore_eos: bool = flag(False, "Go on past the model's end of text.")
    logprobs: int | None = flag(None, "With --json: log-probabilities, with so many rivals.")
    typical: str | None = flag(None, "Typical acceptance (lossy), as EPS,DELTA or 'default' (0.09,0.3).")
    no_adapt: bool = flag(False, "Go on speculating where plain steps measure faster.")

    def params(self) -> SamplingParams:
        from foretell.requests import SamplingParams

        same = set(vars(self)) & {each.name for each in fields(SamplingParams)} - {"stop", "logit_bias"}
        return SamplingParams(
            **{name: getattr(self, name) for name in same},
            logit_bias=dict(_bias(text) for text in self.logit_bias or ()),
            stop=tuple(self.stop or ()),
            stop_ids=tuple(self.stop_id or ()),
        ).seeded()

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
                raise UsageError(f"--typical {self.typical!r} is not EPS,DELTA; write 0.09,0.3 or default.") from None
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
    spread: dict[str, tuple[Any, Any]] = {}  # name -> (annotation, default)
    for parameter in inspect.signature(function).parameters.values():
        group = groups.get(parameter.name)
        if group is None:
            spread[parameter.name] = hints[parameter.name], parameter.default
            continue
        kinds = get_type_hints(group)
        for each in fields(group):
            names = (f"--{each.name.replace('_', '-')}", *each.metadata["short"])
            option = typer.Option(*names, help=each.metadata["help"], rich_help_panel=group.PANEL)
            spread[each.name] = Annotated[kinds[each.name], option], each.default

    @wraps(function)
    def call(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{each.name: given.pop(each.name) for each in fields(group)})
        function(**given)

    call.__annotations__ = {name: annotation for name, (annotation, _) in spread.items()}
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
            for name, (annotation, default) in spread.items()
        ]
    )
    return call


# -- one value -----------------------------------------------------------------------------------------------


def drafter_options(drafter: str, texts: list[str] | None) -> dict[str, Any]:
    """Checks key=value texts against the drafter's options; returns the values given, by name."""
    from foretell.drafting.options import converted, pairs

    given = pairs(texts or [])
    return converted(drafters.drafter_class(drafter).Options, given, f"Drafter {drafter!r}")


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise UsageError(f"--logit-bias {text!r} is not ID=VALUE; write, say, 42=-5.") from None
