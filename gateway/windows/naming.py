"""Freeze under the first generated name that is free."""

from dataclasses import replace

from gateway.errors import GatewayError
from gateway.records import Window
from gateway.windows.context import Services
from gateway.windows.freeze import Naming, freeze

_TRIED = 100  # sessions may share a shortened name within a second


async def freeze_automatically(
    services: Services, tenant: str, session_id: str, naming: Naming
) -> tuple[Window, list[str]]:
    """Freeze a session under `naming.name`, or that name with a number behind it.

    Nobody asked for this window: it is not made of a session that is deleted meanwhile. Raises what `freeze` raises.
    """
    for number in range(1, _TRIED + 1):
        tried = naming if number == 1 else replace(naming, name=f"{naming.name}-{number}")
        try:
            return await freeze(services, tenant, session_id, tried, wanted=False)
        except GatewayError as error:
            if error.code != "window_already_exists":
                raise
    raise GatewayError("window_already_exists", f"{naming.name} and {_TRIED - 1} names like it are taken")
