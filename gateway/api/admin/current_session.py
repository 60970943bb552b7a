"""GET /admin/current-session: which session the caller is in, by the id that its client sends in a header."""

from itertools import pairwise
from operator import attrgetter

from gateway.api.admin import serializers
from gateway.api.admin.models import responses
from gateway.api.endpoint import Call
from gateway.api.operation import operation
from gateway.records import Session, subconversation_stem
from gateway.sessions.client_ids import read_client_session_id
from gateway.store.store import Store
from gateway.windows.retention import orphans

_MOST = 20


@operation("GET", "/admin/current-session", errors=("invalid_session_id",))
async def current_session(call: Call) -> responses.CurrentSession:
    """Which session the caller is in, by the headers in which clients name their sessions. It is never guessed."""
    client_id = read_client_session_id(call.headers, {}, None)
    if client_id is None:
        return responses.CurrentSession(session_id=None, recognised_by=None, sessions=[])
    await call.services.recorder.flush()
    # A client that names itself, not the conversation, may have several under one id.
    stem = subconversation_stem(client_id.id) if client_id.kind == "agent" else ""
    store = call.services.store
    named = await store.sessions_beside(call.tenant, client_id.id, stem, _MOST)
    ways_on = {one.id: one for name in named for one in await _ways_on(store, name)}
    found = sorted(ways_on.values(), key=attrgetter("last_active_at"), reverse=True)
    expired_by = orphans.expired_by(call.services.settings)
    return responses.CurrentSession(
        session_id=None if len(found) > 1 else found[0].id if found else client_id.id,
        recognised_by=client_id.source,
        sessions=[responses.SessionLine(**serializers.session_fields(one, expired_by)) for one in found],
    )


async def _ways_on(store: Store, session: Session) -> list[Session]:
    """Where the turns of a session go: to its last successor, and wherever an edited history has continued since."""
    chain = [session]
    while chain[-1].successor and (after := await store.session(session.tenant, chain[-1].successor)):
        chain.append(after)
    continued = [one for one, after in pairwise(chain) if one.last_active_at > after.created_at]
    return [chain[-1], *continued]
