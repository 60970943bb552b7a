"""What must hold after each round of `tests.support.operations_model`, while no request is in flight."""

import asyncio
import time

from tests.support.operations_world import GONE, Broken, Said, World, said
from tests.support.postgres import column_of_store

_QUIET_S = 20.0
_KEYS_OF_WINDOWS = """SELECT o.key FROM windows w JOIN manifest_objects m ON m.manifest = w.manifest
    JOIN objects o ON o.number = m.object"""


async def check(world: World, *, thoroughly: bool) -> None:
    """Check everything while no request is in flight."""
    there = await _windows_there(world)
    for name in there:
        text = await _text_of(world, name)
        before = world.windows.get(name) if not world.deleted[name] else None
        if before is not None and before != text:
            raise Broken(f"window {name} had {before}, and has {text}")
        if not world.explained(text):
            raise Broken(f"window {name} has a text that no session had: {text}")
        world.windows[name] = text
        verdict = await world.must("POST", f"/admin/windows/{name}/verify")
        if not verdict.json()["ok"]:
            raise Broken(f"verify of {name}: {verdict.text}")
    if thoroughly and there:
        await _same_everywhere(world, world.random.choice(sorted(there)))
    await _nothing_else_is_pinned(world)
    await _turns_are_recorded_once(world)
    for cut in [one for one in world.uncertain if one.startswith("cut ") and not world.deleted[one[4:]]]:
        raise Broken(f"an export of a window that was not deleted was {cut}")
    world.uncertain.clear()
    world.created.clear()
    world.deleted.clear()


async def _windows_there(world: World) -> set[str]:
    """The windows that there are: those that there were, with what was made and without what was deleted.

    A window is made only where none of its name is there, and deleted only where one is, so in whatever order that
    was, the numbers tell what is left.
    """
    listed = await world.must("GET", "/admin/windows?limit=100")
    there = {one["name"] for one in listed.json()["windows"]}
    for name in {*there, *world.windows, *world.created}:
        expected = (name in world.windows) + world.created[name] - world.deleted[name]
        if expected != (name in there):
            made = f"was there {name in world.windows}, made {world.created[name]}, deleted {world.deleted[name]}"
            raise Broken(f"window {name}: {made}, there now: {name in there}")
    for name in set(world.windows) - there:
        del world.windows[name]
    return there


async def _text_of(world: World, name: str) -> Said:
    found = await world.must("GET", f"/admin/windows/{name}/messages")
    return said(found.json()["messages"])


async def _same_everywhere(world: World, name: str) -> None:
    """A thaw, and an export with an import, give what the window has."""
    status = await world.must("GET", f"/admin/windows/{name}")
    thawed = await world.must("POST", f"/admin/windows/{name}/thaw", json={"new_session_id": "t", "warm": "cpu"})
    frozen = await world.must("POST", "/admin/windows", json={"session_id": "t", "window_name": "of-t"})
    exported = await world.must("GET", f"/admin/windows/{name}/export")
    imported = await world.must("POST", "/admin/windows/import?window_name=of-file", content=exported.content)
    tokens = {one.json()["token_count"] for one in (status, thawed, frozen, imported)}
    receipt = thawed.json()["receipt"]
    texts = {await _text_of(world, one) for one in (name, "of-t", "of-file")}
    verdict = await world.must("POST", "/admin/windows/of-file/verify")
    chunks = status.json()["kv_cache"]["block_count"]
    if len(tokens) != 1 or len(texts) != 1 or not verdict.json()["ok"] or receipt["chunks_found"] != chunks:
        raise Broken(f"{name}: {tokens} tokens, texts {texts}, of {chunks} chunks {receipt}, import {verdict.text}")
    await _goes_back(world, name)
    for window in ("of-t", "of-file"):
        await world.must("DELETE", f"/admin/windows/{window}")
    await world.ask("DELETE", "/admin/sessions/t", GONE if world.forgets else set())


async def _goes_back(world: World, name: str) -> None:
    """The session `t`, which has what the window `name` has, is taken back to each of its turns."""
    whole = await _text_of(world, name)
    last = len(whole) // 2
    for turn in range(last, 0, -1):
        asked = {"into_session": "t", "at_turn": turn}
        done = (await world.must("POST", f"/admin/windows/{name}/thaw", json=asked)).json()
        await world.must("POST", "/admin/windows", json={"session_id": "t", "window_name": "of-turn"})
        text, dropped = await _text_of(world, "of-turn"), done["replaced"]["turns_dropped"]
        verdict = await world.must("POST", "/admin/windows/of-turn/verify")
        if text != whole[: 2 * turn] or dropped != (turn < last) or not verdict.json()["ok"]:
            raise Broken(f"{name} at turn {turn}: {text}, {done}, {verdict.text}")
        await world.must("DELETE", "/admin/windows/of-turn")


async def _nothing_else_is_pinned(world: World) -> None:
    (folder,) = (world.kv.parent / "kv-pins").iterdir()
    pinned = {path.name for path in folder.iterdir()}
    held = {_file_name(key) for key in await column_of_store(world.data_dir, "SELECT key FROM objects")}
    of_windows = {_file_name(key) for key in await column_of_store(world.data_dir, _KEYS_OF_WINDOWS)}
    if pinned != held or held != of_windows:
        raise Broken(f"pinned {len(pinned)}, known {len(held)}, of windows {len(of_windows)}: {pinned ^ of_windows}")


def _file_name(key: str) -> str:
    model, rank, group, digest, salt = key.rsplit("@", 4)
    return f"{model.replace('/', '-SEP-')}@0x{rank}@{group}@{digest}@{salt}.data"


async def _turns_are_recorded_once(world: World) -> None:
    for session in sorted(world.turns):
        found = await world.ask("GET", f"/admin/sessions/{session}", GONE)
        count = found.json()["turn_count"] if found is not None else 0
        certain = session not in world.uncertain and not world.forgets
        if certain and session.startswith("s") and "-" not in session and count != world.turns[session]:
            raise Broken(f"session {session} has {count} turns, and had {world.turns[session]}")
        world.turns[session] = count
        if not count:
            del world.turns[session]


async def clean_up(world: World) -> None:
    """Delete everything: nothing is left, in the tier or pinned."""
    for name in sorted(world.windows):
        await world.must("DELETE", f"/admin/windows/{name}")
    listed = await world.must("GET", "/admin/sessions?limit=100")
    for session in listed.json()["sessions"]:
        await world.ask("DELETE", f"/admin/sessions/{session['id']}", GONE)
    end = time.monotonic() + _QUIET_S
    while left := [path.name for path in world.kv.iterdir()]:
        if time.monotonic() > end:
            raise Broken(f"{len(left)} objects are left of nothing: {left[:3]}")
        await asyncio.sleep(0.1)  # the next sweep
    (folder,) = (world.kv.parent / "kv-pins").iterdir()
    if list(folder.iterdir()):
        raise Broken("there are pins of nothing")
