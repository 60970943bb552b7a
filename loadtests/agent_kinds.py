"""Agents as users install them: how each is pointed at a base URL and run without a terminal."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MODEL = "demo"
TOOLS = "context-windows"  # name of the gateway's MCP server in an agent's configuration
_TIMEOUT_S = 120.0
_SCRIPT = Path(__file__).with_name("openai_agent.py")
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class AgentRun:
    """One run of an agent: its prompt, how it resumes the run before, and a text that its output must contain."""

    prompt: str
    resume: str = ""  # "", "continue" or "fork"
    expect: str = ""


@dataclass(frozen=True, slots=True)
class ToolServer:
    """The gateway's MCP server as configured in an agent: by URL, or as the command that serves stdio."""

    url: str
    stdio: bool

    @property
    def command(self) -> list[str]:
        """The command that serves MCP over stdio."""
        return [sys.executable, "-m", "gateway", "mcp"]

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of that command."""
        return {"CWG_URL": self.url, "PYTHONPATH": str(_ROOT)}

    @property
    def endpoint(self) -> str:
        """The URL of the MCP server over HTTP."""
        return f"{self.url}/mcp"


class Agent:
    """An agent with its own home directory, so that it sees no settings or credentials of the user."""

    name = ""
    executable = ""
    api = ""  # the dialect it speaks
    tool_prefix = ""  # which it puts in front of the names of the gateway's tools
    tools: ToolServer | None = None

    def __init__(self, path: Path, folder: Path, base_url: str) -> None:
        self.path = path
        self.base_url = base_url
        self.home, self.work = folder / "home", folder / "work"
        for directory in (self.home, self.work):
            directory.mkdir(parents=True, exist_ok=True)
        self.prepare()

    def prepare(self) -> None:
        """Write the agent's configuration."""

    def configure_tools(self, tools: ToolServer) -> None:
        """Add the gateway's MCP server to the agent's configuration."""
        self.tools = tools

    def environment(self) -> Mapping[str, str]:
        """Environment variables that the agent needs."""
        return {}

    def command(self, run: AgentRun) -> tuple[Sequence[str], str]:
        """The command line, and the text for its standard input."""
        raise NotImplementedError

    def version(self) -> str:
        """The version that the agent reports."""
        return self._execute([str(self.path), "--version"], "").stdout.strip().split("\n")[-1]

    def run(self, run: AgentRun) -> str:
        """Run the agent once and return its output. Raises RuntimeError if it fails or lacks the expected text."""
        argv, stdin = self.command(run)
        process = self._execute(argv, stdin)
        if process.returncode or run.expect not in process.stdout:
            raise RuntimeError(
                f"{self.name} exited with {process.returncode}; expected {run.expect!r} in:\n{process.stdout[-2000:]}"
                f"\nand it wrote to stderr:\n{process.stderr[-2000:]}"
            )
        return process.stdout

    def _execute(self, argv: Sequence[str], stdin: str) -> "subprocess.CompletedProcess[str]":
        base = {"PATH": f"{self.path.parent}:{os.environ['PATH']}", "HOME": str(self.home), "TERM": "dumb",
                "LANG": "C.UTF-8", "NO_PROXY": "127.0.0.1"}  # fmt: skip
        return subprocess.run(
            argv, cwd=self.work, env={**base, **self.environment()}, input=stdin, capture_output=True, text=True,
            timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip


class ClaudeCode(Agent):
    """Claude Code, over Messages."""

    name = "claude-code"
    executable = "claude"
    api = "messages"
    tool_prefix = f"mcp__{TOOLS}__"
    bare = False  # the short system prompt

    def configure_tools(self, tools: ToolServer) -> None:
        super().configure_tools(tools)
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
            # Otherwise the first request is sent before the tools are loaded, and the model has to search for them.
            "ENABLE_TOOL_SEARCH": "false",
            "MCP_CONNECTION_NONBLOCKING": "0",
            "MCP_CONNECT_TIMEOUT_MS": "60000",
        }

    def command(self, run: AgentRun) -> tuple[Sequence[str], str]:
        flags = {"": [], "continue": ["--continue"], "fork": ["--continue", "--fork-session"]}[run.resume]
        bare = ["--bare"] if self.bare else []
        argv = [str(self.path), "-p", run.prompt, "--output-format", "json", *bare, *flags]
        if self.tools:
            argv += ["--mcp-config", str(self._servers), "--strict-mcp-config"]
        return [*argv, "--allowedTools", "Bash", "Agent", f"mcp__{TOOLS}"], ""


class Codex(Agent):
    """Codex CLI, over Responses."""

    name = "codex"
    executable = "codex"
    api = "responses"
    tool_prefix = f"mcp__{TOOLS.replace('-', '_')}__"

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

    def configure_tools(self, tools: ToolServer) -> None:
        super().configure_tools(tools)
        variables = [f"{name} = {json.dumps(value)}" for name, value in tools.environment.items()]
        stdio = [f"command = {json.dumps(tools.command[0])}", f"args = {json.dumps(tools.command[1:])}",
                 f"[mcp_servers.{TOOLS}.env]", *variables]  # fmt: skip
        wait_for_tools = "required = true"  # otherwise the first request is sent before the tools are loaded
        lines = [f"[mcp_servers.{TOOLS}]", wait_for_tools, *(stdio if tools.stdio else [f'url = "{tools.endpoint}"'])]
        with self._config.open("a") as config:
            config.write("\n".join(lines) + "\n")

    @property
    def _config(self) -> Path:
        return self.home / "config.toml"

    def environment(self) -> Mapping[str, str]:
        return {"CODEX_HOME": str(self.home), "OPENAI_API_KEY": "x"}

    def command(self, run: AgentRun) -> tuple[Sequence[str], str]:
        flags = {"": [], "continue": ["resume", "--last"], "fork": ["fork", self._last() if run.resume else ""]}
        options = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
        return [str(self.path), "exec", *flags[run.resume], *options, run.prompt], ""

    def _last(self) -> str:
        """The id of the newest session: the name of its file ends with it."""
        newest = max(self.home.glob("sessions/**/*.jsonl"), key=lambda file: file.stat().st_mtime)
        return newest.stem[-36:]


class OpenCode(Agent):
    """OpenCode, over chat completions."""

    name = "opencode"
    executable = "opencode"
    api = "chat"
    tool_prefix = f"{TOOLS}_"

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

    def configure_tools(self, tools: ToolServer) -> None:
        super().configure_tools(tools)
        stdio = {"type": "local", "command": tools.command, "environment": tools.environment}
        server = stdio if tools.stdio else {"type": "remote", "url": tools.endpoint}
        self._config.write_text(json.dumps({**json.loads(self._config.read_text()), "mcp": {TOOLS: server}}))

    @property
    def _config(self) -> Path:
        return self.home / ".config" / "opencode" / "opencode.json"

    def environment(self) -> Mapping[str, str]:
        return {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"}

    def command(self, run: AgentRun) -> tuple[Sequence[str], str]:
        flags = {"": [], "continue": ["--continue"], "fork": ["--continue", "--fork"]}[run.resume]
        # A prompt on the command line would be wrapped in quotation marks.
        return [str(self.path), "run", *flags], run.prompt


class AgentsSDK(Agent):
    """The OpenAI Agents SDK; each line of its input is the next prompt of one conversation."""

    name = "openai-agents"
    executable = "python"
    api = "chat"
    flags: Sequence[str] = ("chat", "whole")

    def version(self) -> str:
        ask = "from importlib.metadata import version; print(version('openai-agents'))"
        return self._execute([str(self.path), "-c", ask], "").stdout.strip()

    def command(self, run: AgentRun) -> tuple[Sequence[str], str]:
        return [str(self.path), str(_SCRIPT), f"{self.base_url}/v1", MODEL, *self.flags], run.prompt

    def environment(self) -> Mapping[str, str]:
        if self.tools is None:
            return {}
        stdio = {"command": self.tools.command[0], "args": self.tools.command[1:], "env": self.tools.environment}
        return {"TOOLS": json.dumps(stdio if self.tools.stdio else {"url": self.tools.endpoint})}
