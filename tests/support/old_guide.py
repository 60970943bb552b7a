"""The workflows of the replaced system's guides as scripts, run as they stand against MCP, with `await tool(...)`.

Each is text, so that nothing about it is adapted to us: names of tools, parameters and fields are the old ones. At a
line that begins with `# ...` something else goes on, as the line says.
"""

import ast
import asyncio
import textwrap
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from mcp import Client

from gateway.api.mcp.tools import TOOLS
from tests.support.mcp_clients import over_http

MEANWHILE = "# ..."


@dataclass(frozen=True, slots=True)
class Script:
    """A script, the sessions that exist before it, and the windows: each with its session and what else it is given."""

    text: str
    sessions: tuple[str, ...] = ()
    windows: dict[str, dict[str, Any]] = field(default_factory=dict)
    real_kv: bool = False  # whether it says more on a real stack

    @property
    def parts(self) -> list[str]:
        """What is run in one go."""
        lines = textwrap.dedent(self.text).strip().splitlines()
        parts = [""]
        for line in lines:
            parts += [""] if line.startswith(MEANWHILE) else []
            parts[-1] += f"{line}\n"
        return parts


class ToolFailed(Exception):
    """A tool answered with an error."""


@dataclass
class Outcome:
    """The variables of a script at its end, and what it printed."""

    names: dict[str, Any]
    printed: list[str]


def run(url: str, script: Script, meanwhile: Callable[[str], object]) -> Outcome:
    """Run a script against a gateway's MCP over HTTP. `meanwhile` gets the first line of each part but the first."""
    return asyncio.run(_run(url, script, meanwhile))


async def _run(url: str, script: Script, meanwhile: Callable[[str], object]) -> Outcome:
    printed: list[str] = []
    async with over_http(url, timeout=120) as client:
        names: dict[str, Any] = {tool.name: _method(client, tool.name) for tool in TOOLS}
        names["print"] = lambda *words: printed.append(" ".join(map(str, words)))
        for number, part in enumerate(script.parts):
            if number:
                await asyncio.to_thread(meanwhile, part.splitlines()[0].removeprefix(MEANWHILE).strip())
            code = compile(part, "the old guide", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            if isinstance(waiting := eval(code, names), Awaitable):
                await waiting
    return Outcome(names, printed)


def _method(client: Client, tool: str) -> Callable[..., Awaitable[dict[str, Any]]]:
    async def call(**arguments: Any) -> dict[str, Any]:
        result = await client.call_tool(tool, arguments)
        if result.is_error:
            raise ToolFailed(result.content)
        assert result.structured_content is not None
        return result.structured_content

    return call
