"""Match a request to a session by reply aliases alone (see `reply_aliases`)."""

from collections.abc import Sequence

from gateway.records import AliasMatch
from gateway.sessions.prefix_chain import PrefixMatch
from gateway.sessions.reply_aliases import KINDS, Answered, Context, Kind, Marks, Match, compare, is_named


def judge(reply: Answered, found: Sequence[AliasMatch]) -> PrefixMatch | None:
    """Say which session a request goes on with that holds this reply, as its last or before exchanges that the client
    made up; None where it is nobody's.

    The name that leaves out least decides. Several sessions of one lineage that answer to it: a fork, so that their KV
    is shared. Sessions of several lineages: nobody can know, and the request is a stranger's.
    """
    verdicts = (_judge_name(reply, kind, found) for kind in KINDS)
    return next((verdict for verdict in verdicts if verdict is not None), None)


def _judge_name(reply: Answered, kind: Kind, found: Sequence[AliasMatch]) -> PrefixMatch | None:
    meant: dict[Match, list[tuple[AliasMatch, Marks]]] = {"": [], "same": [], "side": []}
    for one in found:
        if is_named(kind, reply.names, one.alias):
            marks = Marks.read(one.alias.marks)
            meant[compare(kind, reply.context, marks)].append((one, marks))
    current = _closest(reply.context, [pair for pair in meant["same"] if pair[0].current])
    if len(current) == 1:
        return PrefixMatch(current[0].session, depth=reply.depth, how="last reply")
    stems = _closest(reply.context, meant["same"] or meant["side"])
    return _branch(stems, reply.depth, "fork" if meant["same"] else "side") if stems else None


def _closest(here: Context, found: Sequence[tuple[AliasMatch, Marks]]) -> list[AliasMatch]:
    """Those whose question has most lines in common with this one: where a client begins every conversation with the
    same pages of instructions, most of the lines of any two are the same."""
    shared = [len(here.lines & marks.lines) for _, marks in found]
    return [one for (one, _), lines in zip(found, shared, strict=True) if lines == max(shared)]


def _branch(stems: Sequence[AliasMatch], depth: int, how: str) -> PrefixMatch:
    if len({one.session.lineage for one in stems}) > 1:
        return PrefixMatch(None, how="ambiguous")
    return PrefixMatch(stems[0].session, forks=True, depth=depth, how=how)
