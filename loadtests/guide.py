"""Runs every command of docs/guide.md against the real stack, and writes its actual output into the page.

    python -m loadtests.guide

A `console` block contains shell commands, each after a `$`; `cwg up --demo random` starts or restarts the stack. An
`mcp` block contains tool calls, each a name and its arguments, and after `->` the fields of the result to show. All
other lines of these blocks are replaced.
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
from loadtests.contenders import clean_environment
from loadtests.machine import describe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guide.md"
_BLOCK = re.compile(r"(?<=^```)(console|mcp)\n(.*?)(?=^```)", re.MULTILINE | re.DOTALL)
_PORT = "8700"  # as shown on the page
_MAX_WIDTH = 130
_UP = "cwg up --demo random"


class Stack:
    """`cwg up --demo random` in a temporary directory, and a shell and an MCP client to use it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (self._port,) = (str(port) for port in local.free_ports(1))
        binaries = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        variables = {
            "PATH": binaries,
            "CWG_URL": f"http://127.0.0.1:{self._port}",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "120",
        }
        self._environment = clean_environment() | variables
        self._up: subprocess.Popen[str] | None = None

    def up(self) -> str:
        """Start or restart it; return the line that it prints when it is ready."""
        self.down()
        options = ["--demo", "random", "--port", self._port, "--data-dir", str(self._folder / "data")]
        argv = [sys.executable, "-m", "gateway", "up", *options]
        with (self._folder / "up.log").open("ab") as log:
            self._up = subprocess.Popen(
                argv, env=self._environment, cwd=self._folder, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._up.stdout is not None
        return self._up.stdout.readline().replace(self._port, _PORT)

    def down(self) -> None:
        """Stop it, as Ctrl-C does, and wait until all its processes have ended."""
        if self._up is not None:
            self._up.send_signal(signal.SIGTERM)
            self._up.wait(60)

    def shell(self, command: str) -> str:
        """Run a shell command and return its output."""
        script = f'talk() {{ python -m loadtests.talk "$@"; }}\n{command.replace(f":{_PORT}", f":{self._port}")}'
        process = subprocess.run(
            ["bash", "-c", script], env=self._environment, cwd=self._folder, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False, timeout=300,
        )  # fmt: skip
        output = process.stdout.replace(self._port, _PORT)
        return output + (f"(exit code {process.returncode})\n" if process.returncode else "")

    def tool(self, call: str) -> str:
        """Call a tool and return the fields of its result that are named after `->`, or all fields."""
        request, _, shown = call.partition(" -> ")
        name, _, arguments = request.partition(" ")
        answer = asyncio.run(self._call(name, json.loads(arguments or "{}")))
        fields = shown.split(", ") if shown else list(answer)
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
    """Return the commands of a block, without their output."""
    if kind == "console":
        return [line[2:] for line in block.splitlines() if line.startswith("$ ")]
    return [line for line in block.splitlines() if re.match(r"[a-z]+_[a-z_]+( \{.*)?$", line)]


def _filled(stack: Stack, match: re.Match[str]) -> str:
    kind, block = match.groups()
    lines = []
    for command in commands(kind, block):
        print(command, file=sys.stderr, flush=True)
        if kind == "mcp":
            lines += [command, *_truncated(stack.tool(command))]
        else:
            output = stack.up() if command == _UP else stack.shell(command)
            lines += [f"$ {command}", *_truncated(output)]
    return "\n".join([kind, *lines, ""])


def _truncated(output: str) -> list[str]:
    lines = [line.rstrip() for line in output.splitlines()]
    return [line if len(line) <= _MAX_WIDTH else f"{line[: _MAX_WIDTH - 2]} …" for line in lines]


def main() -> None:
    """Fill in the page, and name the machine."""
    page = PAGE.read_text()
    with _stack() as stack:
        page = _BLOCK.sub(lambda match: _filled(stack, match), page)
    facts = describe()
    machine = f"<!-- machine -->{facts['date'][:10]}, {facts['cpu']}, {facts['cores']} cores, no GPU<!-- /machine -->"
    PAGE.write_text(re.sub(r"<!-- machine -->.*?<!-- /machine -->", lambda _: machine, page, flags=re.DOTALL))


if __name__ == "__main__":
    main()
