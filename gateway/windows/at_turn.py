"""A window as it was at an earlier turn: the beginning of its text, and the KV of that.

It is not stored. It has the window's name and lineage, so what is made from it is made from that window. Its token ids
are counted by the engine, as a freeze at that turn would have counted them. Of its chunks the window holds those that
both begin with: usually all, fewer where the template renders an earlier turn differently once others follow.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from gateway.dialects import text_transcripts
from gateway.dialects.turns import Turns
from gateway.engines.client import Model
from gateway.errors import GatewayError
from gateway.records import Manifest, Message, Window
from gateway.windows.context import OperationContext, Services
from gateway.windows.ensure_stored import with_receipt
from gateway.windows.next_turn import next_turn_ids
from gateway.windows.restore import leading

MAX_TURN = 1_000_000


class Held(NamedTuple):
    """A window, perhaps at an earlier turn, and its manifest then."""

    window: Window
    manifest: Manifest


async def held_at(ctx: OperationContext, window: Window, model: Model, at_turn: int | None) -> Held:
    """Return a window at a turn, counted by `model`, and its manifest; all of it without a turn.

    Raises `invalid_request` if it has no such turn, `window_not_found` if it has been deleted since it was read,
    `window_corrupted`, `engine_unreachable`, `engine_timeout`.
    """
    store = ctx.services.store
    early = await text_at(ctx.services, window, at_turn)
    manifest = await store.manifest(window)
    if early.transcript == window.transcript:
        return Held(window, manifest)
    text = await store.text(early)
    engine = ctx.services.engines.for_lineage(window.lineage)
    with ctx.services.traces.step("render"):
        ids = await next_turn_ids(engine, model.id, text.frame or {}, text.messages)
    chunks = _common_chunks(window, manifest.token_ids, ids)
    objects = leading(manifest.objects, chunks * window.world_size)
    early = with_receipt(replace(early, token_count=len(ids)), chunks, objects, ctx.duration_ms(), {"at_turn": at_turn})
    return Held(early, Manifest(manifest.id, ids, objects))


async def text_at(services: Services, window: Window, at_turn: int | None) -> Window:
    """Return a window with its text of a turn; its tokens and KV are still those of the whole. Raises as `held_at`."""
    if at_turn is None:
        return window
    messages = (await services.store.text(window)).messages
    end = end_of_turn(window.name, messages, at_turn)
    if end == len(messages):
        return window
    return replace(window, transcript=await services.store.transcript_until(window, end))


def end_of_turn(name: str, messages: Sequence[Message], at_turn: int) -> int:
    """How many messages a window has up to the end of a turn. Raises `invalid_request`, naming the turns there are."""
    turns = Turns.of(messages)
    if at_turn <= len(turns.ends):
        return turns.ends[at_turn - 1]
    count = len(turns.ends)
    if kind := text_transcripts.kind(messages):
        problem = f"window {name!r} holds {text_transcripts.NAMES[kind]}, which has no turns"
    elif turns.open and at_turn == count + 1:
        problem = f"turn {at_turn} of window {name!r} is not finished: it has no reply, or a tool call without one"
    else:
        problem = f"window {name!r} has {_counted(count)}, so there is no turn {at_turn}"
    hint = f"`at_turn` is 1 to {count}, or omit it for all of the window" if count else "omit `at_turn`"
    details = {"field": "at_turn", "window_name": name, "turns": count}
    raise GatewayError("invalid_request", problem, hint=hint, details=details)


def _common_chunks(window: Window, all_ids: Sequence[int], ids: Sequence[int]) -> int:
    """How many of a window's chunks these token ids begin with."""
    if not window.chunk_count:
        return 0
    shared = text_transcripts.shared(list(all_ids), list(ids))
    return min(window.chunk_count, shared // window.chunk_size)


def _counted(count: int) -> str:
    return f"{count} turn" if count == 1 else f"{count} turns"
