"""Tree: where every window and session of a tenant came from, as one list of nodes, from the store alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gateway.records import Session, Window
from gateway.store.types import WindowQuery
from gateway.windows.context import Services

Kind = Literal["session", "window"]
Relation = Literal["frozen from", "cloned from", "thawed from", "forked from", "went on from"]
MOST = 10_000  # nodes of a kind


@dataclass(frozen=True, slots=True)
class Node:
    """A window or a session. `parent` is None where it came from nothing that is still there."""

    kind: Kind
    name: str
    state: str
    model: str
    token_count: int
    created_at: float
    parent: tuple[Kind, str] | None
    relation: Relation | None


@dataclass(frozen=True, slots=True)
class Tree:
    """Nodes, oldest first, so a parent stands before its children; `windows` and `sessions` are all there are."""

    nodes: tuple[Node, ...]
    windows: int
    sessions: int

    @property
    def truncated(self) -> bool:
        """Whether some are missing."""
        return len(self.nodes) < self.windows + self.sessions


async def tree(services: Services, tenant: str, limit: int) -> Tree:
    """Return at most `limit` windows, the newest, and as many sessions, the last active, and who came from whom."""
    await services.recorder.flush()
    windows, window_count = await services.store.list_windows(tenant, WindowQuery(limit=limit))
    sessions, session_count = await services.store.list_sessions(tenant, state=None, model=None, limit=limit, offset=0)
    return Tree(tuple(nodes(windows, sessions)), window_count, session_count)


def nodes(windows: Sequence[Window], sessions: Sequence[Session]) -> list[Node]:
    """Every window and session with its parent, oldest first."""
    window_of = {window.name: window for window in windows}
    session_of = {session.id: session for session in sessions}
    found = [
        *(_session(one, *_origin_of_session(one, window_of, session_of)) for one in sessions),
        *(_window(one, *_origin_of_window(one, window_of, session_of)) for one in windows),
    ]
    return sorted(found, key=lambda node: node.created_at)


def _origin_of_session(
    one: Session, windows: dict[str, Window], sessions: dict[str, Session]
) -> tuple[tuple[Kind, str] | None, Relation | None]:
    stem = sessions.get(one.parent or "")
    if stem is not None and _older(stem, one):
        return ("session", stem.id), "went on from" if stem.successor == one.id else "forked from"
    window = windows.get(one.window or "")
    if window is not None and _older(window, one):
        return ("window", window.name), "thawed from"
    return None, None


def _origin_of_window(
    one: Window, windows: dict[str, Window], sessions: dict[str, Session]
) -> tuple[tuple[Kind, str] | None, Relation | None]:
    parent = windows.get(one.parent or "")
    # A clone has the session of its source; a window that was frozen from a thawed session has that session.
    if parent is not None and parent.session_id == one.session_id and _older(parent, one):
        return ("window", parent.name), "cloned from"
    session = sessions.get(one.session_id)
    if session is not None and _older(session, one):
        return ("session", session.id), "frozen from"
    if parent is not None and _older(parent, one):  # the session between them is gone
        return ("window", parent.name), "went on from"
    return None, None


def _older(parent: Window | Session, child: Window | Session) -> bool:
    """An id that was used again names a stranger, who is younger; so nothing can come from its own descendant."""
    return parent.created_at < child.created_at


def _session(one: Session, parent: tuple[Kind, str] | None, relation: Relation | None) -> Node:
    return Node("session", one.id, one.state, one.model, one.token_count, one.created_at, parent, relation)


def _window(one: Window, parent: tuple[Kind, str] | None, relation: Relation | None) -> Node:
    return Node("window", one.name, one.kv, one.model, one.token_count, one.created_at, parent, relation)
