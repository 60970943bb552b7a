"""Tables, as a pipe gets them. `tests/integration/cli/test_terminal.py` has those of a terminal."""

import pytest

from gateway.cli.output import cell, filled, table

ROWS = [
    {"name": "a", "model": "demo", "size": "", "tags": ["расчёт", "b"], "miss": ""},
    {"name": "ширина", "model": "demo", "size": "", "tags": [], "miss": "evicted"},
    {"name": "漢字", "model": "demo", "size": "", "tags": ["c"], "miss": ""},
]


def test_table_leaves_out_empty_columns_and_those_that_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    table(ROWS, varying=("model",), note="miss")
    assert capsys.readouterr().out == (
        "name    tags\n"
        "a       расчёт, b\n"
        "ширина  -\n"
        "  evicted\n"
        "漢字    c\n"
    )  # fmt: skip


def test_column_that_varies_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    table([{"name": "a", "model": "x"}, {"name": "b", "model": "y"}], varying=("model",))
    assert capsys.readouterr().out == "name  model\na     x\nb     y\n"


def test_table_without_rows_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    table([])
    assert capsys.readouterr().out == ""


def test_values_are_words() -> None:
    assert [cell(value) for value in (None, "", [], True, False, 0, ["a", "b"])] == [
        "-", "-", "-", "yes", "no", "0", "a, b"
    ]  # fmt: skip
    assert filled({"a": None, "b": False, "c": 0, "d": []}) == {"b": False, "c": 0}
