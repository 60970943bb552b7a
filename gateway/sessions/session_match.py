"""Match a request to a session: by its prefix, or by the aliases of a reply in it (`reply_aliases`)."""

from collections.abc import Sequence

from msgspec import Struct

from gateway.records import AliasMatch, Session
from gateway.sessions.prefix_chain import ConversationPrefix
from gateway.sessions.reply_aliases import KINDS, Answered, Context, Kind, Marks, Match, compare, has_alias

MATCHES = ("id", "prefix", "retry", "last-reply", "fork", "side", "window", "successor", "ambiguous", "new")
"""The values of the response header X-Session-Match, see docs/sessions.md."""


class SessionMatch(Struct, frozen=True, eq=False):
    """The session of a request, how it was recognised, and the seed of its prefix chain.

    `request` is the prefix of the request, if that was needed. `is_new`: the session has had no turn yet. `displaces`:
    another session still has its id.
    """

    session: Session
    source: str
    seed: bytes
    request: ConversationPrefix | None = None
    is_new: bool = False
    displaces: bool = False

    @property
    def request_hash(self) -> bytes | None:
        """The hash of the whole request, if that was needed."""
        return self.request.request_hash if self.request else None

    @property
    def header(self) -> str:
        """How the session was recognised, as in the response header."""
        word = self.source.replace(" ", "-")
        return word if word in MATCHES else "id"


class PrefixMatch(Struct, frozen=True):
    """The session that a request continues, or forks from. `depth` is how many of its messages were known."""

    session: Session | None
    forks: bool = False
    depth: int = 0
    how: str = "new"


NO_MATCH = PrefixMatch(None)


def match_by_prefix(request: ConversationPrefix, known: bytes | None, candidates: Sequence[Session]) -> PrefixMatch:
    """Match a request to one of `candidates`: the sessions that have been at `known`, its longest known hash.

    - At a session's last reply: the next turn.
    - The same request as a session's last one: a retry. But a first request that was answered begins a new session: an
      unrelated client may ask the same, and only a reply makes a conversation.
    - A session's last request with another reply after it: the reply was cut, or came back differently.
    - Anywhere before: a fork, provided that a reply is part of what is shared.
    """
    if known is None or not candidates:
        return NO_MATCH
    depth = request.depth(known)
    answered_before = any(reply <= depth and request.digests[reply - 1] for reply in request.replies)
    asking = [one for one in candidates if one.last_request_hash == known]
    if depth == len(request.prefix_hashes):
        return _match_repeated(depth, asking, candidates, answered_before)
    going = next((one for one in candidates if one.last_reply_hash == known), None)
    if going and (going.last_request_hash != going.last_reply_hash or answered_before or len(candidates) == 1):
        return PrefixMatch(going, depth=depth, how="prefix")
    waiting = next((one for one in asking if _awaits_reply(one)), None)
    if waiting:
        return PrefixMatch(waiting, depth=depth, how="prefix")
    # A client may send back any reply, even an empty one in place of a call that failed, so that cannot tell apart two
    # sessions that asked the same.
    replied = depth + 1 in request.replies or not request.digests[depth - 1]
    if replied and len(asking) == 1 and (answered_before or len(candidates) == 1):
        return PrefixMatch(asking[0], depth=depth, how="prefix")
    return PrefixMatch(candidates[0], forks=True, depth=depth, how="fork") if answered_before else NO_MATCH


def _match_repeated(
    depth: int, asking: Sequence[Session], candidates: Sequence[Session], answered_before: bool
) -> PrefixMatch:
    """Match a request that was sent before, word for word."""
    waiting = next((one for one in asking if _awaits_reply(one)), None)
    if waiting or (asking and answered_before):
        return PrefixMatch(waiting or asking[0], depth=depth, how="retry")
    return PrefixMatch(candidates[0], forks=True, depth=depth, how="fork") if answered_before else NO_MATCH


def _awaits_reply(session: Session) -> bool:
    """Whether a session's last request has no reply, or an empty one."""
    return not session.answered or session.last_reply_hash == session.last_request_hash


def was_answered(request: ConversationPrefix, match: PrefixMatch) -> bool:
    """Whether the same request was sent before, and was answered."""
    session = match.session
    whole = match.depth == len(request.prefix_hashes)
    return session is not None and whole and (match.forks or not _awaits_reply(session))


def more_likely(repeated: PrefixMatch, continued: PrefixMatch) -> PrefixMatch:
    """Choose between a request repeated after its answer, and the next turn of another session.

    An old request is repeated soon, so it is the session that was active last. A fork, from a session that has
    continued since, comes after both.
    """
    if repeated.session is None or continued.session is None or continued.forks:
        return repeated
    newer = continued.session.last_active_at > repeated.session.last_active_at
    return continued if repeated.forks or newer else repeated


# --- by reply aliases alone


def match_reply(reply: Answered, known: Sequence[AliasMatch]) -> PrefixMatch | None:
    """Match a request by a reply in it, which is its last or precedes exchanges that the client made up.

    None if no session has that reply. The alias that leaves out least decides. Several sessions of one lineage: a fork,
    so that their KV is shared. Sessions of several lineages: ambiguous, and the request begins a new session.
    """
    matches = (_match_alias(reply, kind, known) for kind in KINDS)
    return next((match for match in matches if match is not None), None)


def _match_alias(reply: Answered, kind: Kind, known: Sequence[AliasMatch]) -> PrefixMatch | None:
    by_match: dict[Match, list[tuple[AliasMatch, Marks]]] = {"": [], "same": [], "side": []}
    for one in known:
        if has_alias(kind, reply.aliases, one.alias):
            marks = Marks.read(one.alias.marks)
            by_match[compare(kind, reply.context, marks)].append((one, marks))
    current = _closest(reply.context, [pair for pair in by_match["same"] if pair[0].current])
    if len(current) == 1:
        return PrefixMatch(current[0].session, depth=reply.depth, how="last reply")
    stems = _closest(reply.context, by_match["same"] or by_match["side"])
    return _branch(stems, reply.depth, "fork" if by_match["same"] else "side") if stems else None


def _closest(here: Context, found: Sequence[tuple[AliasMatch, Marks]]) -> list[AliasMatch]:
    """Those whose question shares most lines with this one: if a client begins every conversation with the same pages
    of instructions, any two share most of their lines."""
    shared = [len(here.lines & marks.lines) for _, marks in found]
    return [one for (one, _), lines in zip(found, shared, strict=True) if lines == max(shared)]


def _branch(stems: Sequence[AliasMatch], depth: int, how: str) -> PrefixMatch:
    if len({one.session.lineage for one in stems}) > 1:
        return PrefixMatch(None, how="ambiguous")
    return PrefixMatch(stems[0].session, forks=True, depth=depth, how=how)
