"""Agents as people install them, and how each is pointed at a base URL and told to do something without a terminal."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MODEL = "demo"
_WITHIN_S = 120.0
_SCRIPT = Path(__file__).with_name("openai_agent.py")


@dataclass(frozen=True, slots=True)
class Doing:
    """One run of an agent: a prompt, how it goes on from the run before, and what must be in what it prints."""

    prompt: str
    goes_on: str = ""  # "", "continue" or "fork"
    expect: str = ""


class Agent:
    """An agent with a home directory of its own, so that nobody's settings or credentials are seen by it."""

    name = ""
    executable = ""
    api = ""  # the dialect it speaks

    def __init__(self, found: Path, folder: Path, base_url: str) -> None:
        self.found = found
        self.base_url = base_url
        self.home, self.work = folder / "home", folder / "work"
        for made in (self.home, self.work):
            made.mkdir(parents=True, exist_ok=True)
        self.prepare()

    def prepare(self) -> None:
        """Write the configuration that it needs."""

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
    bare = False  # the short system prompt

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
        }

    def command(self, doing: Doing) -> tuple[Sequence[str], str]:
        goes_on = {"": [], "continue": ["--continue"], "fork": ["--continue", "--fork-session"]}[doing.goes_on]
        bare = ["--bare"] if self.bare else []
        argv = [str(self.found), "-p", doing.prompt, "--output-format", "json", *bare, *goes_on]
        return [*argv, "--allowedTools", "Bash", "Agent"], ""


class Codex(Agent):
    """Codex CLI, over Responses."""

    name = "codex"
    executable = "codex"
    api = "responses"

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
        (self.home / "config.toml").write_text("\n".join(lines) + "\n")

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

    def prepare(self) -> None:
        options = {"baseURL": f"{self.base_url}/v1", "apiKey": "x"}
        limit = {"context": 32_768, "output": 512}
        provider = {"npm": "@ai-sdk/openai-compatible", "name": "gateway", "options": options,
                    "models": {MODEL: {"name": MODEL, "limit": limit}}}  # fmt: skip
        config = {"autoupdate": False, "share": "disabled", "model": f"gateway/{MODEL}",
                  "small_model": f"gateway/{MODEL}", "provider": {"gateway": provider},
                  "permission": {"bash": "allow"}}  # fmt: skip
        folder = self.home / ".config" / "opencode"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "opencode.json").write_text(json.dumps(config))

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
