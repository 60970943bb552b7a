"""Windows that an older version left without their text: none are added today, but theirs cannot be restored."""

from gateway.windows.context import Services

_NAMED = 5
REMEDY = (
    "import an export of each, or freeze its session again, under another name; then delete it. "
    "Its KV and token ids are still there, but nothing can begin with it"
)


async def textless(services: Services) -> str:
    """Say which windows have no text; empty where all have theirs."""
    found = [name for _, name in await services.store.windows_without_text()]
    if not found:
        return ""
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{len(found)} windows have lost their text to an older version: {', '.join(found[:_NAMED])}{more}"
