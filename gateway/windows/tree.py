"""Tree: where every window and session of a tenant came from, as one list of nodes, read from the store alone."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gateway.records import Session, Window
from gateway.store.types import WindowQuery
from gateway.windows.context import Services

Kind = Literal["session", "window"]
Relation = Literal["frozen from", "cloned from", "thawed from", "forked from", "went on from"]
NodeName = tuple[Kind, str]
Origin = tuple[NodeName | None, Relation | None]
MAX_NODES = 10_000  # nodes of a kind


@dataclass(frozen=True, slots=True)
class Node:
    """A window or a session.

    `parent` is None where it has none among the nodes; `missing_parent` then names the one that it had, which was
    deleted, or is not among them because of the limit, or was never here because the window was imported.
    """

    kind: Kind
    name: str
    title: str | None
    state: str
    model: str
    token_count: int
    created_at: float
    parent: NodeName | None
    relation: Relation | None
    missing_parent: NodeName | None


@dataclass(frozen=True, slots=True)
class Tree:
    """Nodes, oldest first, so a parent precedes its children; `windows` and `sessions` count all that exist."""

    nodes: tuple[Node, ...]
    windows: int
    sessions: int

    @property
    def truncated(self) -> bool:
        """Whether some are missing."""
        return len(self.nodes) < self.windows + self.sessions


async def tree(services: Services, tenant: str, limit: int) -> Tree:
    """Return the newest `limit` windows and the `limit` sessions last active, each with its parent."""
    await services.recorder.flush()
    windows, window_count = await services.store.list_windows(tenant, WindowQuery(limit=limit))
    sessions, session_count = await services.store.list_sessions(tenant, state=None, model=None, limit=limit, offset=0)
    found = await asyncio.to_thread(nodes, windows, sessions)  # up to 20,000
    return Tree(tuple(found), window_count, session_count)


def nodes(windows: Sequence[Window], sessions: Sequence[Session]) -> list[Node]:
    """Every window and session with its parent, oldest first."""
    by_name = {window.name: window for window in windows}
    by_id = {session.id: session for session in sessions}
    found = [_session_node(one, by_name, by_id) for one in sessions]
    found += [_window_node(one, by_name, by_id) for one in windows]
    return sorted(found, key=lambda node: node.created_at)


def _session_node(one: Session, windows: Mapping[str, Window], sessions: Mapping[str, Session]) -> Node:
    parent, relation = _origin_of_session(one, windows, sessions)
    # One that was taken back to a window may be older than that: it is the window's parent, not its child.
    missing = None if parent or (one.rewinds and one.window in windows) else _recorded_parent(one)
    return Node(
        "session", one.id, one.title, one.state, one.model, one.token_count, one.created_at, parent, relation, missing
    )


def _window_node(one: Window, windows: Mapping[str, Window], sessions: Mapping[str, Session]) -> Node:
    parent, relation = _origin_of_window(one, windows, sessions)
    missing: NodeName | None = None if parent else ("session", one.session_id)
    return Node(
        "window", one.name, one.title, one.kv, one.model, one.token_count, one.created_at, parent, relation, missing
    )


def _recorded_parent(one: Session) -> NodeName | None:
    if one.parent:
        return "session", one.parent
    return ("window", one.window) if one.window else None


def _origin_of_session(one: Session, windows: Mapping[str, Window], sessions: Mapping[str, Session]) -> Origin:
    parent = sessions.get(one.parent or "")
    if parent is not None and _older(parent, one):
        return ("session", parent.id), "went on from" if parent.successor == one.id else "forked from"
    window = windows.get(one.window or "")
    if window is not None and _older(window, one):
        return ("window", window.name), "thawed from"
    return None, None


def _origin_of_window(one: Window, windows: Mapping[str, Window], sessions: Mapping[str, Session]) -> Origin:
    parent = windows.get(one.parent or "")
    # A clone has the session of its source; a window that was frozen from a thawed session has that session.
    if parent is not None and parent.session_id == one.session_id and _older(parent, one):
        return ("window", parent.name), "cloned from"
    session = sessions.get(one.session_id)
    if session is not None and _older(session, one):
        return ("session", session.id), "frozen from"
    if parent is not None and _older(parent, one):  # the session between them was deleted
        return ("window", parent.name), "went on from"
    return None, None


def _older(parent: Window | Session, child: Window | Session) -> bool:
    """Whether it can be the parent: one that took over a deleted one's name is younger. This also excludes cycles."""
    return parent.created_at < child.created_at
