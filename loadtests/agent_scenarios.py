"""The scenarios of each agent on the tour. The scripted engine makes the tool calls that the prompts name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.agent_kinds import Agent, AgentRun, AgentsSDK, ClaudeCode, Codex, OpenCode

_ALL = "That is all after"
_BASH = '[[Bash {"command":"echo one","description":"say one"}]]'
_BASH_2 = '[[Bash {"command":"echo two","description":"say two"}]]'
_BASH_3 = '[[Bash {"command":"echo three","description":"say three"}]]'
_SUB = 'You are the sub. [[Bash {\\"command\\":\\"echo from-sub\\",\\"description\\":\\"say\\"}]]'
_EXEC = '[[exec_command {"cmd":"echo one"}]]'
_EXEC_2 = '[[exec_command {"cmd":"echo two"}]]'
_EXEC_SUB = 'You are the sub. [[exec_command {\\"cmd\\":\\"echo from-sub\\"}]]'
_WAIT = '[[exec_command {"cmd":"sleep 3"}]]'  # the sub-agent is not waited for
_SHELL = '[[bash {"command":"echo one","description":"say one"}]]'
_SHELL_2 = '[[bash {"command":"echo two","description":"say two"}]]'
_SHELL_SUB = 'You are the sub. [[bash {\\"command\\":\\"echo from-sub\\",\\"description\\":\\"say\\"}]]'
_WEATHER = '[[get_weather {"city": "Oslo"}]]&[[get_weather {"city": "Rome"}]] [[get_weather {"city": "Bern"}]]'


@dataclass(frozen=True, slots=True)
class Scenario:
    """A conversation with an agent in several runs, after which `tools` tool results must have reached the engine."""

    name: str
    agent: Callable[[Path, Path, str], Agent]
    runs: Sequence[AgentRun]
    tools: int

    @property
    def kind(self) -> type[Agent]:
        """The agent without its options."""
        agent = self.agent
        return agent if isinstance(agent, type) else agent.kind  # type: ignore[attr-defined, no-any-return]


@dataclass(frozen=True, slots=True)
class _WithOption:
    """An agent with one attribute set to another value."""

    kind: type[Agent]
    option: str
    value: object

    def __call__(self, path: Path, folder: Path, base_url: str) -> Agent:
        agent = self.kind(path, folder, base_url)
        setattr(agent, self.option, self.value)
        return agent


def _talk(*lines: str) -> tuple[AgentRun, ...]:
    return (AgentRun("\n".join(lines), expect="sunny in Oslo"),)


_CLAUDE_LOOP = (
    AgentRun(f"Two at once. {_BASH}&{_BASH_2} {_BASH_3}", expect="three"),
    AgentRun("And now goodbye.", "continue", f"{_ALL} 0 steps"),
    AgentRun(f"Another way. {_BASH}", "fork", f"{_ALL} 1 steps"),
)
_CODEX_LOOP = (
    AgentRun(f"Two at once. {_EXEC}&{_EXEC_2} {_EXEC}", expect=f"{_ALL} 2 steps"),
    AgentRun("And now goodbye.", "continue", f"{_ALL} 0 steps"),
    AgentRun(f"Another way. {_EXEC}", "fork", f"{_ALL} 1 steps"),
)
_OPENCODE_LOOP = (
    AgentRun(f"Two at once. {_SHELL}&{_SHELL_2} {_SHELL}", expect=f"{_ALL} 2 steps"),
    AgentRun("And now goodbye.", "continue", f"{_ALL} 0 steps"),
    AgentRun(f"Another way. {_SHELL}", "fork", f"{_ALL} 1 steps"),
)

SCENARIOS = (
    Scenario("a tool loop, continued, forked", ClaudeCode, _CLAUDE_LOOP, 4),
    Scenario(
        "a sub-agent",
        ClaudeCode,
        [AgentRun(
            f'Delegate. [[Agent {{"description":"sub work","prompt":"{_SUB}","subagent_type":"general-purpose"}}]]',
            expect="from-sub",
        )],
        2,
    ),
    Scenario(
        "compaction",
        ClaudeCode,
        [
            AgentRun(f"Remember. {_BASH}", expect=_ALL),
            AgentRun("/compact", "continue"),
            AgentRun("Go on.", "continue", _ALL),
        ],
        1,
    ),
    Scenario("--bare: a tool loop", _WithOption(ClaudeCode, "bare", True), _CLAUDE_LOOP[:2], 3),
    Scenario("a tool loop, continued, forked", Codex, _CODEX_LOOP, 4),
    Scenario(
        "a sub-agent",
        Codex,
        [AgentRun(f'Delegate. [[multi_agent_v1__spawn_agent {{"message":"{_EXEC_SUB}"}}]] {_WAIT}', expect=_ALL)],
        2,
    ),
    Scenario("a tool loop, continued, forked", OpenCode, _OPENCODE_LOOP, 4),
    Scenario(
        "a sub-agent",
        OpenCode,
        [AgentRun(
            f'Delegate. [[task {{"description":"sub work","prompt":"{_SHELL_SUB}","subagent_type":"general"}}]]',
            expect="completed",
        )],
        2,
    ),
    *(
        Scenario(
            f"{api}, {how}",
            _WithOption(AgentsSDK, "flags", (api, how)),
            _talk(f"Weather, {api}, {how}? {_WEATHER}", "Thank you."),
            3,
        )
        for api in ("chat", "responses")
        for how in ("whole", "stream")
    ),
    Scenario(
        "responses, by previous_response_id",
        _WithOption(AgentsSDK, "flags", ("responses", "stream", "previous")),
        _talk(f"Weather, by id? {_WEATHER}", "Thank you."),
        3,
    ),
)  # fmt: skip

_PLAIN = (AgentRun("Say something."), AgentRun("And something else.", "continue"))
# The demo model calls no tools, and its context of 32,768 tokens is too small for Claude Code's long prompt.
PLAIN = (
    Scenario("--bare: two turns", _WithOption(ClaudeCode, "bare", True), _PLAIN, 0),
    Scenario("two turns", Codex, _PLAIN, 0),
    Scenario("two turns", OpenCode, _PLAIN, 0),
    *(
        Scenario(
            f"{api}, {how}, two turns",
            _WithOption(AgentsSDK, "flags", (api, how)),
            (AgentRun(f"Say something, {api}, {how}.\nAnd something else."),),
            0,
        )
        for api in ("chat", "responses")
        for how in ("whole", "stream")
    ),
)
