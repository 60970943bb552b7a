"""Agents as people install them, and how each is pointed at a base URL and told to do something without a terminal."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MODEL = "demo"
TOOLS = "context-windows"  # what the gateway's tools are called in an agent's configuration
_WITHIN_S = 120.0
_SCRIPT = Path(__file__).with_name("openai_agent.py")
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Doing:
    """One run of an agent: a prompt, how it goes on from the run before, and what must be in what it prints."""

    prompt: str
    goes_on: str = ""  # "", "continue" or "fork"
    expect: str = ""


@dataclass(frozen=True, slots=True)
class ToolServer:
    """The gateway's tools as an agent is told of them: by address, or as the command that serves stdio."""

    url: str
    stdio: bool

    @property
    def command(self) -> list[str]:
        """What to start for stdio."""
        return [sys.executable, "-m", "gateway", "mcp"]

    @property
    def environment(self) -> dict[str, str]:
        """With what in its environment."""
        return {"CWG_URL": self.url, "PYTHONPATH": str(_ROOT)}

    @property
    def endpoint(self) -> str:
        """Where it is over HTTP."""
        return f"{self.url}/mcp"


class Agent:
    """An agent with a home directory of its own, so that nobody's settings or credentials are seen by it."""

    name = ""
    executable = ""
    api = ""  # the dialect it speaks
    named = ""  # what it puts before the name of one of the gateway's tools
    tools: ToolServer | None = None

    def __init__(self, found: Path, folder: Path, base_url: str) -> None:
        self.found = found
        self.base_url = base_url
        self.home, self.work = folder / "home", folder / "work"
        for made in (self.home, self.work):
            made.mkdir(parents=True, exist_ok=True)
        self.prepare()

    def prepare(self) -> None:
        """Write the configuration that it needs."""

    def offer(self, tools: ToolServer) -> None:
        """Tell it of the gateway's tools."""
        self.tools = tools

    def environment(self) -> Mapping[str, str]:
        """Variables of its own."""
        return {}

    def command(self, doing: Doing) -> tuple[Sequence[str], str]:
        """The command line, and what goes to its standard input."""
        raise NotImplementedError

    def version(self) -> str:
        """What it says that it is."""
        return self._run([str(self.found), "--version"], "").stdout.strip().split("\n")[-1]

    def do(self, doing: Doing) -> str:
        """Run it once and return what it printed. Raises RuntimeError."""
        argv, given = self.command(doing)
        done = self._run(argv, given)
        if done.returncode or doing.expect not in done.stdout:
            raise RuntimeError(
                f"{self.name} ended with {done.returncode}; expected {doing.expect!r} in:\n{done.stdout[-2000:]}"
                f"\nand it wrote to stderr:\n{done.stderr[-2000:]}"
            )
        return done.stdout

    def _run(self, argv: Sequence[str], given: str) -> "subprocess.CompletedProcess[str]":
        base = {"PATH": f"{self.found.parent}:{os.environ['PATH']}", "HOME": str(self.home), "TERM": "dumb",
                "LANG": "C.UTF-8", "NO_PROXY": "127.0.0.1"}  # fmt: skip
        return subprocess.run(
            argv, cwd=self.work, env={**base, **self.environment()}, input=given, capture_output=True, text=True,
            timeout=_WITHIN_S, check=False,
        )  # fmt: skip


class ClaudeCode(Agent):
    """Claude Code, over Messages."""

    name = "claude-code"
    executable = "claude"
    api = "messages"
    named = f"mcp__{TOOLS}__"
    bare = False  # the short system prompt

    def offer(self, tools: ToolServer) -> None:
        super().offer(tools)
        stdio = {"command": tools.command[0], "args": tools.command[1:], "env": tools.environment}
        server = stdio if tools.stdio else {"type": "http", "url": tools.endpoint}
        self._servers.write_text(json.dumps({"mcpServers": {TOOLS: server}}))

    @property
    def _servers(self) -> Path:
        return self.home / "servers.json"

    def environment(self) -> Mapping[str, str]:
        return {
            "ANTHROPIC_BASE_URL": self.base_url,
            "ANTHROPIC_API_KEY": "x",
            "ANTHROPIC_MODEL": MODEL,
            "ANTHROPIC_SMALL_FAST_MODEL": MODEL,
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "512",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_TELEMETRY": "1",
            "DISABLE_AUTOUPDATER": "1",
            "DISABLE_ERROR_REPORTING": "1",
            "IS_SANDBOX": "1",
            # Or else the first request goes out before the tools are there, and a model has to look for them.
            "ENABLE_TOOL_SEARCH": "false",
            "MCP_CONNECTION_NONBLOCKING": "0",
            "MCP_CONNECT_TIMEOUT_MS": "60000",
        }

    def command(self, doing: Doing) -> tuple[Sequence[str], str]:
        goes_on = {"": [], "continue": ["--continue"], "fork": ["--continue", "--fork-session"]}[doing.goes_on]
        bare = ["--bare"] if self.bare else []
        argv = [str(self.found), "-p", doing.prompt, "--output-format", "json", *bare, *goes_on]
        if self.tools:
            argv += ["--mcp-config", str(self._servers), "--strict-mcp-config"]
        return [*argv, "--allowedTools", "Bash", "Agent", f"mcp__{TOOLS}"], ""


class Codex(Agent):
    """Codex CLI, over Responses."""

    name = "codex"
    executable = "codex"
    api = "responses"
    named = f"mcp__{TOOLS.replace('-', '_')}__"

    def prepare(self) -> None:
        lines = [
            f'model = "{MODEL}"',
            'model_provider = "gateway"',
            "check_for_update_on_startup = false",
            "[analytics]",
            "enabled = false",
            "[model_providers.gateway]",
            'name = "gateway"',
            f'base_url = "{self.base_url}/v1"',
            'wire_api = "responses"',
            'env_key = "OPENAI_API_KEY"',
        ]
        self._config.write_text("\n".join(lines) + "\n")

    def offer(self, tools: ToolServer) -> None:
        super().offer(tools)
        variables = [f"{name} = {json.dumps(value)}" for name, value in tools.environment.items()]
        stdio = [f"command = {json.dumps(tools.command[0])}", f"args = {json.dumps(tools.command[1:])}",
                 f"[mcp_servers.{TOOLS}.env]", *variables]  # fmt: skip
        waiting = "required = true"  # or else the first request goes out before the tools are there
        lines = [f"[mcp_servers.{TOOLS}]", waiting, *(stdio if tools.stdio else [f'url = "{tools.endpoint}"'])]
        with self._config.open("a") as config:
            config.write("\n".join(lines) + "\n")

    @property
    def _config(self) -> Path:
        return self.home / "config.toml"

    def environment(self) -> Mapping[str, str]:
        return {"CODEX_HOME": str(self.home), "OPENAI_API_KEY": "x"}

    def command(self, doing: Doing) -> tuple[Sequence[str], str]:
        goes_on = {"": [], "continue": ["resume", "--last"], "fork": ["fork", self._last() if doing.goes_on else ""]}
        flags = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
        return [str(self.found), "exec", *goes_on[doing.goes_on], *flags, doing.prompt], ""

    def _last(self) -> str:
        """The id of the newest session: the name of its file ends with it."""
        newest = max(self.home.glob("sessions/**/*.jsonl"), key=lambda file: file.stat().st_mtime)
        return newest.stem[-36:]


class OpenCode(Agent):
    """OpenCode, over chat completions."""

    name = "opencode"
    executable = "opencode"
    api = "chat"
    named = f"{TOOLS}_"

    def prepare(self) -> None:
        options = {"baseURL": f"{self.base_url}/v1", "apiKey": "x"}
        limit = {"context": 32_768, "output": 512}
        provider = {"npm": "@ai-sdk/openai-compatible", "name": "gateway", "options": options,
                    "models": {MODEL: {"name": MODEL, "limit": limit}}}  # fmt: skip
        config = {"autoupdate": False, "share": "disabled", "model": f"gateway/{MODEL}",
                  "small_model": f"gateway/{MODEL}", "provider": {"gateway": provider},
                  "permission": {"bash": "allow"}}  # fmt: skip
        self._config.parent.mkdir(parents=True, exist_ok=True)
        self._config.write_text(json.dumps(config))

    def offer(self, tools: ToolServer) -> None:
        super().offer(tools)
        stdio = {"type": "local", "command": tools.command, "environment": tools.environment}
        server = stdio if tools.stdio else {"type": "remote", "url": tools.endpoint}
        self._config.write_text(json.dumps({**json.loads(self._config.read_text()), "mcp": {TOOLS: server}}))

    @property
    def _config(self) -> Path:
        return self.home / ".config" / "opencode" / "opencode.json"

    def environment(self) -> Mapping[str, str]:
        return {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"}

    def command(self, doing: Doing) -> tuple[Sequence[str], str]:
        goes_on = {"": [], "continue": ["--continue"], "fork": ["--continue", "--fork"]}[doing.goes_on]
        # A prompt on the command line would be put in quotation marks.
        return [str(self.found), "run", *goes_on], doing.prompt


class AgentsSDK(Agent):
    """The OpenAI Agents SDK; the prompts of a conversation are the lines of its input."""

    name = "openai-agents"
    executable = "python"
    api = "chat"
    flags: Sequence[str] = ("chat", "whole")

    def version(self) -> str:
        ask = "from importlib.metadata import version; print(version('openai-agents'))"
        return self._run([str(self.found), "-c", ask], "").stdout.strip()

    def command(self, doing: Doing) -> tuple[Sequence[str], str]:
        return [str(self.found), str(_SCRIPT), f"{self.base_url}/v1", MODEL, *self.flags], doing.prompt

    def environment(self) -> Mapping[str, str]:
        if self.tools is None:
            return {}
        stdio = {"command": self.tools.command[0], "args": self.tools.command[1:], "env": self.tools.environment}
        return {"TOOLS": json.dumps(stdio if self.tools.stdio else {"url": self.tools.endpoint})}
