"""Runs every command of docs/guide.md before the real stack, and writes under each what it really printed.

    python -m loadtests.guide

A `console` block holds commands for a shell, each behind a `$`; of these `cwg up` starts the stack, or starts it again.
An `mcp` block holds calls of tools, each a name and its arguments, and behind `->` the fields of the answer that are
shown. All other lines of these blocks are replaced.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from gateway.stack import local
from loadtests.machine import describe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guide.md"
_BLOCK = re.compile(r"(?<=^```)(console|mcp)\n(.*?)(?=^```)", re.MULTILINE | re.DOTALL)
_PORT = "8700"  # what the page says
_WIDEST = 130


class Stack:
    """`cwg up` in a directory of its own, and what a user types beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (self._port,) = (str(port) for port in local.free_ports(1))
        binaries = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {"PATH": binaries, "CWG_URL": f"http://127.0.0.1:{self._port}", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CWG_")}
        self._environment = clean | own
        self._up: subprocess.Popen[str] | None = None

    def up(self) -> str:
        """Start it, or stop it and start it again; what it says when it is ready."""
        self.down()
        argv = [sys.executable, "-m", "gateway", "up", "--port", self._port, "--data-dir", str(self._folder / "data")]
        with (self._folder / "up.log").open("ab") as log:
            self._up = subprocess.Popen(
                argv, env=self._environment, cwd=self._folder, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._up.stdout is not None
        return self._up.stdout.readline().replace(self._port, _PORT)

    def down(self) -> None:
        """End it, as Ctrl-C does, and wait until everything has gone."""
        if self._up is not None:
            self._up.send_signal(signal.SIGTERM)
            self._up.wait(60)

    def shell(self, command: str) -> str:
        """What a command prints."""
        given = command.replace(f":{_PORT}", f":{self._port}")
        script = f'talk() {{ python -m loadtests.talk "$@"; }}\n{given}'
        ended = subprocess.run(
            ["bash", "-c", script], env=self._environment, cwd=self._folder, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False, timeout=300,
        )  # fmt: skip
        printed = ended.stdout.replace(self._port, _PORT)
        return printed + (f"(exit code {ended.returncode})\n" if ended.returncode else "")

    def tool(self, call: str) -> str:
        """What a tool answers: the fields behind `->`, or all of it."""
        said, _, wanted = call.partition(" -> ")
        name, _, arguments = said.partition(" ")
        answer = asyncio.run(self._call(name, json.loads(arguments or "{}")))
        fields = wanted.split(", ") if wanted else list(answer)
        if missing := set(fields) - set(answer):
            raise RuntimeError(f"{call}: no {missing} in {answer}")
        return "".join(f"  {field}: {json.dumps(answer[field], ensure_ascii=False)}\n" for field in fields)

    async def _call(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        url = f"{self._environment['CWG_URL']}/mcp"
        async with (
            httpx2.AsyncClient(timeout=120) as http,
            Client(streamable_http_client(url, http_client=http)) as client,
        ):
            return dict((await client.call_tool(name, arguments)).structured_content or {})


@contextmanager
def _stack() -> Iterator[Stack]:
    with tempfile.TemporaryDirectory(prefix="cwg-guide-") as folder, ExitStack() as exits:
        stack = Stack(Path(folder))
        exits.callback(stack.down)
        yield stack


def commands(kind: str, block: str) -> list[str]:
    """The commands of a block, without what was printed under them."""
    if kind == "console":
        return [line[2:] for line in block.splitlines() if line.startswith("$ ")]
    return [line for line in block.splitlines() if re.match(r"[a-z]+_[a-z_]+( \{.*)?$", line)]


def _filled(stack: Stack, match: re.Match[str]) -> str:
    kind, block = match.groups()
    lines = []
    for command in commands(kind, block):
        print(command, file=sys.stderr, flush=True)
        if kind == "mcp":
            lines += [command, *_narrow(stack.tool(command))]
        else:
            printed = stack.up() if command == "cwg up" else stack.shell(command)
            lines += [f"$ {command}", *_narrow(printed)]
    return "\n".join([kind, *lines, ""])


def _narrow(printed: str) -> list[str]:
    lines = [line.rstrip() for line in printed.splitlines()]
    return [line if len(line) <= _WIDEST else f"{line[: _WIDEST - 2]} …" for line in lines]


def main() -> None:
    """Fill the page in, and say on what."""
    page = PAGE.read_text()
    with _stack() as stack:
        page = _BLOCK.sub(lambda match: _filled(stack, match), page)
    on = describe()
    said = f"<!-- machine -->{on['date'][:10]}, {on['cpu']}, {on['cores']} cores, no GPU<!-- /machine -->"
    PAGE.write_text(re.sub(r"<!-- machine -->.*?<!-- /machine -->", lambda _: said, page, flags=re.DOTALL))


if __name__ == "__main__":
    main()
