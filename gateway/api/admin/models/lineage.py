"""Which window and which session came from which, as the admin API answers it."""

from pydantic import Field

from gateway.api.admin.models.responses import Answer, Moment, absent
from gateway.windows.tree import Kind, Relation


class NodeName(Answer):
    kind: Kind
    name: str


class Node(NodeName):
    title: str | None
    state: str
    model: str
    token_count: int
    created_at: Moment
    parent: NodeName | None
    relation: Relation | None
    missing_parent: NodeName = absent()


class Tree(Answer):
    nodes: list[Node] = Field(description="oldest first")
    windows: int
    sessions: int
    truncated: bool
    limit: int
