"""docs/cli.md is what the commands say, and its examples are command lines that they take."""

import shlex
from pathlib import Path

import click
import pytest

from gateway.cli import main
from tests.support import generate_cli_docs
from tests.support.generate_cli_docs import EXAMPLES


def test_the_page_is_that_of_the_code() -> None:
    assert generate_cli_docs.PAGE.read_text() == generate_cli_docs.page(), "run `make docs`"


def test_every_command_has_an_example() -> None:
    assert {name for name, _ in generate_cli_docs.commands()} == set(EXAMPLES), "see generate_cli_docs"


@pytest.mark.parametrize(("name", "example"), EXAMPLES.items())
def test_example_is_a_command_line_of_that_command(
    name: str, example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gateway.toml").touch()
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(example)
    assert arguments[: len(name.split())] == name.split()
    command: click.Command = main
    for word in name.split():
        assert isinstance(command, click.Group)
        command = command.commands[word]
    command.make_context(name, arguments[len(name.split()) :])


def test_every_option_has_a_help_text() -> None:
    bare = [
        f"{name} {option.opts[0]}"
        for name, command in generate_cli_docs.commands()
        for option in command.params
        if isinstance(option, click.Option) and not option.help
    ]
    assert bare == []
