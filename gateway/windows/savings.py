"""Book what a thaw or an ask has saved: its own request to the engine, which is not a turn."""

import logging
import time

from gateway.engines.client import Model
from gateway.records import Usage, Window
from gateway.store.types import Booking, Saved, Source, StoreUnavailable
from gateway.windows.context import Services

log = logging.getLogger(__name__)


async def book(
    services: Services, source: Source, window: Window, model: Model, usage: Usage, *, session_id: str = "",
    first_token_s: float = 0.0, at: str = "",
) -> Saved | None:  # fmt: skip
    """Book a request under a window's lineage, sent to the engine with the URL `at` if that answers; return what it
    saved, None if the engine does not say what it found.

    What it was for has succeeded, so a store that cannot be written is logged.
    """
    engines = services.engines.choose(window.lineage, at, model.id)
    if usage.cached is None or not engines:
        return None
    booking = Booking(
        window.tenant, source, engines[0].url, model.fingerprint, model.id, usage.prompt, usage.cached, time.time(),
        session_id=session_id, window=window.name, first_token_s=first_token_s,
    )  # fmt: skip
    try:
        return await services.store.book(booking)
    except StoreUnavailable as error:
        log.warning("what a request of window %s saved was not booked: %s", window.name, error.message)
        return None
