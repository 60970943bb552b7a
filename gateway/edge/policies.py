"""The admin door to automatic freezing: its rules, and what they say of a session."""

from typing import Any

from gateway import rules
from gateway.edge.endpoint import Call
from gateway.errors import GatewayError
from gateway.records import check_session_id
from policies.door import BUILT_IN


async def get_policies(call: Call) -> tuple[int, Any]:
    """GET /admin/policies."""
    call.query({})
    return 200, await _shown(call)


async def put_policies(call: Call) -> tuple[int, Any]:
    """PUT /admin/policies: set the fields that are given, leave the others."""
    given = await call.body(dict(rules.READERS), nulls=True)
    warnings = await call.autofreeze.change(given)
    return 200, {**await _shown(call), "warnings": warnings}


async def delete_policies(call: Call) -> tuple[int, Any]:
    """DELETE /admin/policies: back to the settings."""
    call.query({})
    await call.autofreeze.reset()
    return 200, await _shown(call)


async def check_policies(call: Call) -> tuple[int, Any]:
    """POST /admin/policies/check: what the policies say of a session now. Nothing is frozen."""
    body = await call.body({"session_id": lambda name, value: check_session_id(value, name)}, required=("session_id",))
    session_id = body["session_id"]
    check = await call.autofreeze.check(call.tenant, session_id)
    if check is None:
        raise GatewayError(
            "session_not_found", f"there is no session {session_id!r}", hint="GET /admin/sessions lists them"
        )
    seen, decided = check.seen, next((one.decision for one in check.opinions if one.decision), None)
    used = round(seen.token_count / seen.context_limit * 100, 1) if seen.context_limit else None
    return 200, {
        "session_id": session_id,
        "triggered": decided is not None and not check.held_back,
        "reason": decided.reason if decided else None,
        "held_back": check.held_back or None,
        "window_name": check.window_name,
        "token_count": seen.token_count,
        "covered_tokens": seen.covered_tokens,
        "context_limit": seen.context_limit,
        "threshold_percent": used,
        "idle_seconds": round(seen.idle_s, 1),
        "estimates": call.parts.estimator.report().get(seen.model),
        "policies": [
            {"policy": one.policy, "reason": one.decision.reason if one.decision else None, "error": one.error or None}
            for one in check.opinions
        ],
    }


async def _shown(call: Call) -> dict[str, Any]:
    now, at_run_time = await call.autofreeze.current()
    known = [*BUILT_IN, *call.parts.settings.auto_freeze_policies]
    return {**rules.as_json(now), "set_at_run_time": sorted(at_run_time), "available": known}
