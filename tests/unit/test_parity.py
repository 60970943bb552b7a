"""What the docs promise is there: every id of docs/parity.md, and every test that is named."""

import ast
import re
from functools import cache

import pytest

from loadtests.guide import commands
from tests.support.gateway_process import ROOT

TESTS = ROOT / "tests"
DOCS = ROOT / "docs"
WORKFLOWS = [*(f"w{number:02}" for number in range(20)), *(f"i{number}" for number in range(1, 9))]
_EDGES = (
    "001 002 003 004 005 010 011 012 012a 012b 013 013a 013b 013c 014 020a 020b 020c 021 022 030 031a 031b 040a 040b "
    "041a 041b 042 050a 050b 050c 051 052"
)
_SECURITY = [*range(1, 10), *range(10, 17), *range(20, 28), 30, 31, 32, *range(40, 44), *range(50, 56), *range(60, 66)]
IDS = [
    *(f"EC-{number}" for number in _EDGES.split()),
    *(f"ERR-{letter}" for letter in "abcd"),
    *(f"X-{number:02}" for number in range(1, 25)),
    *(f"S-{number:02}" for number in (*_SECURITY, 70, 71, 72, 80)),
]


@cache
def known() -> set[str]:
    """Every test as `file::function`."""
    return {
        f"{file.relative_to(TESTS)}::{node.name}"
        for file in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_every_workflow_has_a_test_on_the_real_stack_with_its_id_in_the_name(workflow: str) -> None:
    found = [name for name in known() if name.startswith("stack/") and workflow in name.split("::")[1].split("_")]
    assert found


def test_every_promise_is_listed_once() -> None:
    rows = re.findall(r"^\| ((?:EC|ERR|X|S)-\w+) \|", _page(), re.MULTILINE)
    assert rows == IDS


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`([\w/]+\.py::\w+)`", _page())
    assert len(named) > 80
    assert [name for name in named if name not in known()] == []


def test_every_row_names_a_test_or_says_that_there_is_nothing_to_test() -> None:
    above = ""
    for row in re.findall(r"^\| (?:EC|ERR|X|S)-.*$", _page(), re.MULTILINE):
        assert len(row.split(" | ")) == 3, row
        here = row.split(" | ")[2].strip(" |")
        if here == "the same":
            here = above
        assert re.search(r"`[\w/]+\.py::test_\w+`|\*[Nn]ot there yet\*|^Not here: ", here), row
        above = here


def test_a_test_that_is_named_after_a_promise_is_named_in_its_row() -> None:
    rows = {row.split(" | ")[0]: row for row in re.findall(r"^\| ((?:EC|ERR|X|S)-.*)$", _page(), re.MULTILINE)}
    plain = {promise.replace("-", "").lower(): row for promise, row in rows.items()}
    for name in known():
        for word in re.findall(r"(?<=_)(?:ec\d{3}[a-c]?|[xs]\d\d)(?=_)", name.split("::")[1]):
            cited = [row for promise, row in plain.items() if promise.rstrip("abc") == word or promise == word]
            assert any(f"`{name}`" in row for row in cited), (name, word)


def _page() -> str:
    return (DOCS / "parity.md").read_text()


def test_the_guide_shows_every_workflow_and_what_each_command_printed() -> None:
    guide = (DOCS / "guide.md").read_text()
    shown = re.findall(r"\b[WI]\d+\b", " ".join(re.findall(r"^## .*$", guide, re.MULTILINE)))
    assert {f"{name[0].upper()}{int(name[1:])}" for name in WORKFLOWS} <= set(shown)
    for kind, block in re.findall(r"^```(console|mcp)\n(.*?)^```", guide, re.MULTILINE | re.DOTALL):
        asked = commands(kind, block)
        assert 0 < len(asked) < len(block.splitlines()), block
