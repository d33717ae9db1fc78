"""`foretell distill`: the model answers prompts, its own or a file's, into a folder to train on."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretell.cli.options import Base
from foretell.cli.terminal import command_line, job_progress, note
from foretell.errors import UsageError

if TYPE_CHECKING:
    from foretell.api import LLM
    from foretell.conversations import Conversation
    from foretell.requests import SamplingParams
    from foretell.train.data import ConversationStore
    from foretell.train.endpoint import Endpoint


def distill(
    base: Base,
    out: Annotated[Path, typer.Option("--out", help="Folder for the data; an interrupted run is resumed in it.")],
    prompts: Annotated[Path | None, typer.Option(help="JSON lines with `prompt` or `turns`.")] = None,
    write: Annotated[
        int, typer.Option(min=0, help="Prompts the model writes itself; 1000 where no file is given.")
    ] = 0,
    tasks: Annotated[
        int, typer.Option(min=0, help="Further prompts about its answers: summarise, translate, answer from them.")
    ] = 0,
    keep_repetitive: Annotated[
        bool, typer.Option("--keep-repetitive", help="Keep repetitive answers, which the model does write.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Lines of the file to take, at most.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Take only every K-th line of the file.")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="Of the answers; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Of the answers.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens of an answer.")] = 256,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Answers side by side.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the prompts and of sampled answers.")] = 0,
    endpoint: Annotated[
        str, typer.Option(help="Let an OpenAI-compatible server of the same model answer: its address, up to /v1.")
    ] = "",
    served: Annotated[str, typer.Option(help="The model's name there; by default the first that it lists.")] = "",
    other_model: Annotated[bool, typer.Option("--other-model", help="Let another model answer there.")] = False,
) -> None:
    """Let the model write training data: prompts, if none are given, and its answers.

    The same command resumes an interrupted run.
    """
    from foretell.files import sole_writer
    from foretell.requests import SamplingParams
    from foretell.train.prompts import read_prompts

    if prompts is None and not write:
        write = 1000
    if (limit is not None or every > 1) and prompts is None:
        raise UsageError("--limit and --every are for the lines of a file; give --prompts FILE.jsonl, or --write N.")
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    asked = read_prompts(prompts, every, limit) if prompts else []
    _check_out(out)
    server = _connected(endpoint, served, other_model)
    llm = base.load()
    settings = {
        "prompts": prompts.name if prompts else None, "limit": limit, "every": every, "write": write, "tasks": tasks,
        "keep_repetitive": keep_repetitive, "temperature": temperature, "top_p": top_p,
        "max_new_tokens": max_new_tokens, "seed": seed, **({"served": server.model} if server else {}),
    }  # fmt: skip
    _check_model(llm, base.model, max_new_tokens, tasks)
    with sole_writer(out):
        store = _store(out, base.model, llm, server, settings)
        began = time.perf_counter()
        try:
            if write:
                asked += _own_prompts(llm, write, out / "prompts.jsonl", seed, batch_size)
            Random(seed).shuffle(asked)  # so that an interrupted run leaves a fair sample
            _answer(llm, store, asked, tasks, params, batch_size, keep_repetitive, server)
        finally:
            _close(store, llm, server, time.perf_counter() - began)
    _say(store, out)


def _check_out(out: Path) -> None:
    """Refuses a drafter's folder: data may be added to there, but not begun."""
    from foretell.files import exists
    from foretell.train.data import MANIFEST

    if not exists(out / MANIFEST) and (exists(out / "drafter") or exists(out / "run")):
        raise UsageError(f"{out} holds a drafter, or a run that makes one; choose another --out.")


def _store(out: Path, model: str, llm: LLM, endpoint: Endpoint | None, settings: dict[str, Any]) -> ConversationStore:
    """Opens the folder as one of the local model, or of another one that the endpoint was found to serve."""
    from foretell.files import read_json
    from foretell.loading.catalog import current
    from foretell.train.data import MANIFEST, ConversationStore

    about = {"model": model, "fingerprint": llm.backbone.fingerprint, "vocab": llm.backbone.config.vocab}
    if endpoint and (out / MANIFEST).is_file():
        foreign = _foreign(llm, endpoint)
        theirs = current(str(read_json(out / MANIFEST).get("fingerprint")))
        about |= foreign if theirs == foreign["fingerprint"] else {}
    return ConversationStore.create(out, {**about, "settings": settings, "command": command_line()})


def _close(store: ConversationStore, llm: LLM, endpoint: Endpoint | None, seconds: float) -> None:
    """Writes the manifest, with the name of the model that answered if it was another one."""
    if endpoint and endpoint.agreement.poor:
        store.manifest |= _foreign(llm, endpoint)
    store.write_manifest(seconds)


def _foreign(llm: LLM, endpoint: Endpoint) -> dict[str, str]:
    """Manifest entries of a model that is not the local one, and whose fingerprint is unknown."""
    return {"model": endpoint.model, "fingerprint": f"not {llm.backbone.fingerprint} but {endpoint.model}"}


def _say(store: ConversationStore, out: Path) -> None:
    counts = store.manifest["counts"]
    dropped = ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items()) or "none"
    note(f"{counts['conversations']} conversations, {counts['written']} tokens written; dropped: {dropped}. In {out}.")


def _connected(url: str, model: str, other_model: bool) -> Endpoint | None:
    if not url:
        if model or other_model:
            name = "--served" if model else "--other-model"
            raise UsageError(f"{name} is about the model of an endpoint; give --endpoint URL as well.")
        return None
    try:
        from foretell.train.endpoint import Endpoint
    except ImportError as error:
        raise UsageError("An endpoint needs openai; pip install 'foretell[train]'.") from error
    endpoint = Endpoint(url, model, other_model=other_model)
    endpoint.connect()
    return endpoint


def _check_model(llm: LLM, name: str, max_new_tokens: int, tasks: int) -> None:
    """Refuses a model without a chat template, and answers that are too short or too long."""
    from foretell.train.distill import MIN_TASK_TOKENS

    if not llm.tokenizer.has_chat_template:
        raise UsageError(
            f"{name} {llm.tokenizer.lacks_template}; distill needs a model with a chat template: add "
            "chat_template.jinja to its folder."
        )
    context = llm.backbone.config.max_positions
    if tasks and max_new_tokens < MIN_TASK_TOKENS:
        raise UsageError(
            f"Answers of {max_new_tokens} tokens are too short to make tasks from; raise --max-new-tokens to "
            f"{MIN_TASK_TOKENS} at least, or leave out --tasks."
        )
    if context - max_new_tokens < len(llm.encode([{"role": "user", "content": ""}])):
        raise UsageError(
            f"Answers of {max_new_tokens} tokens leave no room for a prompt in this model's context of {context}; "
            "lower --max-new-tokens."
        )


def _own_prompts(llm: LLM, count: int, path: Path, seed: int, rows: int) -> list[Conversation]:
    from foretell.train.prompts import OWN_LINES, read_prompts, write_prompts

    with job_progress("writing prompts", "tokens/s") as progress:
        write_prompts(llm, count, path, seed=seed, rows=rows, progress=progress)
    return [replace(prompt, line=prompt.line + OWN_LINES) for prompt in read_prompts(path)]


def _answer(
    llm: LLM, store: ConversationStore, asked: list[Conversation], tasks: int, params: SamplingParams, rows: int,
    keep_repetitive: bool, endpoint: Endpoint | None,
) -> None:  # fmt: skip
    """Answers the prompts, then tasks in two halves: the second half is about the answers to the first one, too."""
    from foretell.train.distill import MIN_TASK_TOKENS, distill, next_tasks

    todo = asked
    for count in (tasks // 2, tasks - tasks // 2, 0):
        if todo:
            with job_progress("answering", "tokens/s") as progress:
                distill(
                    llm,
                    todo,
                    store,
                    params,
                    rows=rows,
                    keep_repetitive=keep_repetitive,
                    endpoint=endpoint,
                    progress=progress,
                )
        todo = next_tasks(llm, store, asked, count, params.seed or 0) if count else []
        if count and not todo:
            note(f"note: no tasks were made: no answer is long enough ({MIN_TASK_TOKENS} tokens)")
            break
        asked = asked + todo
