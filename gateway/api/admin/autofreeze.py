"""The admin API's operations for automatic freezing: read, set, reset and check the rules."""

from typing import Any

from gateway.api.admin import serializers
from gateway.api.admin.models import freezing, requests
from gateway.api.endpoint import Call
from gateway.api.operation import operation
from gateway.sessions.resolver import session_not_found
from gateway.windows.autofreeze import rules
from policies.loader import BUILT_IN


@operation("GET", "/admin/policies")
async def get_policies(call: Call) -> freezing.Policies:
    """The rules of automatic freezing."""
    return freezing.Policies(**await _rules(call))


@operation("PUT", "/admin/policies")
async def put_policies(call: Call, body: requests.PolicyChanges) -> freezing.PoliciesSet:
    """Set the rules that are sent, and leave the others."""
    warnings = await call.autofreeze.change(body.given())
    return freezing.PoliciesSet(**await _rules(call), warnings=warnings)


@operation("DELETE", "/admin/policies")
async def delete_policies(call: Call) -> freezing.Policies:
    """Remove every rule that was set here: the settings apply again."""
    await call.autofreeze.reset()
    return freezing.Policies(**await _rules(call))


@operation("POST", "/admin/policies/check", errors=("session_not_found",))
async def check_policies(call: Call, body: requests.PolicyCheckRequest) -> freezing.PolicyCheck:
    """Evaluate the policies for a session now; nothing is frozen."""
    check = await call.autofreeze.preview(call.tenant, body.session_id)
    if check is None:
        raise session_not_found(body.session_id)
    session, decision = check.observation, next((one.decision for one in check.opinions if one.decision), None)
    limit = session.context_limit
    return freezing.PolicyCheck(
        session_id=body.session_id,
        triggered=decision is not None and not check.held_back,
        reason=decision.reason if decision else None,
        held_back=check.held_back or None,
        window_name=check.window_name,
        token_count=session.token_count,
        covered_tokens=session.covered_tokens,
        context_limit=limit,
        threshold_percent=round(session.token_count / limit * 100, 1) if limit else None,
        idle_seconds=round(session.idle_s, 1),
        estimates=serializers.estimates(call.services.estimator.report().get(session.model)),
        policies=[
            freezing.Opinion(
                policy=one.policy, reason=one.decision.reason if one.decision else None, error=one.error or None
            )
            for one in check.opinions
        ],
    )


async def _rules(call: Call) -> dict[str, Any]:
    current, at_run_time = await call.autofreeze.current()
    available = [*BUILT_IN, *call.services.settings.auto_freeze_policies]
    return {**rules.as_json(current), "set_at_run_time": sorted(at_run_time), "available": available}


OPERATIONS = (get_policies, put_policies, delete_policies, check_policies)
