"""What the clients of `tests.support.operations_model` know together."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support.fakes.lmcache import FakeLMCache

REPLY = {"role": "assistant", "content": "Hello there!"}
NO_SESSION = (404, "session_not_found")  # a thawed one that was just deleted: its turn has nothing to continue
GONE = {NO_SESSION, (404, "window_not_found")}

Said = tuple[tuple[str, str], ...]


class Broken(AssertionError):
    """Something did not hold."""


def said(messages: list[dict[str, Any]]) -> Said:
    """A conversation as it is compared."""
    return tuple((m["role"], m["content"]) for m in messages)


@dataclass
class World:
    """What the clients know together."""

    http: httpx.AsyncClient
    data_dir: Path
    kv: Path
    cache: FakeLMCache
    random: random.Random
    forgets: bool  # whether the gateway forgets sessions by itself
    steps: int = 0
    sent: dict[str, set[Said]] = field(default_factory=dict)  # what was asked and answered, by the last question
    windows: dict[str, Said | None] = field(default_factory=dict)  # that exist; None: not read yet
    created: Counter[str] = field(default_factory=Counter)  # in this round
    deleted: Counter[str] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)  # that each session should have
    uncertain: set[str] = field(default_factory=set)  # sessions whose turns cannot be counted in this round
    log: list[str] = field(default_factory=list)
    latest: int = 0

    def note(self, whole: list[dict[str, Any]]) -> None:
        """A turn is about to be sent, with this reply to come."""
        self.sent.setdefault(whole[-2]["content"], set()).add(said(whole))

    def explained(self, text: Said) -> bool:
        """Whether a window may have this text: a turn's, appended to a window's where it continues one."""
        if len(text) < 2:
            return False
        turns = (turn for turn in self.sent.get(text[-2][1], ()) if text[-len(turn) :] == turn)
        return any(len(turn) == len(text) or self.explained(text[: -len(turn)]) for turn in turns)

    def name(self, kind: str, count: int) -> str:
        """One of so many names."""
        return f"{kind}{self.random.randrange(count)}"

    async def ask(
        self,
        method: str,
        path: str,
        allowed: set[tuple[int, str]],
        note: str = "",
        on_refused: Callable[[dict[str, Any]], None] = lambda error: None,
        **more: Any,
    ) -> httpx.Response | None:
        """Ask the gateway; None where it answered with one of the `allowed` errors, which `on_refused` gets."""
        answer = await self.http.request(method, path, **more)
        code = "" if answer.status_code < 400 else str(answer.json()["error"].get("code"))
        self.log.append(f"{method} {path} {note} -> {answer.status_code} {code}")
        if not code:
            return answer
        if (answer.status_code, code) not in allowed:
            raise Broken(f"{self.log[-1]}: {answer.text:.600}")
        on_refused(answer.json()["error"])
        return None

    async def must(self, method: str, path: str, note: str = "", **more: Any) -> httpx.Response:
        """Ask the gateway for what it cannot refuse."""
        answer = await self.ask(method, path, set(), note, **more)
        assert answer is not None
        return answer
