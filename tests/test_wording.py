"""The library names Python's arguments, and the command line its own options."""

import re

import pytest
from command_line import Foretell

import foretell as package
from foretell.cli.wording import for_command_line
from foretell.errors import ForetellError


@pytest.mark.parametrize(
    ("sentence", "spoken"),
    [
        ("choose another `nodes=`.", "choose another -o nodes=."),
        ("use `device='cpu'`.", "use --device cpu."),
        ("run once without `offline=True`, or", "run once without --offline, or"),
        ("lower `max_new_tokens=` to at most 3", "lower --max-new-tokens to at most 3"),
        ("train with `linear=True`.", "train with -o linear=true."),
        ("name one in `stop_ids=`", "name one in --stop-id"),
        ("with `plan='FILE'` and `search=False`", "with -o plan=FILE and -o search=false"),
        ("give one object with `prompt` or `turns`", "give one object with `prompt` or `turns`"),
        ("x = 3", "x = 3"),
    ],
)
def test_arguments_become_options(sentence: str, spoken: str) -> None:
    assert for_command_line(sentence) == spoken


def test_the_command_line_prints_its_own_options(foretell: Foretell, tiny: str) -> None:
    with pytest.raises(ForetellError, match=r"lower `max_new_tokens=` to at most \d+"):
        package.load(tiny, threads=1).generate("hi", max_new_tokens=600)
    ran = foretell("generate", "hi", "-m", tiny, "-n", "600")
    assert re.search(r"lower --max-new-tokens to at most \d+", ran.err)
