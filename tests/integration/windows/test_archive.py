"""Windows as files: the round trip through both tiers, and invalid files."""

import asyncio
import subprocess
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import orjson
import pytest
from blake3 import blake3

from gateway.api.admin import serializers
from gateway.errors import GatewayError
from gateway.kv.keys import object_keys
from gateway.windows.archive import file_format, manifest
from gateway.windows.archive.export import export
from gateway.windows.archive.import_ import import_window
from gateway.windows.delete import delete
from gateway.windows.thaw import thaw
from tests.support.fakes.engine import MODEL
from tests.support.harness import CHUNK, CHUNKS, FRAME, IDS, MESSAGES, GatewayHarness, value, window
from tests.support.window_files import Change, _end, file_of, rebuilt, refused, stream

pytestmark = pytest.mark.anyio


async def test_import_equals_export_under_its_own_salt(harness: GatewayHarness) -> None:
    original = await window(harness.services)
    data = await file_of(harness.services)
    imported, warnings = await import_window(harness.ctx, stream(data), name="again")
    assert warnings == ()
    assert (imported.kv, imported.chunk_count, imported.token_count) == ("complete", CHUNKS, len(IDS))
    assert (imported.description, imported.tags, imported.model) == ("d", ("a",), MODEL)
    assert imported.salt != original.salt
    assert imported.lineage != original.lineage
    kept = await harness.services.store.window("default", "again")
    assert kept is not None
    assert await harness.services.store.messages(kept.transcript) == MESSAGES
    assert await harness.services.store.frame(kept.frame or b"") == FRAME
    manifest = await harness.services.store.manifest(kept)
    assert tuple(manifest.token_ids) == IDS
    assert len(manifest.objects) == 2 * CHUNKS
    for index, key in enumerate(object_keys(kept.model_root, IDS, CHUNK, 1, kept.salt)):
        assert (harness.kv / key.file_name).read_bytes() == value(index)
        assert (harness.kv / key.file_name).stat().st_nlink == 2  # and pinned
        assert harness.redis.live(key) == value(index)
    _, _, receipt, _ = await thaw(harness.ctx, "again", new_session_id=None, warm="none")
    assert (receipt.chunks_found, receipt.chunks_relinked, receipt.partial) == (CHUNKS, 0, False)


async def test_deleted_window_can_be_imported_again(harness: GatewayHarness) -> None:
    empty = harness.everything()
    await window(harness.services)
    data = await file_of(harness.services)
    await delete(harness.ctx, "w")
    assert harness.everything() == empty
    imported, _ = await import_window(harness.ctx, stream(data))
    assert (imported.name, imported.kv) == ("w", "complete")
    assert imported.receipt["imported"]["name"] == "w"
    again = await file_of(harness.services)
    await delete(harness.ctx, "w")
    assert harness.everything() == empty
    assert len(again) != 0


async def test_standard_tar_reads_the_file(harness: GatewayHarness, tmp_path: Path) -> None:
    await window(harness.services)
    (tmp_path / "w.cwg").write_bytes(await file_of(harness.services))
    names = await asyncio.to_thread(subprocess.check_output, ["tar", "tf", str(tmp_path / "w.cwg")], text=True)
    objects = [file_format.object_name(index) for index in range(CHUNKS)]
    assert names.split() == [file_format.MANIFEST, *file_format.TEXTS, *objects, file_format.CHECKSUM]


async def test_export_reads_lost_objects_from_the_other_tier(harness: GatewayHarness) -> None:
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
    text = await export(harness.ctx, "w", as_text=True)
    data = b"".join([piece async for piece in text.pieces])
    imported, _ = await import_window(harness.ctx, stream(data), name="text")
    assert (imported.kv, imported.chunk_count) == ("absent", 0)


async def test_taken_name_is_refused(harness: GatewayHarness) -> None:
    await window(harness.services)
    await refused(harness, await file_of(harness.services), "window_already_exists", name=None)


async def test_truncated_file_leaves_nothing(harness: GatewayHarness) -> None:
    await window(harness.services)
    data = await file_of(harness.services)
    for part in range(50):
        await refused(harness, data[: len(data) * part // 50], "window_corrupted")
    await refused(harness, data[:-1], "window_corrupted")
    assert "after the end" in await refused(harness, data + b"\0", "window_corrupted")


@pytest.mark.parametrize("data", [b"localhost\n", b"\x00" * 4096, b"MANIFEST.txt"])
async def test_any_other_file_is_not_a_window_file(harness: GatewayHarness, data: bytes) -> None:
    assert "not a window file" in await refused(harness, data, "invalid_request")


async def test_flipped_bit_leaves_nothing(harness: GatewayHarness) -> None:
    await window(harness.services)
    data = await file_of(harness.services)
    # A bit of every block: headers, members, what fills them up, and the end.
    for at in range(0, len(data), file_format.BLOCK):
        harmed = bytearray(data)
        harmed[at + at // file_format.BLOCK * 101 % file_format.BLOCK] ^= 1 << at // file_format.BLOCK % 8
        await refused(harness, bytes(harmed), "window_corrupted", "invalid_request", "model_mismatch")


async def test_wrong_checksum_of_the_file_leaves_nothing(harness: GatewayHarness) -> None:
    await window(harness.services)
    data = bytearray(await file_of(harness.services))
    at = len(data) - len(file_format.END) - file_format.BLOCK  # its first digit
    data[at] = ord("0") if data[at] != ord("0") else ord("1")
    assert "whole file" in await refused(harness, bytes(data), "window_corrupted")


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
async def test_invalid_manifest_leaves_nothing(harness: GatewayHarness, change: Change, code: str) -> None:
    await window(harness.services)
    await refused(harness, rebuilt(await file_of(harness.services), change), code)


def nested(depth: int) -> dict[str, object]:
    """An object with that many others nested in it."""
    value: dict[str, object] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


async def test_large_manifest_is_refused_before_it_is_read() -> None:
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
async def test_unexpected_members_leave_nothing(harness: GatewayHarness, harm: Callable[[Members], Members]) -> None:
    await window(harness.services)
    wanted = members(await file_of(harness.services))[:-1]
    whole = b"".join(b"".join(file_format.wrap(name, data)) for name, data in wanted)
    assert whole + _end(whole) == await file_of(harness.services)
    whole = b"".join(b"".join(file_format.wrap(name, data)) for name, data in harm(wanted))
    await refused(harness, whole + _end(whole), "window_corrupted", "invalid_request")


@pytest.mark.parametrize("data", [b"", b"PK\3\4" + bytes(5000), b"\x1f\x8b" + bytes(5000), bytes(5000), b"{}" * 900])
async def test_other_files_are_refused_as_such(harness: GatewayHarness, data: bytes) -> None:
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
async def test_invalid_text_leaves_nothing(harness: GatewayHarness, index: int, text: bytes) -> None:
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
async def test_too_complex_text_leaves_nothing(harness: GatewayHarness, index: int, text: bytes) -> None:
    await window(harness.services)
    await refused(harness, with_text(await file_of(harness.services), index, text), "too_complex")


async def test_deepest_allowed_transcript_survives_a_round_trip(harness: GatewayHarness) -> None:
    await window(harness.services)
    deep = b'[{"role":"user","content":' + b"[" * 98 + b"]" * 98 + b"}]"
    receipt = nested(19)
    data = rebuilt(with_text(await file_of(harness.services), 1, deep), lambda m: m["window"].update(receipt=receipt))  # type: ignore[attr-defined]
    imported, _ = await import_window(harness.ctx, stream(data, 50_000), name="deep")
    assert orjson.dumps(serializers.window_fields(imported, 0.0))
    again, _ = await import_window(harness.ctx, stream(await file_of(harness.services, "deep"), 50_000), name="2")
    assert await harness.services.store.messages(again.transcript) == orjson.loads(deep)


async def test_long_transcript_is_in_memory_at_most_twice(harness: GatewayHarness) -> None:
    await window(harness.services)
    text = orjson.dumps([{"role": "user", "content": "x" * 2**18 + str(number)} for number in range(100)])
    data = with_text(await file_of(harness.services), 1, text)
    tracemalloc.start()
    try:
        await import_window(harness.ctx, stream(data, 2**18), name="long")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(text)
