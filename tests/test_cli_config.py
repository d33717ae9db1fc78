"""The config file: what it sets, what wins over it, and what it may not hold."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from command_line import Foretell
from test_cli_refusals import refused

from foretell import drafters
from foretell.cli import VERBS, load_verb
from foretell.cli.defaults import config_file, of_drafter, of_verb
from foretell.cli.options import Loading, shared_options
from foretell.drafters.plain import Plain
from foretell.drafting.options import option
from foretell.errors import ForetellError
from foretell.loading.cache_dir import cache_folder

Configured = Callable[[str], Path]


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configured:
    def write(text: str) -> Path:
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setenv("FORETELL_CONFIG", str(path))
        return path

    return write


def defaults_of(verb: str) -> dict[str, Any]:
    return of_verb(verb, load_verb(verb), VERBS, shared_options())


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORETELL_CONFIG", "~/x.toml")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config_file() == tmp_path / "x.toml"
    monkeypatch.delenv("FORETELL_CONFIG")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert config_file() == tmp_path / ".config/foretell/config.toml"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert config_file() == tmp_path / "xdg/foretell/config.toml"


def counts(foretell: Foretell, *arguments: str) -> int:
    [line] = foretell("generate", "hello", *arguments).lines
    return int(line["new_tokens"])


def test_the_command_line_wins_over_a_verbs_table_and_that_over_the_first_lines(
    foretell: Foretell, tiny: str, configured: Configured
) -> None:
    first = f'model = "{tiny}"\ndtype = "fp32"\nmax-new-tokens = 9\nignore_eos = true\n'
    configured(first + "[generate]\nas_json = true\n")
    assert counts(foretell) == 9
    assert counts(foretell, "-n", "4") == 4
    configured(first + "[generate]\nas_json = true\nmax_new_tokens = 6\n")
    assert counts(foretell) == 6
    assert counts(foretell, "-n", "4") == 4
    assert "[default: 6]" in foretell("generate", "--help").out


def test_what_is_turned_on_can_be_turned_off(foretell: Foretell, tiny: str, configured: Configured) -> None:
    configured(f'model = "{tiny}"\ndtype = "fp32"\nlookup = true\nno_adapt = true\nmax_new_tokens = 20\n')
    drafted = [
        foretell("generate", "hello hello hello", "--json", "--ignore-eos", *more).lines[0]["drafted"]
        for more in ([], ["--no-lookup"])
    ]
    assert drafted[0] > 0 == drafted[1]


def test_the_first_lines_reach_only_options_of_that_meaning(configured: Configured) -> None:
    configured('model = "m"\nmax_new_tokens = 9\nseed = 3\n[bench]\nlimit = 2\n[bench.sweep]\nlimit = 4\n')
    found = {verb: defaults_of(verb) for verb in VERBS}
    assert found["generate"] == found["chat"] == {"model": "m", "max_new_tokens": 9, "seed": 3}
    assert found["bench"]["model"] == found["train"]["model"] == "m"
    assert not {"seed", "max_new_tokens"} & {*found["bench"], *found["train"], *found["distill"], *found["demo"]}
    assert found["bench"]["limit"] == 2
    assert found["bench"]["sweep"] == {"model": "m", "limit": 4}
    assert found["models"] == {}


def test_the_environment_wins_over_the_file(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    configured('cache_dir = "/there"\noffline = true\n')
    for name in ("FORETELL_CACHE", "FORETELL_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    assert defaults_of("generate") == {"cache_dir": "/there", "offline": True}
    assert defaults_of("rm") == {"cache_dir": "/there"}
    monkeypatch.setenv("FORETELL_CACHE", "/elsewhere")
    monkeypatch.setenv("FORETELL_OFFLINE", "0")
    assert defaults_of("generate") == {}
    assert cache_folder() == Path("/elsewhere")
    configured('kernel = "eager"\n[generate]\ncache_dir = "/of generate"\nbatch_size = 2\n')
    assert defaults_of("generate") == {"kernel": "eager", "batch_size": 2}
    monkeypatch.setenv("FORETELL_KERNELS", "avx2")
    assert defaults_of("generate") == {"batch_size": 2}


def test_the_command_line_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORETELL_OFFLINE", "1")
    for offline in (None, True):
        with pytest.raises(ForetellError, match="offline mode forbids"):
            Loading(model="org/elsewhere", cache_dir=tmp_path, offline=offline).check()
    Loading(model="org/elsewhere", cache_dir=tmp_path, offline=False).check()


def test_options_of_a_drafter(foretell: Foretell, tiny: str, configured: Configured) -> None:
    configured("[options.prompt_lookup]\nnodes = 6\n[options.medusa]\nany_backbone = true\n")
    assert of_drafter("prompt_lookup") == {"nodes": 6}
    assert of_drafter("medusa") == {"any_backbone": True}
    assert of_drafter("plain") == {}
    assert Loading(drafter="prompt_lookup").drafter_options() == {"nodes": 6}
    assert Loading(drafter="prompt_lookup", option=["nodes=4"]).drafter_options() == {"nodes": 4}
    configured("[options.prompt_lookup]\nnods = 6\n")
    refused(foretell("generate", "hi", "-m", tiny, "-d", "prompt_lookup"), 2, "no option 'nods'")


def test_a_list_of_the_file_reaches_a_drafter(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Options:
        exits: tuple[int, ...] = option((), "Layers.")

    own = type("Own", (Plain,), {"Options": Options})
    monkeypatch.setitem(drafters.DRAFTERS, "own", (own, "of a test"))
    configured("[options.own]\nexits = [1, 2]\n")
    assert Loading(drafter="own").drafter_options() == {"exits": (1, 2)}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = ", r"cannot be read \(Invalid value"),
        ('modle = "m"', r"unknown key 'modle' \(did you mean 'model'\?\)"),
        ('option = ["nodes=3"]', "unknown key 'option'"),
        ("batch_size = 3", r"unknown key 'batch_size'.*a table such as \[generate\]"),
        ("threads = true", "threads is True; it must be a whole number"),
        ('temperature = "hot"', "temperature is 'hot'; it must be a number"),
        ('dtype = "f8"', "dtype is 'f8'; it must be 'bf16' or 'fp32'"),
        ("lookup = 1", "lookup is 1; it must be true or false"),
        ("cache_dir = 1", "cache_dir is 1; it must be a text"),
        ('stop = ["a", 1]', "it must be a list, each a text"),
        ("[genrate]\nx = 1", r"unknown table \[genrate\] \(did you mean 'generate'\?\)"),
        ("[generate]\nbatch = 1", r"unknown key 'batch' in \[generate\] \(did you mean 'batch_size'\?\)"),
        ('[bench.sweep]\nlimit = "x"', "bench.sweep.limit is 'x'; it must be a whole number"),
        ("[options]\nmedusa = 1", "options.medusa must be a table"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_files_name(
    foretell: Foretell, configured: Configured, text: str, sentence: str
) -> None:
    path = configured(text)
    ran = foretell("config")
    refused(ran, 1 if "Invalid" in sentence else 2, sentence)
    assert str(path) in ran.err


def test_a_file_that_is_named_must_exist(
    foretell: Foretell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configured: Configured
) -> None:
    monkeypatch.setenv("FORETELL_CONFIG", str(tmp_path / "none.toml"))
    refused(foretell("models"), 1, "FORETELL_CONFIG names .*none.toml, which does not exist")
    path = configured("")
    path.write_bytes(b'model = "\xff"')
    refused(foretell("models"), 1, "cannot be read")


def test_config_shows_what_is_in_force(
    foretell: Foretell, configured: Configured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = configured('model = "m"\ntop-p = 0.5\n[generate]\nbatch_size = 3\n[options.medusa]\nnodes = 8\n')
    monkeypatch.setenv("FORETELL_CACHE", "/elsewhere")
    ran = foretell("config")
    assert ran.code == 0
    assert ran.out.startswith(f"# {path}\n")
    for line in (
        'model = "m" +# from the file', "top_p = 0.5 +# from the file",
        'cache_dir = "/elsewhere" +# from FORETELL_CACHE',
        'drafter = "plain"', "# threads", r"\[generate\]\nbatch_size = 3", r"\[options.medusa\]\nnodes = 8",
    ):  # fmt: skip
        assert re.search(rf"^{line}$", ran.out, re.MULTILINE), line
    configured(ran.out.replace(' = "/elsewhere"', ' = "/x"'))  # it is a config file itself
    assert foretell("config").code == 0
    monkeypatch.delenv("FORETELL_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    assert "does not exist, so these are foretell's own defaults" in foretell("config").out


def test_every_default_of_a_verb_can_be_configured() -> None:
    """Every option has a type that the file's values are checked against."""
    from foretell.cli.defaults import _kind

    def check(command: Any) -> None:
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if name not in ("return", "ctx"):
                assert _kind(hint)
        for inner in getattr(command, "commands", {}).values():
            check(inner)

    for verb in VERBS:
        check(load_verb(verb))
