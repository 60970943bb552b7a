"""What each agent is told to do on the tour. The scripted engine makes the tool calls that the prompts name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.agent_kinds import Agent, AgentsSDK, ClaudeCode, Codex, Doing, OpenCode

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
    """A conversation with an agent, run after run. `tools` results must have reached the engine."""

    name: str
    agent: Callable[[Path, Path, str], Agent]
    doings: Sequence[Doing]
    tools: int

    @property
    def kind(self) -> type[Agent]:
        """The agent without its options."""
        made = self.agent
        return made if isinstance(made, type) else made.kind  # type: ignore[attr-defined, no-any-return]


@dataclass(frozen=True, slots=True)
class _With:
    """An agent with another value of an option."""

    kind: type[Agent]
    option: str
    value: object

    def __call__(self, found: Path, folder: Path, base_url: str) -> Agent:
        agent = self.kind(found, folder, base_url)
        setattr(agent, self.option, self.value)
        return agent


def _talk(*lines: str) -> tuple[Doing, ...]:
    return (Doing("\n".join(lines), expect="sunny in Oslo"),)


_CLAUDE_LOOP = (
    Doing(f"Two at once. {_BASH}&{_BASH_2} {_BASH_3}", expect="three"),
    Doing("And now goodbye.", "continue", f"{_ALL} 0 steps"),
    Doing(f"Another way. {_BASH}", "fork", f"{_ALL} 1 steps"),
)
_CODEX_LOOP = (
    Doing(f"Two at once. {_EXEC}&{_EXEC_2} {_EXEC}", expect=f"{_ALL} 2 steps"),
    Doing("And now goodbye.", "continue", f"{_ALL} 0 steps"),
    Doing(f"Another way. {_EXEC}", "fork", f"{_ALL} 1 steps"),
)
_OPENCODE_LOOP = (
    Doing(f"Two at once. {_SHELL}&{_SHELL_2} {_SHELL}", expect=f"{_ALL} 2 steps"),
    Doing("And now goodbye.", "continue", f"{_ALL} 0 steps"),
    Doing(f"Another way. {_SHELL}", "fork", f"{_ALL} 1 steps"),
)

SCENARIOS = (
    Scenario("a tool loop, continued, forked", ClaudeCode, _CLAUDE_LOOP, 4),
    Scenario(
        "a sub-agent",
        ClaudeCode,
        [Doing(
            f'Delegate. [[Agent {{"description":"sub work","prompt":"{_SUB}","subagent_type":"general-purpose"}}]]',
            expect="from-sub",
        )],
        2,
    ),
    Scenario(
        "compaction",
        ClaudeCode,
        [Doing(f"Remember. {_BASH}", expect=_ALL), Doing("/compact", "continue"), Doing("Go on.", "continue", _ALL)],
        1,
    ),
    Scenario("--bare: a tool loop", _With(ClaudeCode, "bare", True), _CLAUDE_LOOP[:2], 3),
    Scenario("a tool loop, continued, forked", Codex, _CODEX_LOOP, 4),
    Scenario(
        "a sub-agent",
        Codex,
        [Doing(f'Delegate. [[multi_agent_v1__spawn_agent {{"message":"{_EXEC_SUB}"}}]] {_WAIT}', expect=_ALL)],
        2,
    ),
    Scenario("a tool loop, continued, forked", OpenCode, _OPENCODE_LOOP, 4),
    Scenario(
        "a sub-agent",
        OpenCode,
        [Doing(
            f'Delegate. [[task {{"description":"sub work","prompt":"{_SHELL_SUB}","subagent_type":"general"}}]]',
            expect="completed",
        )],
        2,
    ),
    *(
        Scenario(
            f"{api}, {how}",
            _With(AgentsSDK, "flags", (api, how)),
            _talk(f"Weather, {api}, {how}? {_WEATHER}", "Thank you."),
            3,
        )
        for api in ("chat", "responses")
        for how in ("whole", "stream")
    ),
    Scenario(
        "responses, by previous_response_id",
        _With(AgentsSDK, "flags", ("responses", "stream", "previous")),
        _talk(f"Weather, by id? {_WEATHER}", "Thank you."),
        3,
    ),
)  # fmt: skip

_PLAIN = (Doing("Say something."), Doing("And something else.", "continue"))
# The demo model calls no tools, and has room for 32,768 tokens: Claude Code's long prompt has more.
PLAIN = (
    Scenario("--bare: two turns", _With(ClaudeCode, "bare", True), _PLAIN, 0),
    Scenario("two turns", Codex, _PLAIN, 0),
    Scenario("two turns", OpenCode, _PLAIN, 0),
    *(
        Scenario(
            f"{api}, {how}, two turns",
            _With(AgentsSDK, "flags", (api, how)),
            (Doing(f"Say something, {api}, {how}.\nAnd something else."),),
            0,
        )
        for api in ("chat", "responses")
        for how in ("whole", "stream")
    ),
)
