"""Options that several verbs share, as dataclasses: a verb takes a whole group as one annotated parameter.

    def generate(prompt: str, loading: Loading, sampling: Sampling) -> None:
        llm = loading.load()

`flat` spreads the groups into the single options that typer reads. torch is imported when a model is loaded or a
drafter's options are looked up, not before: help and most refusals are quick.
"""

# ruff: noqa: RUF009  (flag is dataclasses.field)
from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_type_hints

import typer

from foretell import drafters
from foretell.cli.defaults import of_drafter
from foretell.cli.terminal import load_progress, note
from foretell.errors import UsageError
from foretell.loading.choices import QUANTIZED
from foretell.requests import SamplingParams, numbers

if TYPE_CHECKING:
    from foretell.api import LLM
    from foretell.train.trainer import Settings
    from foretell.verify import Typical


def flag(default: Any, help: str, *short: str, hidden: bool = False) -> Any:
    """Returns a dataclass field that becomes an option of the same name; `hidden` from help."""
    return field(default=default, metadata={"help": help, "short": short, "hidden": hidden})


CACHE = "Where fetched models are kept; by default FORETELL_CACHE, else ~/.cache/foretell."


Weights = Literal["stored", "bf16", "fp32", "q8_0", "q4_k"]


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The cache folder, for verbs that load no model."""

    PANEL: ClassVar[str] = "Model"
    cache_dir: Path | None = flag(None, CACHE)


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model and how it computes."""

    PANEL: ClassVar[str] = "Model"
    model: str = flag(
        "smollm2-135m",
        "A name from `foretell models`, a hub id, a folder or a .gguf file; +ADAPTER merges a LoRA adapter.",
        "-m",
    )
    dtype: Literal["bf16", "fp32"] | None = flag(None, "Number type; by default the one that suits this machine.")
    weights: Weights | None = flag(
        None,
        "Of a quantized GGUF file, stored multiplies the weights as they are, with activations in eight bits; bf16 "
        "unpacks them, and fp32 exactly. q8_0 and q4_k quantize float weights of any model, and multiply them so. By "
        "default stored; bf16 with an adapter, on a GPU and without compiled kernels.",
    )
    device: str | None = flag(None, "Where to compute: cpu or cuda; by default the GPU if there is one.")
    threads: int | None = flag(None, "CPU threads; by default the cores this process may use.")
    kernel: str | None = flag(None, "Kernels: eager, or a compiled build by name; by default the best.")
    cache_dir: Path | None = flag(None, CACHE)
    offline: bool | None = flag(None, "Fetch nothing; by default FORETELL_OFFLINE decides.")

    def check(self) -> None:
        """Refuses, before torch is imported, what could not be loaded.

        Raises:
            UsageError: an unknown model or device, no threads.
            ForetellError: the model is not here and offline mode forbids fetching it.
        """
        from foretell.loading.resolve import check_name

        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"Unknown device {self.device!r}; use cpu, or cuda (cuda:1, ...) where there is a GPU.")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads is {self.threads}; it must be at least 1.")
        check_name(self.model, weights=self.weights, cache_dir=self.cache_dir, offline=self.offline)

    def load(self, drafter: str = "plain", lookup: bool = False, **options: Any) -> LLM:
        """Loads the model with a drafter; prints a note where exactness is limited, or kernels are missing."""
        self.check()
        import foretell

        with load_progress() as progress:
            llm = foretell.load(
                self.model, drafter, lookup=lookup, dtype=self.dtype, weights=self.weights, device=self.device,
                threads=self.threads, kernel=self.kernel, cache_dir=self.cache_dir, offline=self.offline,
                progress=progress, **options,
            )  # fmt: skip
        if llm.backbone.nondeterminism:
            note(f"note: {llm.backbone.nondeterminism}")
        if self.weights in ("stored", *QUANTIZED) and not llm.backbone.quantized:
            note(
                "note: no weights of this model are multiplied as they are stored, with these kernels; all are floats."
            )
        if llm.backbone.kernels == "eager" and llm.backbone.device.type == "cpu" and self.kernel is None:
            note(
                "note: no compiled kernels here, so this is slow; install foretell again where there is a C++ compiler."
            )
        return llm


@dataclass(frozen=True, kw_only=True)
class Loading(Base):
    """The model, the drafter and how they compute."""

    drafter: str = flag("plain", "The drafter that guesses tokens; see the list below.", "-d")
    option: list[str] | None = flag(
        None, "An option of the drafter, as key=value; repeatable. -o help lists the drafter's options.", "-o"
    )
    lookup: bool = flag(False, "Merge candidates of prompt lookup into the drafter's trees.")

    def check(self) -> None:
        """Refuses an unknown drafter, too; its options are checked by `drafter_options`, which imports torch."""
        if self.drafter and self.drafter not in drafters.DRAFTERS:
            drafters.drafter_class(self.drafter)
        super().check()

    def drafter_options(self) -> dict[str, Any]:
        """Returns the drafter's options: those of the config file, and over them those of the command line.

        With -o help it lists what options there are, and exits.
        """
        if "help" in (self.option or ()):
            from foretell.cli.drafters import show_options

            show_options(self.drafter)
            raise typer.Exit()
        return drafter_options(self.drafter, self.option, of_drafter(self.drafter))

    def load(self, drafter: str = "", lookup: bool = False, **options: Any) -> LLM:
        """Loads the model with the drafter; all options are checked before anything is fetched."""
        self.check()
        llm = super().load(drafter or self.drafter, lookup or self.lookup, **self.drafter_options(), **options)
        if not llm.drafter.lossless:
            note(f"note: {self.drafter} is lossy: its output need not be the model's own.")
        return llm


@dataclass(frozen=True, kw_only=True)
class Training:
    """Length and learning rates of a training; `train.trainer.Settings` checks the values."""

    PANEL: ClassVar[str] = "Training"
    epochs: float = flag(4.0, "Passes over the data.")
    learning_rate: float = flag(1e-3, "Learning rate at its peak.", "--lr")
    batch_tokens: int = flag(8192, "Tokens per batch.")
    accumulate: int = flag(1, "Batches per step.")
    warmup: float = flag(0.05, "Share of the steps in which the learning rate rises to its peak.")
    weight_decay: float = flag(0.0, "Weight decay of AdamW.")
    held_out: float = flag(0.03, "Share of the conversations kept for evaluation (at most 400 of each folder).")
    save_seconds: float = flag(300.0, "Seconds between saved training states.")
    seed: int = flag(0, "Seed of the order of the data.")

    def settings(self) -> Settings:
        from foretell.train.trainer import Settings

        return Settings(**vars(self))


SHORT = {"max_new_tokens": ("-n",), "temperature": ("-t",)}
_NUMBERS: Any = make_dataclass(
    "_Numbers",
    [
        (option.name, get_type_hints(SamplingParams)[option.name],
         flag(option.default, option.metadata["help"], *SHORT.get(option.name, ())))
        for option in numbers()
    ],
    frozen=True, kw_only=True,
)  # fmt: skip
"""The numeric options of `SamplingParams`: a new one there is an option here."""


@dataclass(frozen=True, kw_only=True)
class Sampling(_NUMBERS):
    """Sampling options; `SamplingParams` checks the values."""

    PANEL: ClassVar[str] = "Sampling"
    logit_bias: list[str] | None = flag(None, "ID=VALUE, added to that token's logit; repeatable.")
    stop: list[str] | None = flag(None, "A text, or a special token, that ends an answer; repeatable.")
    stop_id: list[int] | None = flag(None, "A token id that ends an answer; repeatable.")
    ignore_eos: bool = flag(False, "Continue past the model's end of text.")
    logprobs: int | None = flag(None, "With --json: log-probabilities, with so many alternatives.")
    typical: str | None = flag(None, "Typical acceptance (lossy), as EPS,DELTA or default (0.09,0.3).")
    no_adapt: bool = flag(False, "Keep speculating where plain steps are measured to be faster.")

    def params(self) -> SamplingParams:
        same = set(vars(self)) & {param.name for param in fields(SamplingParams)} - {"stop", "logit_bias"}
        return SamplingParams(
            **{name: getattr(self, name) for name in same},
            logit_bias=dict(_bias(text) for text in self.logit_bias or ()),
            stop=tuple(self.stop or ()),
            stop_ids=tuple(self.stop_id or ()),
        ).seeded()

    def rule(self) -> Typical | None:
        """Returns the rule of typical acceptance if it was given, with a note that it is lossy."""
        if self.typical is None:
            return None
        given = {"temperature": self.temperature} if self.temperature else {}
        if self.typical != "default":
            try:
                epsilon, delta = (float(part) for part in self.typical.split(","))
            except ValueError:
                raise UsageError(f"--typical {self.typical!r} is not EPS,DELTA; write 0.09,0.3 or default.") from None
            given |= {"epsilon": epsilon, "delta": delta}
        from foretell.verify import Typical

        rule = Typical(**given)
        note("note: typical acceptance is lossy: its output need not be the model's own.")
        return rule


def shared_options() -> dict[str, Any]:
    """Returns the options of the panels Model and Sampling with their types, for a config file's first lines.

    `option` is not among them: it belongs to one drafter.
    """
    kinds = get_type_hints(Loading) | get_type_hints(Sampling)
    return {
        option.name: kinds[option.name]
        for group in (Loading, Sampling)
        for option in fields(group)
        if option.name != "option"
    }


def drafter_table() -> str:
    """Returns the list of drafters for the end of help, registered ones included."""
    table = drafters.table()
    width = max(map(len, table))
    rows = [f"  {name:{width}}  {help}".replace("[", "\\[") for name, (_, help) in table.items()]
    return "\n".join(["Drafters:", *rows])


def flat(function: Callable[..., None]) -> Callable[..., None]:
    """Returns the function with each parameter that is a dataclass of options replaced by the single options."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    spread: dict[str, tuple[Any, Any]] = {}  # name -> (annotation, default)
    for parameter in inspect.signature(function).parameters.values():
        group = groups.get(parameter.name)
        if group is None:
            spread[parameter.name] = hints[parameter.name], parameter.default
            continue
        kinds = get_type_hints(group)
        for member in fields(group):
            option = typer.Option(
                *_names(member.name, kinds[member.name] in (bool, bool | None)), *member.metadata["short"],
                help=member.metadata["help"], rich_help_panel=group.PANEL, show_default=member.default is not False,
                autocompletion=COMPLETIONS.get(member.name), hidden=member.metadata["hidden"],
            )  # fmt: skip
            spread[member.name] = Annotated[kinds[member.name], option], member.default

    @wraps(function)
    def call(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{member.name: given.pop(member.name) for member in fields(group)})
        function(**given)

    call.__annotations__ = {name: annotation for name, (annotation, _) in spread.items()}
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
            for name, (annotation, default) in spread.items()
        ]
    )
    return call


def _names(name: str, switch: bool) -> list[str]:
    """The option's name; of a switch that another name turns off again, as a config file may have turned it on."""
    words = name.replace("_", "-")
    if not switch:
        return [f"--{words}"]
    return [f"--{words}/--{words.removeprefix('no-') if words.startswith('no-') else f'no-{words}'}"]


def _models(incomplete: str) -> list[str]:
    from foretell.loading.cache_dir import cached_models
    from foretell.loading.catalog import names

    return [name for name in {*names(), *(model.name for model in cached_models())} if name.startswith(incomplete)]


def _drafters(incomplete: str) -> list[str]:
    return [name for name in drafters.table() if name.startswith(incomplete)]


COMPLETIONS: dict[str, Callable[[str], list[str]]] = {"model": _models, "drafter": _drafters}
"""Option -> what a shell may complete a word to."""


# -- one value -----------------------------------------------------------------------------------------------


def drafter_options(
    drafter: str, texts: list[str] | None, defaults: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Checks key=value texts, which win over `defaults`, against the drafter's options; returns the values by name."""
    from foretell.drafting.options import converted, pairs

    cls, owner = drafters.drafter_class(drafter).Options, f"Drafter {drafter!r}"
    return converted(cls, defaults, owner) | converted(cls, pairs(texts or []), owner)


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise UsageError(f"--logit-bias {text!r} is not ID=VALUE; write, say, 42=-5.") from None
