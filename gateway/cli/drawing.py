"""Draw lineage as a tree in a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text
from rich.tree import Tree

Node = Mapping[str, Any]
_STYLE = {"window": "bold cyan", "session": "green"}


def trees(nodes: Sequence[Node]) -> list[Tree]:
    """Return a tree for each node that came from nowhere. `nodes` has every parent before its children."""
    drawn: dict[tuple[str, str], Tree] = {}
    roots: list[Tree] = []
    for node in nodes:
        parent = node["parent"]
        if parent is None:
            here = Tree(_label(node), guide_style="dim")
            roots.append(here)
        else:
            here = drawn[parent["kind"], parent["name"]].add(_label(node))
        drawn[node["kind"], node["name"]] = here
    return roots


def _label(node: Node) -> Text:
    kind = node["kind"]
    state = f"kv {node['state']}" if kind == "window" else node["state"]
    what = f"  {kind}, {state}, {node['token_count']} tokens"
    came = f", {node['relation']} it" if node["relation"] else ""
    return Text.assemble((node["name"], _STYLE[kind]), (what + came, "dim"))
