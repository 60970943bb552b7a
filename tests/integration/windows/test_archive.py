"""Windows as files: the round trip through both tiers, and every file that is not as it must be."""

import asyncio
import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from blake3 import blake3

from gateway.api.admin import serializers
from gateway.app import open_services
from gateway.errors import GatewayError
from gateway.kv.keys import object_keys
from gateway.windows.archive import file_format, manifest
from gateway.windows.archive.export import export, pack
from gateway.windows.archive.import_ import import_window
from gateway.windows.archive.spool import Spool
from gateway.windows.context import Services
from gateway.windows.delete import delete
from gateway.windows.thaw import thaw
from tests.support.fakes.engine import MODEL, FakeEngine
from tests.support.gateway_process import ROOT, Gateway, environment, gateway_in_front_of
from tests.support.harness import CHUNK, CHUNKS, FRAME, IDS, MESSAGES, GatewayHarness, value, window

pytestmark = pytest.mark.anyio


async def file_of(services: Services, name: str = "w") -> bytes:
    """The whole file of a window."""
    done = await export(services, "default", name)
    data = b"".join([piece async for piece in done.pieces])
    assert len(data) == done.size
    return data


async def stream(data: bytes, step: int = 777) -> AsyncIterator[bytes]:
    """A file as a network brings it."""
    for start in range(0, len(data), step):
        yield data[start : start + step]


async def refused(
    harness: GatewayHarness, data: bytes, *codes: str, name: str | None = "x", as_text: bool = False
) -> str:
    """The import fails with one of `codes`, and nothing is there that was not there before."""
    before = harness.everything()
    with pytest.raises(GatewayError) as caught:
        await import_window(harness.services, "default", stream(data, 50_000), name=name, as_text=as_text)
    assert caught.value.code in codes, caught.value.message
    assert harness.everything() == before
    assert await harness.services.store.window("default", name or "w") is None or name is None
    return caught.value.message


# --- the round trip


async def test_an_imported_window_is_what_was_exported_under_a_salt_of_its_own(harness: GatewayHarness) -> None:
    original = await window(harness.services)
    data = await file_of(harness.services)
    imported, warnings = await import_window(harness.services, "default", stream(data), name="again")
    assert warnings == []
    assert (imported.kv, imported.chunk_count, imported.token_count) == ("complete", CHUNKS, len(IDS))
    assert (imported.description, imported.tags, imported.model) == ("d", ("a",), MODEL)
    assert imported.salt != original.salt
    assert imported.lineage != original.lineage
    kept = await harness.services.store.window("default", "again")
    assert kept is not None
    assert await harness.services.store.messages(kept.transcript) == MESSAGES
    assert await harness.services.store.frame(kept.frame or b"") == FRAME
    manifest = await harness.services.store.manifest(kept)
    assert manifest.token_ids == IDS
    assert len(manifest.objects) == 2 * CHUNKS
    for index, key in enumerate(object_keys(kept.model_root, IDS, CHUNK, 1, kept.salt)):
        assert (harness.kv / key.file_name).read_bytes() == value(index)
        assert (harness.kv / key.file_name).stat().st_nlink == 2  # and pinned
        assert harness.redis.live(key) == value(index)
    _, _, receipt = await thaw(harness.services, "default", "again", new_session_id=None, warm="none")
    assert (receipt.chunks_found, receipt.chunks_relinked, receipt.partial) == (CHUNKS, 0, False)


async def test_a_window_comes_back_after_it_and_all_its_objects_were_deleted(harness: GatewayHarness) -> None:
    empty = harness.everything()
    await window(harness.services)
    data = await file_of(harness.services)
    await delete(harness.services, "default", "w")
    assert harness.everything() == empty
    imported, _ = await import_window(harness.services, "default", stream(data))
    assert (imported.name, imported.kv) == ("w", "complete")
    assert imported.receipt["imported"]["name"] == "w"
    again = await file_of(harness.services)
    await delete(harness.services, "default", "w")
    assert harness.everything() == empty
    assert len(again) != 0


async def test_a_standard_tar_reads_the_file(harness: GatewayHarness, tmp_path: Path) -> None:
    await window(harness.services)
    (tmp_path / "w.cwg").write_bytes(await file_of(harness.services))
    names = await asyncio.to_thread(subprocess.check_output, ["tar", "tf", str(tmp_path / "w.cwg")], text=True)
    objects = [file_format.object_name(index) for index in range(CHUNKS)]
    assert names.split() == [file_format.MANIFEST, *file_format.TEXTS, *objects, file_format.CHECKSUM]


async def test_an_object_that_one_tier_lost_comes_from_the_other_and_one_lost_in_both_is_told(
    harness: GatewayHarness,
) -> None:
    original = await window(harness.services)
    whole = await file_of(harness.services)
    key = object_keys(original.model_root, IDS, CHUNK, 1, original.salt)[1]
    pin = next((harness.kv.parent / "kv-pins").rglob(key.file_name))
    pin.write_bytes(b"damaged")
    assert await file_of(harness.services) == whole
    harness.redis.client.flushall()
    with pytest.raises(GatewayError, match="1 of") as caught:
        await file_of(harness.services)
    assert caught.value.code == "window_corrupted"
    text = await export(harness.services, "default", "w", as_text=True)
    data = b"".join([piece async for piece in text.pieces])
    imported, _ = await import_window(harness.services, "default", stream(data), name="text")
    assert (imported.kv, imported.chunk_count) == ("absent", 0)


async def test_a_taken_name_is_refused(harness: GatewayHarness) -> None:
    await window(harness.services)
    await refused(harness, await file_of(harness.services), "window_already_exists", name=None)


# --- files that are not as they must be


async def test_a_file_cut_anywhere_leaves_nothing(harness: GatewayHarness) -> None:
    await window(harness.services)
    data = await file_of(harness.services)
    for part in range(50):
        await refused(harness, data[: len(data) * part // 50], "window_corrupted")
    await refused(harness, data[:-1], "window_corrupted")
    assert "after the end" in await refused(harness, data + b"\0", "window_corrupted")


async def test_a_flipped_bit_anywhere_leaves_nothing(harness: GatewayHarness) -> None:
    await window(harness.services)
    data = await file_of(harness.services)
    # A bit of every block: headers, members, what fills them up, and the end.
    for at in range(0, len(data), file_format.BLOCK):
        harmed = bytearray(data)
        harmed[at + at // file_format.BLOCK * 101 % file_format.BLOCK] ^= 1 << at // file_format.BLOCK % 8
        await refused(harness, bytes(harmed), "window_corrupted", "invalid_request", "model_mismatch")


async def test_a_wrong_checksum_of_the_whole_leaves_nothing_though_every_member_is_as_it_was(
    harness: GatewayHarness,
) -> None:
    await window(harness.services)
    data = bytearray(await file_of(harness.services))
    at = len(data) - len(file_format.END) - file_format.BLOCK  # its first digit
    data[at] = ord("0") if data[at] != ord("0") else ord("1")
    assert "whole file" in await refused(harness, bytes(data), "window_corrupted")


Change = Callable[[dict[str, object]], object]


def rebuilt(data: bytes, change: Change) -> bytes:
    """The file with another manifest, its own checksum right."""
    size = int(data[124:135], 8)
    manifest = orjson.loads(data[file_format.BLOCK : file_format.BLOCK + size])
    change(manifest)
    rest = data[file_format.BLOCK + file_format.padded(size) : -len(file_format.END) - 2 * file_format.BLOCK]
    whole = b"".join(file_format.wrap(file_format.MANIFEST, orjson.dumps(manifest))) + rest
    return whole + _end(whole)


def _end(whole: bytes) -> bytes:
    return b"".join(file_format.wrap(file_format.CHECKSUM, blake3(whole).hexdigest().encode())) + file_format.END


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda m: m.update(version=2), "invalid_request"),
        (lambda m: m.update(format="zip"), "invalid_request"),
        (lambda m: m["window"].update(name="../../etc/passwd"), "window_corrupted"),
        (lambda m: m["window"].update(name=None), "window_corrupted"),
        (lambda m: m["window"].update(salt="0" * 32), "window_corrupted"),
        (lambda m: m["window"].update(tags=["a b"]), "window_corrupted"),
        (lambda m: m["window"].update(world_size=0), "window_corrupted"),
        (lambda m: m["window"].update(token_count=10**15), "window_corrupted"),
        (lambda m: m["window"].update(chunk_count=CHUNKS + 1), "window_corrupted"),
        (lambda m: m["window"].update(chunk_size=CHUNK * 2), "window_corrupted"),
        (lambda m: m["window"].update(fingerprint="other"), "model_mismatch"),
        (lambda m: m["window"].update(model_root="other/root"), "model_mismatch"),
        (lambda m: m["window"].update(model="other"), "model_mismatch"),
        (lambda m: m["window"].update(chunk_size=CHUNK // 2), "model_mismatch"),
        (lambda m: m.pop("window"), "window_corrupted"),
        (lambda m: m["objects"].pop(), "window_corrupted"),
        (lambda m: m["objects"].reverse(), "window_corrupted"),
        (lambda m: m["objects"][0].update(size=2**50), "payload_too_large"),
        (lambda m: m["objects"][0].update(size=manifest.MAX_OBJECT + 1), "payload_too_large"),
        (lambda m: m["texts"][0].update(size=manifest.MAX_TRANSCRIPT + 1), "payload_too_large"),
        (lambda m: m["texts"][1].update(size=manifest.MAX_FRAME + 1), "payload_too_large"),
        (lambda m: m["objects"].append(m["objects"][0]), "window_corrupted"),
        (
            lambda m: m["window"].update(
                world_size=200, chunk_count=manifest.MAX_TOKENS, token_count=manifest.MAX_TOKENS, chunk_size=1
            ),
            "too_complex",
        ),
        (lambda m: m["window"].update(receipt=nested(20)), "window_corrupted"),
        (lambda m: m["window"].update(receipt=nested(250)), "window_corrupted"),
        (lambda m: m["window"].update(receipt={"a": "x" * manifest.MAX_RECEIPT}), "window_corrupted"),
        (lambda m: m["window"].update(receipt={"a": "x" * 5 * manifest.MAX_RECEIPT}), "payload_too_large"),
        (lambda m: m["window"].update(session_id="s\x1b]52;c;eA==\x07"), "window_corrupted"),
        (lambda m: m["window"].update(session_id="a b"), "window_corrupted"),
        (lambda m: m["window"].update(parent="../x"), "window_corrupted"),
        (lambda m: m["window"].update(lineage="a\r\nb"), "window_corrupted"),
        (lambda m: m["window"].update(model="demo\x9b2J"), "window_corrupted"),
        (lambda m: m["window"].update(model="m" * 501), "window_corrupted"),
        (lambda m: m.update(objects=[[]] * 2_000_000), "too_complex"),
        (lambda m: m["objects"][0].update(size=-1), "window_corrupted"),
        (lambda m: m["objects"][0].update(size=manifest.MAX_OBJECT), "window_corrupted"),
        (lambda m: m["objects"][0].update(blake3="0" * 64), "window_corrupted"),
        (lambda m: m["objects"][0].update(name="/etc/passwd"), "window_corrupted"),
        (lambda m: m["texts"][0].update(size=2**40), "payload_too_large"),
    ],
)
async def test_a_manifest_that_lies_leaves_nothing(harness: GatewayHarness, change: Change, code: str) -> None:
    await window(harness.services)
    await refused(harness, rebuilt(await file_of(harness.services), change), code)


def nested(depth: int) -> dict[str, object]:
    """An object with so many others in it, one in another."""
    value: dict[str, object] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


async def test_a_manifest_that_is_too_large_is_refused_before_it_is_read() -> None:
    asked = 0

    async def source() -> AsyncIterator[bytes]:
        nonlocal asked
        yield file_format.header(file_format.MANIFEST, file_format.MAX_MANIFEST + 1)
        while True:
            asked += 1
            yield b" " * 2**16

    with pytest.raises(GatewayError) as caught:
        await file_format.Reader(source()).manifest()
    assert caught.value.code == "payload_too_large"
    assert asked * 2**16 <= file_format.PIECE


def members(data: bytes) -> list[tuple[str, bytes]]:
    """The members of a file, names and bytes."""
    found, at = [], 0
    while any(data[at : at + file_format.BLOCK]):
        name = data[at : at + 100].rstrip(b"\0").decode()
        size = int(data[at + 124 : at + 135], 8)
        found.append((name, data[at + file_format.BLOCK : at + file_format.BLOCK + size]))
        at += file_format.BLOCK + file_format.padded(size)
    return found


Members = list[tuple[str, bytes]]


@pytest.mark.parametrize(
    "harm",
    [
        lambda m: [("../../evil" if n == file_format.object_name(0) else n, d) for n, d in m],
        lambda m: [("/etc/passwd" if n == file_format.TEXTS[0] else n, d) for n, d in m],
        lambda m: [*m[:5], m[4], *m[5:]],
        lambda m: [*m[:4], m[5], m[4], *m[6:]],
        lambda m: [m[1], m[0], *m[2:]],
        lambda m: m[:-1],
        lambda m: [*m, ("more", b"x")],
        lambda m: [m[0], *m[2:]],
    ],
    ids=["path", "absolute", "twice", "order", "manifest-second", "one-less", "one-more", "no-transcript"],
)
async def test_other_members_than_are_due_leave_nothing(
    harness: GatewayHarness, harm: Callable[[Members], Members]
) -> None:
    await window(harness.services)
    wanted = members(await file_of(harness.services))[:-1]
    whole = b"".join(b"".join(file_format.wrap(name, data)) for name, data in wanted)
    assert whole + _end(whole) == await file_of(harness.services)
    whole = b"".join(b"".join(file_format.wrap(name, data)) for name, data in harm(wanted))
    await refused(harness, whole + _end(whole), "window_corrupted", "invalid_request")


@pytest.mark.parametrize("data", [b"", b"PK\3\4" + bytes(5000), b"\x1f\x8b" + bytes(5000), bytes(5000), b"{}" * 900])
async def test_what_is_no_window_file_is_told_so(harness: GatewayHarness, data: bytes) -> None:
    await refused(harness, data, "invalid_request", "window_corrupted")


def with_text(data: bytes, index: int, text: bytes) -> bytes:
    """The file with another text, its checksums right."""
    wanted = members(data)[:-1]
    manifest = orjson.loads(wanted[0][1])
    manifest["texts"][index - 1] = {"size": len(text), "blake3": blake3(text).hexdigest()}
    wanted[0] = (file_format.MANIFEST, orjson.dumps(manifest))
    wanted[index] = (wanted[index][0], text)
    whole = b"".join(b"".join(file_format.wrap(name, data)) for name, data in wanted)
    return whole + _end(whole)


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (1, b"[]"), (1, b"[1]"), (1, b"{"), (1, b'[{"role":"user"}'), (1, b'[{"role":1}]'), (1, b'[{"role":"a"},]'),
        (1, b'[{"role":"text","content":5}]'), (1, b'[{"role":"tokens","content":["a"]}]'),
        (1, b'[{"role":"a","content":' + b"[" * 100 + b"]" * 100 + b"}]"),
        (2, b'{"cache_salt": "x"}'), (2, b"[]"), (2, b'{"kv_transfer_params": {}}'), (2, b"{"),
        (2, b'{"tools":' + b"[" * 100 + b"]" * 100 + b"}"),
    ],
)  # fmt: skip
async def test_text_that_is_none_leaves_nothing(harness: GatewayHarness, index: int, text: bytes) -> None:
    await window(harness.services)
    await refused(harness, with_text(await file_of(harness.services), index, text), "window_corrupted")


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (1, b"[" + b",".join([b'{"role":"a"}'] * 100_001) + b"]"),
        (1, b'[{"role":"user","content":[' + b",".join([b"[]"] * 250_000) + b"]}]"),
        (1, b'[{"role":"user","content":[' + b",".join([b"1"] * 1_200_000) + b"]}]"),
        (2, b'{"tools":[' + b",".join([b"{}"] * 250_000) + b"]}"),
    ],
    ids=["messages", "containers", "values", "tools"],
)
async def test_text_with_too_much_in_it_leaves_nothing(harness: GatewayHarness, index: int, text: bytes) -> None:
    await window(harness.services)
    await refused(harness, with_text(await file_of(harness.services), index, text), "too_complex")


async def test_a_transcript_as_deep_as_may_be_can_be_read_and_exported_again(harness: GatewayHarness) -> None:
    await window(harness.services)
    deep = b'[{"role":"user","content":' + b"[" * 98 + b"]" * 98 + b"}]"
    receipt = nested(19)
    data = rebuilt(with_text(await file_of(harness.services), 1, deep), lambda m: m["window"].update(receipt=receipt))  # type: ignore[attr-defined]
    imported, _ = await import_window(harness.services, "default", stream(data, 50_000), name="deep")
    assert orjson.dumps(serializers.window_fields(imported))
    again, _ = await import_window(
        harness.services, "default", stream(await file_of(harness.services, "deep"), 50_000), name="2"
    )
    assert await harness.services.store.messages(again.transcript) == orjson.loads(deep)


async def test_a_long_transcript_is_in_memory_no_more_than_twice(harness: GatewayHarness) -> None:
    await window(harness.services)
    text = orjson.dumps([{"role": "user", "content": "x" * 2**18 + str(number)} for number in range(100)])
    data = with_text(await file_of(harness.services), 1, text)
    tracemalloc.start()
    try:
        await import_window(harness.services, "default", stream(data, 2**18), name="long")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(text)


async def test_an_import_that_would_take_the_last_of_the_disk_is_refused_before_its_objects_are_read(
    harness: GatewayHarness,
) -> None:
    await window(harness.services)
    data = await file_of(harness.services)
    plain = harness.services
    harness.services = replace(plain, settings=replace(plain.settings, disk_reserve_bytes=2**62))
    head = data[: file_format.BLOCK + file_format.padded(int(data[124:135], 8))]
    assert "disk_reserve_bytes" in await refused(harness, head, "storage_full")
    imported, _ = await import_window(
        harness.services, "default", stream(data), name="t", as_text=True
    )  # needs no room
    assert imported.kv == "absent"


async def test_a_disk_that_fills_up_meanwhile_ends_an_import(tmp_path: Path) -> None:
    free = (await asyncio.to_thread(shutil.disk_usage, tmp_path)).free
    async with Spool(tmp_path, 1) as spool:
        await spool.expect(1)
        await spool.write(memoryview(bytes(1000)))
        await spool.rewind()
        assert await spool.read(2000) == bytes(1000)
    async with Spool(tmp_path, 2 * free) as spool:
        with pytest.raises(GatewayError, match="disk_reserve_bytes"):
            await spool.write(memoryview(b"x"))


@pytest.mark.parametrize(("per_tenant", "alone"), [(False, True), (True, True), (True, False)])
async def test_an_import_neither_pins_nor_commits_while_others_hold_the_pins(
    harness: GatewayHarness, per_tenant: bool, alone: bool
) -> None:
    """A sweep holds them alone. A freeze shares them, and where a tenant has one salt it may be of the very objects."""
    await window(harness.services)
    data = await file_of(harness.services)
    parts = replace(harness.services, salts=replace(harness.services.salts, per_tenant=per_tenant))
    before = harness.everything()
    read = asyncio.Event()

    def tell(stage: str, done: int, total: int) -> None:
        if stage == "read" and done == total:
            read.set()

    async with parts.pins.lock.acquire(exclusive=alone):
        going = asyncio.create_task(import_window(parts, "default", stream(data), name="x", progress=tell))
        await read.wait()
        done, _ = await asyncio.wait({going}, timeout=0.3)
        assert not done
        assert harness.everything() == before
    assert (await going)[0].kv == "complete"


async def test_a_file_beyond_the_bound_is_refused_by_what_it_says(harness: GatewayHarness) -> None:
    await window(harness.services)
    data = await file_of(harness.services)
    services = replace(harness.services, settings=replace(harness.settings, max_import_bytes=9000))
    small = GatewayHarness(services, harness.kv, harness.redis, harness.settings)
    assert "9000" in await refused(small, data[:4096], "payload_too_large")


async def test_another_model_is_imported_as_text_only(harness: GatewayHarness) -> None:
    await window(harness.services)
    data = rebuilt(await file_of(harness.services), lambda m: m["window"].update(fingerprint="other"))  # type: ignore[attr-defined]
    await refused(harness, data, "model_mismatch")
    imported, warnings = await import_window(harness.services, "default", stream(data), name="text", as_text=True)
    assert (imported.kv, imported.size_bytes) == ("absent", 0)
    assert "rendered again" in warnings[0]
    session, _, receipt = await thaw(harness.services, "default", "text", new_session_id=None, warm="none")
    assert (session.token_count, receipt.chunks_found) == (len(IDS), 0)
    # As text too, a damaged object is a damaged file.
    await refused(harness, data[:20_000], "window_corrupted", as_text=True)


async def test_a_full_tier_leaves_nothing(harness: GatewayHarness) -> None:
    await window(harness.services)
    data = await file_of(harness.services)
    harness.redis.client.config_set("maxmemory", 1)  # the disk, which comes first, has taken all by then
    try:
        await refused(harness, data, "storage_full")
    finally:
        harness.redis.client.config_set("maxmemory", 0)


async def test_past_the_tenants_budget_an_import_leaves_nothing(harness: GatewayHarness) -> None:
    await window(harness.services)
    data = await file_of(harness.services)
    held = await harness.services.store.held_bytes("default", [])
    plain = harness.services
    harness.services = replace(plain, settings=replace(plain.settings, tenant_budget_bytes=2 * held - 1))
    assert f"would hold {2 * held} bytes, 1 more than" in await refused(harness, data, "storage_full")
    harness.services = replace(plain, settings=replace(plain.settings, tenant_budget_bytes=2 * held))
    imported, _ = await import_window(harness.services, "default", stream(data, 50_000), name="x", as_text=False)
    assert imported.kv == "complete"


async def test_pins_that_were_never_committed_go_at_the_next_start(harness: GatewayHarness) -> None:
    await window(harness.services)
    before = harness.everything()
    model = await harness.services.engines.model(MODEL)
    for key in object_keys(model.root, IDS, CHUNK, 1, "f" * 32):
        for tier in harness.services.pins.tiers:
            await tier.put(key, b"half")
    (next((harness.kv.parent / "kv-pins").iterdir()) / "0123456789abcdef.put").write_bytes(b"half")
    assert harness.everything() != before
    async with open_services(harness.settings):
        assert harness.everything() == before


def test_token_ids_are_little_endian() -> None:
    assert pack([1, 258]) == b"\1\0\0\0\2\1\0\0"


# --- over HTTP, and by the CLI


def cwg(gateway: Gateway, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", *arguments]
    given = environment({"CWG_URL": gateway.url})
    return subprocess.run(command, env=given, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_doors_export_and_import(gateway: Gateway, session: str, tmp_path: Path) -> None:
    gateway.chat(session)
    name = f"w-{session}"
    gateway.freeze(session, name)
    file = tmp_path / "w.cwg"
    done = cwg(gateway, "export", name, str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert [f.name for f in tmp_path.iterdir()] == ["w.cwg"]
    taken = cwg(gateway, "import", str(file))
    assert (taken.returncode, name in taken.stderr) == (1, True)
    done = cwg(gateway, "import", str(file), "--name", f"{name}-2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["receipt"]["imported"]["name"] == name
    assert cwg(gateway, "import", str(file), "--name", f"{name}-3", "--as-text").returncode == 0
    both = [gateway.http.get(f"/admin/windows/{w}/messages").json()["messages"] for w in (name, f"{name}-2")]
    assert both[0] == both[1]
    answer = gateway.http.get(f"/admin/windows/{name}/export")
    assert answer.content == file.read_bytes()
    head = gateway.http.head(f"/admin/windows/{name}/export")
    assert (head.status_code, int(head.headers["content-length"])) == (200, len(answer.content))
    lines = gateway.http.get(f"/admin/windows/{name}/export", headers={"accept": "application/x-ndjson"})
    assert lines.json()["error"]["code"] == "invalid_request"


def test_an_export_is_for_its_owner_alone_and_overwrites_nothing_unasked(
    gateway: Gateway, session: str, tmp_path: Path
) -> None:
    gateway.chat(session)
    gateway.freeze(session, session)
    file = tmp_path / "w.cwg"
    file.write_bytes(b"mine")
    refused = cwg(gateway, "export", session, str(file))
    assert (refused.returncode, "--force" in refused.stderr) == (1, True)
    assert file.read_bytes() == b"mine"
    assert cwg(gateway, "export", session, str(file), "--force").returncode == 0
    assert file.read_bytes() == gateway.http.get(f"/admin/windows/{session}/export").content
    assert cwg(gateway, "export", session, str(tmp_path / "fresh.cwg")).returncode == 0
    assert {f.name: f.stat().st_mode & 0o777 for f in tmp_path.iterdir()} == {"w.cwg": 0o600, "fresh.cwg": 0o600}


def test_a_file_that_cannot_be_had_leaves_no_file(gateway: Gateway, session: str, tmp_path: Path) -> None:
    failed = cwg(gateway, "export", f"no-{session}", str(tmp_path / "w.cwg"))
    assert (failed.returncode, f"no-{session}" in failed.stderr) == (1, True)
    assert list(tmp_path.iterdir()) == []
    assert cwg(gateway, "import", str(tmp_path / "none.cwg")).returncode == 1


def test_a_body_beyond_the_bound_is_refused(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, max_import_bytes=4000) as gateway:
        for content in (bytes(5000), iter([file_format.header(file_format.MANIFEST, 8000), *[b" " * 2000] * 2])):
            answer = gateway.http.post("/admin/windows/import", content=content)
            assert answer.status_code == 413
            assert answer.json()["error"]["hint"] == "max_import_bytes sets the limit"
        assert gateway.http.post("/admin/windows/import?name=x", content=b"").status_code == 400
