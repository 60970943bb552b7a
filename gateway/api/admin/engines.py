"""POST /admin/engines/drain: take an engine out of use without losing what its sessions have."""

from gateway.api.admin import serializers
from gateway.api.admin.models import engines, requests
from gateway.api.endpoint import Call
from gateway.api.operation import operation
from gateway.windows import drain


@operation("POST", "/admin/engines/drain")
async def drain_engine(call: Call, body: requests.DrainRequest) -> engines.Drained:
    """Move the sessions of an engine to the others, and give it no more requests; repeat it until it is empty."""
    if body.undo:
        done = await drain.undrain(call.context, body.engine)
    else:
        done = await drain.drain(call.context, call.autofreeze, body.engine)
    return engines.Drained(
        engine=done.engine,
        draining=done.draining,
        since=serializers.moment_or_null(done.since),
        moved=[engines.Moved.model_validate(one) for one in done.moved],
        failed=[engines.NotMoved.model_validate(one) for one in done.failed],
        waiting_for=engines.WaitingFor(
            requests=done.requests, sessions=done.sessions_left, seconds=done.seconds_left, in_a_turn=list(done.busy)
        ),
        empty=done.empty,
        warnings=list(done.warnings),
    )


OPERATIONS = (drain_engine,)
