"""The annotations that callers see are true: mypy agrees with a page of usages, and would not with wrong ones."""

from pathlib import Path

import pytest

USAGES = Path(__file__).with_name("typed_usages.py")


@pytest.mark.slow
def test_a_type_checker_agrees_with_what_callers_write(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    told, errors, status = api.run(["--warn-unused-ignores", str(USAGES)])  # with what `make check` has cached
    assert (status, errors) == (0, ""), told
    wrong = tmp_path / "wrong.py"
    right = "assert_type(llm.generate([1, 2, 3], max_new_tokens=8), Result)"
    assert right in USAGES.read_text()
    wrong.write_text(USAGES.read_text().replace(right, "assert_type(llm.generate([1, 2, 3]), list[Result])"))
    told, _, status = api.run([str(wrong)])
    assert status == 1
    assert "Expression is of type" in told
