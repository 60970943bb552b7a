"""The admin API's operations for automatic freezing: read, set, reset and check the rules."""

from typing import Any

from gateway.api.admin import models, serializers
from gateway.api.admin.models import requests
from gateway.api.endpoint import Call
from gateway.api.operation import operation
from gateway.sessions.resolver import session_not_found
from gateway.windows.autofreeze import rules
from policies.loader import BUILT_IN


@operation("GET", "/admin/policies")
async def get_policies(call: Call) -> models.Policies:
    """The rules of automatic freezing."""
    return models.Policies(**await _shown(call))


@operation("PUT", "/admin/policies")
async def put_policies(call: Call, body: requests.PolicyChanges) -> models.PoliciesSet:
    """Set the rules that are given, leave the others."""
    warnings = await call.autofreeze.change(body.given())
    return models.PoliciesSet(**await _shown(call), warnings=warnings)


@operation("DELETE", "/admin/policies")
async def delete_policies(call: Call) -> models.Policies:
    """Forget what was set here: the settings hold again."""
    await call.autofreeze.reset()
    return models.Policies(**await _shown(call))


@operation("POST", "/admin/policies/check", errors=("session_not_found",))
async def check_policies(call: Call, body: requests.PolicyCheckRequest) -> models.PolicyCheck:
    """Tell what the policies say of a session now; nothing is frozen."""
    session_id = body.session_id
    check = await call.autofreeze.check(call.tenant, session_id)
    if check is None:
        raise session_not_found(session_id)
    seen, decided = check.seen, next((one.decision for one in check.opinions if one.decision), None)
    used = round(seen.token_count / seen.context_limit * 100, 1) if seen.context_limit else None
    return models.PolicyCheck(
        session_id=session_id,
        triggered=decided is not None and not check.held_back,
        reason=decided.reason if decided else None,
        held_back=check.held_back or None,
        window_name=check.window_name,
        token_count=seen.token_count,
        covered_tokens=seen.covered_tokens,
        context_limit=seen.context_limit,
        threshold_percent=used,
        idle_seconds=round(seen.idle_s, 1),
        estimates=serializers.estimates(call.services.estimator.report().get(seen.model)),
        policies=[
            models.Opinion(
                policy=one.policy, reason=one.decision.reason if one.decision else None, error=one.error or None
            )
            for one in check.opinions
        ],
    )


async def _shown(call: Call) -> dict[str, Any]:
    now, at_run_time = await call.autofreeze.current()
    known = [*BUILT_IN, *call.services.settings.auto_freeze_policies]
    return {**rules.as_json(now), "set_at_run_time": sorted(at_run_time), "available": known}


OPERATIONS = (get_policies, put_policies, delete_policies, check_policies)
