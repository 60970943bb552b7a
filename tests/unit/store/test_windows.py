"""Windows, their objects, and their lineage."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from gateway.records import Manifest, PinnedObject, Session
from gateway.store.store import Store
from gateway.store.types import Released, Text, WindowQuery
from tests.support.store_records import TENANT, add, finished, manifest, says, window
from tests.support.tier_harness import key, keys, spelled

pytestmark = pytest.mark.anyio


async def test_window_is_read_as_it_was_added(store: Store) -> None:
    await store.record([finished("s", says("1", "a"))])
    s = await store.session(TENANT, "s")
    assert s is not None
    assert s.transcript is not None
    made = window(
        "w", transcript=s.transcript, frame=s.frame, description="d", tags=("b", "a", "été"), expires_at=2000.5,
        receipt={"tiers": {"disk": {"objects": 2}}, "cached_tokens": None}, title="1",
    )  # fmt: skip
    text = Text(says("1", "a"), await store.frame(s.frame or b""))
    assert await store.add_window(replace(made, transcript=b"", frame=None), manifest("w", keys(2)), text) == made
    assert await store.window(TENANT, "w") == made
    assert await store.manifest(made) == manifest("w", keys(2))
    assert await store.pinned(made) == manifest("w", keys(2)).objects
    assert await store.window(TENANT, "W") is None
    assert await store.window("other", "w") is None


async def test_concurrent_windows_of_one_name_leave_one_manifest(store: Store) -> None:
    made = [window("w", manifest=f"m-{n}", description=str(n)) for n in range(8)]
    added = await asyncio.gather(
        *(
            store.add_window(one, replace(manifest("x", [key(n)]), id=one.manifest), Text(says(str(n))))
            for n, one in enumerate(made)
        )
    )
    ((winner, committed),) = [(n, one) for n, one in enumerate(added) if one is not None]
    assert await store.window(TENANT, "w") == committed
    assert await store.text(committed) == Text(says(str(winner)))
    assert await store.held_objects() == {key(winner)}
    await add(store, "w", tenant="other")


async def test_lists_filter_sort_and_page(store: Store) -> None:
    await add(store, "b", created_at=1.0, token_count=30, size_bytes=5, tags=("x",), model="m1")
    await add(store, "a", created_at=2.0, token_count=20, size_bytes=9, tags=("x", "y"), session_id="other")
    await add(store, "d", created_at=3.0, token_count=10, size_bytes=7, tags=("y", "été"))
    await add(store, "c", created_at=3.0, token_count=10, size_bytes=7)
    await add(store, "x", tenant="other", manifest="m-other")

    async def names(**query: Any) -> list[str]:
        page, total = await store.list_windows(TENANT, WindowQuery(**query))
        assert total == len(page)
        return [one.name for one in page]

    assert await names() == ["c", "d", "a", "b"]  # newest first, names where that does not tell
    assert await names(sort_by="name", descending=False) == ["a", "b", "c", "d"]
    assert await names(sort_by="name") == ["d", "c", "b", "a"]
    assert await names(sort_by="token_count") == ["b", "a", "c", "d"]
    assert await names(sort_by="size") == ["a", "c", "d", "b"]
    assert await names(sort_by="size", descending=False) == ["b", "d", "c", "a"]  # the same the other way round
    assert await names(tags=("x",)) == ["a", "b"]
    assert await names(tags=("x", "y")) == ["a"]
    assert await names(tags=("été",)) == ["d"]
    assert await names(tags=("x", "z")) == await names(tags=("X",)) == []
    assert (await names(model="m1"), await names(session_id="other")) == (["b"], ["a"])
    assert await names(created_after=1.0, created_before=3.0) == ["a"]  # both ends are outside
    page, total = await store.list_windows(TENANT, WindowQuery(limit=3, offset=2, sort_by="name", descending=False))
    assert ([one.name for one in page], total) == (["c", "d"], 4)


async def test_search_takes_every_character_as_itself(store: Store) -> None:
    await add(store, "plain", description="nothing")
    await add(store, "odd", description="100%_done \\ \"quoted\" 'single' [a-z]* é")
    await add(store, "percent", description="100 done")

    async def names(text: str) -> set[str]:
        return {one.name for one in (await store.list_windows(TENANT, WindowQuery(search=text)))[0]}

    for text in ("%", "_", "%_", "0%_d", "\\", '"', '"quoted"', "'single'", "' OR '1'='1", "[a-z]*", "é", "ODD"):
        assert await names(text) == (set() if " OR " in text else {"odd"}), text
    assert await names("") == {"plain", "odd", "percent"}
    assert await names("DONE") == {"odd", "percent"}
    assert await names("thing") == await names("pLaIn") == {"plain"}


async def test_a_manifest_keeps_order_ranks_and_tiers_apart(store: Store) -> None:
    held = [key(n, rank=rank) for n in (3, 1, 2) for rank in (0x02000200, 0x02010200)]
    wanted = manifest("w", held, tiers=("disk", "redis"))
    assert await store.add_window(window("w", world_size=2, chunk_count=3), wanted, Text(says("1")))
    assert await store.manifest(window("w")) == wanted
    sizes = await store.sizes(window("w"))
    assert sizes == {tier: dict.fromkeys(spelled(*held), 50) for tier in ("disk", "redis")}
    assert await store.held_objects() == set(held)
    assert await store.tier_usage() == {"disk": (6, 300), "redis": (6, 300)}
    found = await store.objects([held[0], key(99)])
    assert sorted(o.tier for o in found) == ["disk", "redis"]
    assert {o.key for o in found} == {str(held[0])}


async def test_thousands_of_objects_are_looked_up_at_once(store: Store) -> None:
    await add(store, "w", keys(1700))
    assert len(await store.objects(keys(3000))) == 1700
    assert await store.objects([]) == []
    gone = await store.delete_window(TENANT, "w")
    assert gone is not None
    assert (len(gone.pins), gone.names) == (1700, ())


async def test_deletion_releases_only_objects_no_other_window_holds(store: Store) -> None:
    await add(store, "a", keys(3))
    b = await add(store, "b", keys(5))
    await add(store, "other", [key(4)], tenant="other", manifest="m-other")
    assert await store.copy_window(replace(b, name="clone", parent="b"), b, None)
    assert await store.delete_window(TENANT, "b") == Released()  # its clone holds everything
    assert await store.delete_window(TENANT, "b") is None
    assert await store.delete_window(TENANT, "clone") == Released((key(3),))
    assert await store.held_objects() == {*keys(3), key(4)}
    assert await store.delete_window(TENANT, "a") == Released(tuple(keys(3)))
    assert await store.delete_window("other", "other") == Released((key(4),))
    assert await store.held_objects() == set()
    assert await store.tier_usage() == {}


async def test_isolated_clone_shares_its_sources_pins(store: Store) -> None:
    w = await add(store, "w", keys(2))
    apart = replace(w, name="apart", salt="other")
    assert await store.copy_window(apart, w, None)
    assert await store.copy_window(replace(apart, name="copy"), w, None)
    names = [key(number, salt="other") for number in range(2)]
    assert await store.pinned(apart) == tuple(
        one._replace(key=str(name), pin=one.key)
        for one, name in zip(manifest("w", keys(2)).objects, names, strict=True)
    )
    assert await store.sizes(apart) == {"disk": dict.fromkeys(spelled(*names), 50)}
    assert list((await store.manifest(apart)).token_ids) == [1, 2, 2**32 - 1]
    assert await store.held_objects() == await store.held_under("salt") == set(keys(2))
    assert await store.isolated_names() == await store.held_under("other") == set(names)
    assert await store.held_under("nobody") == set()
    assert await store.delete_window(TENANT, "copy") == Released()  # another window is found under its salt
    assert await store.delete_window(TENANT, "w") == Released()
    assert await store.delete_window(TENANT, "apart") == Released(tuple(keys(2)), tuple(names))
    assert {one.salt for one in await store.orphaned_salts()} == {"salt", "other"}
    assert await store.isolated_names() == await store.held_objects() == set()


async def test_concurrent_deletions_release_each_object_once(store: Store) -> None:
    for n in range(10):
        await add(store, f"w{n}", [key(n), key(n + 1)])
    gone = await asyncio.gather(*(store.delete_window(TENANT, f"w{n % 10}") for n in range(20)))
    assert [g for g in gone if g is None] == [None] * 10
    given = [one for g in gone if g is not None for one in g.pins]
    assert sorted(map(str, given)) == sorted(map(str, keys(11)))


async def test_recomputed_object_has_its_new_checksum_in_every_window(store: Store) -> None:
    await add(store, "a", [key(1)])
    again = PinnedObject(str(key(1)), "disk", 60, b"new")
    assert await store.add_window(window("b"), Manifest("m-b", (1,), (again,)), Text(says("1")))
    assert await store.objects([key(1)]) == [again]
    assert (await store.manifest(window("a"))).objects == (again,)


async def test_description_and_tags_of_a_window_can_be_changed(store: Store) -> None:
    before = await add(store, "w", tags=("a", "b"), description="d", expires_at=5.0)
    after = await store.describe_window(TENANT, "w", {"tags": ("b", "c")})
    assert after == replace(before, tags=("b", "c")) == await store.window(TENANT, "w")
    for tag, names in (("a", []), ("b", ["w"]), ("c", ["w"])):
        assert [w.name for w in (await store.list_windows(TENANT, WindowQuery(tags=(tag,))))[0]] == names
    cleared = await store.describe_window(TENANT, "w", {"tags": (), "description": "", "expires_at": None})
    assert cleared == replace(before, tags=(), description="", expires_at=None)
    assert await store.describe_window("another", "w", {"description": "x"}) is None
    assert await store.window(TENANT, "w") == cleared


async def test_lineage_goes_up_to_the_root_and_down_to_the_clones(store: Store) -> None:
    await add(store, "root")
    for name, parent in (("a", "root"), ("b", "root"), ("aa", "a"), ("aaa", "aa")):
        await add(store, name, parent=parent)
    await add(store, "a2", tenant="other", manifest="m-other", parent="root")
    assert await store.lineage(TENANT, "root") == ([], ["a", "b"])
    assert await store.lineage(TENANT, "aaa") == (["aa", "a", "root"], [])
    assert await store.lineage(TENANT, "a") == (["root"], ["aa"])
    assert await store.lineage(TENANT, "nobody") == ([], [])


async def test_new_window_of_a_deleted_name_is_no_parent(store: Store) -> None:
    await add(store, "w", description="old", tags=("old",))
    await add(store, "child", parent="w")
    await store.add_sessions([Session(TENANT, "t", "s", state="thawed", window="w")])
    await store.delete_window(TENANT, "w")
    await add(store, "w")
    assert await store.lineage(TENANT, "w") == ([], [])
    assert await store.lineage(TENANT, "child") == ([], [])
    fresh = await store.window(TENANT, "w")
    assert fresh is not None
    assert (fresh.description, fresh.tags) == ("", ())
    session = await store.session(TENANT, "t")
    assert session is not None
    assert session.window is None
    assert (await store.list_windows(TENANT, WindowQuery(tags=("old",))))[1] == 0


async def test_parent_deleted_during_the_freeze_is_not_recorded(store: Store) -> None:
    await add(store, "w", parent="w")
    await add(store, "child", parent="gone")
    assert await store.lineage(TENANT, "w") == ([], [])
    assert await store.lineage(TENANT, "child") == ([], [])
