"""Imports that exceed a limit of the disk, a tier, a budget or a body; and files at the CLI."""

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.app import open_services
from gateway.errors import GatewayError
from gateway.kv.keys import object_keys
from gateway.windows.archive import file_format
from gateway.windows.archive.export import pack
from gateway.windows.archive.import_ import import_window
from gateway.windows.archive.spool import Spool
from gateway.windows.context import OperationContext
from gateway.windows.thaw import thaw
from tests.support.cli import cwg
from tests.support.fakes.engine import MODEL, FakeEngine
from tests.support.gateway_process import Gateway, gateway_in_front_of
from tests.support.harness import CHUNK, CHUNKS, IDS, GatewayHarness, window
from tests.support.window_files import file_of, rebuilt, refused, stream

pytestmark = pytest.mark.anyio


async def test_import_without_room_is_refused_early(harness: GatewayHarness) -> None:
    await window(harness.services)
    data = await file_of(harness.services)
    plain = harness.services
    harness.services = replace(plain, settings=plain.settings.model_copy(update={"disk_reserve_bytes": 2**62}))
    head = data[: file_format.BLOCK + file_format.padded(int(data[124:135], 8))]
    assert "disk_reserve_bytes" in await refused(harness, head, "storage_full")
    imported, _ = await import_window(harness.ctx, stream(data), name="t", as_text=True)  # needs no room
    assert imported.kv == "absent"


async def test_disk_filling_up_ends_an_import(tmp_path: Path) -> None:
    free = (await asyncio.to_thread(shutil.disk_usage, tmp_path)).free
    async with Spool(tmp_path, 1) as spool:
        await spool.expect(1)
        await spool.write(memoryview(bytes(1000)))
        await spool.rewind()
        assert await spool.read(2000) == bytes(1000)
    async with Spool(tmp_path, 2 * free) as spool:
        with pytest.raises(GatewayError, match="disk_reserve_bytes"):
            await spool.write(memoryview(b"x"))


async def test_import_waits_for_a_freeze_of_the_same_objects(harness: GatewayHarness) -> None:
    """With one salt for a tenant, a freeze may be pinning them."""
    frozen = await window(harness.services)
    data = await file_of(harness.services)
    parts = replace(harness.services, salts=replace(harness.services.salts, per_tenant=True))
    salt = parts.salts.of("default", "l", frozen.fingerprint)
    before = harness.everything()
    read = asyncio.Event()

    def tell(stage: str, done: int, total: int) -> None:
        if stage == "read" and done == total:
            read.set()

    async with parts.claims.keep(object_keys(frozen.model_root, IDS, CHUNK, 1, salt)):
        going = asyncio.create_task(import_window(OperationContext(parts, "default", tell), stream(data), name="x"))
        await read.wait()
        done, _ = await asyncio.wait({going}, timeout=0.3)
        assert not done
        assert harness.everything() == before
    assert (await going)[0].kv == "complete"


async def test_file_announcing_too_many_bytes_is_refused(harness: GatewayHarness) -> None:
    await window(harness.services)
    data = await file_of(harness.services)
    services = replace(harness.services, settings=harness.settings.model_copy(update={"max_import_bytes": 9000}))
    small = GatewayHarness(services, harness.kv, harness.redis, harness.settings)
    assert "9000" in await refused(small, data[:4096], "payload_too_large")


async def test_other_model_is_imported_as_text_only(harness: GatewayHarness) -> None:
    await window(harness.services)
    data = rebuilt(await file_of(harness.services), lambda m: m["window"].update(fingerprint="other"))  # type: ignore[attr-defined]
    await refused(harness, data, "model_mismatch")
    imported, warnings = await import_window(harness.ctx, stream(data), name="text", as_text=True)
    assert (imported.kv, imported.size_bytes) == ("absent", 0)
    assert "rendered again" in warnings[0]
    session, _, receipt, _ = await thaw(harness.ctx, "text", new_session_id=None, warm="none")
    assert (session.token_count, receipt.chunks_found) == (len(IDS), 0)
    # As text too, a damaged object is a damaged file.
    await refused(harness, data[:20_000], "window_corrupted", as_text=True)


async def test_full_tier_leaves_nothing(harness: GatewayHarness) -> None:
    await window(harness.services)
    data = await file_of(harness.services)
    harness.redis.client.config_set("maxmemory", 1)  # the disk, which comes first, has taken all by then
    try:
        await refused(harness, data, "storage_full")
    finally:
        harness.redis.client.config_set("maxmemory", 0)


async def test_import_over_the_tenant_budget_leaves_nothing(harness: GatewayHarness) -> None:
    await window(harness.services)
    data = await file_of(harness.services)
    held = await harness.services.store.held_bytes("default", [])
    plain = harness.services
    harness.services = replace(plain, settings=plain.settings.model_copy(update={"tenant_budget_bytes": 2 * held - 1}))
    assert f"would hold {2 * held} bytes, 1 more than" in await refused(harness, data, "storage_full")
    harness.services = replace(plain, settings=plain.settings.model_copy(update={"tenant_budget_bytes": 2 * held}))
    imported, _ = await import_window(harness.ctx, stream(data, 50_000), name="x", as_text=False)
    assert imported.kv == "complete"


async def test_uncommitted_pins_are_removed_by_a_gateway_that_is_alone(harness: GatewayHarness) -> None:
    await window(harness.services)
    before = harness.everything()
    model = await harness.services.engines.model(MODEL)
    for key in object_keys(model.root, IDS, CHUNK, 1, "f" * 32):
        for tier in harness.services.pins.tiers:
            await tier.put(key, b"half")
    (next((harness.kv.parent / "kv-pins").iterdir()) / "0123456789abcdef.put").write_bytes(b"half")
    assert harness.everything() != before
    async with open_services(harness.settings):
        assert harness.everything() != before, "another gateway is alive, and may be pinning something"
    assert await harness.services.claims.release_strays() == 2 * CHUNKS + 1
    assert harness.everything() == before


def test_token_ids_are_little_endian() -> None:
    assert pack([1, 258]) == b"\1\0\0\0\2\1\0\0"


def test_http_and_cli_export_and_import(gateway: Gateway, session: str, tmp_path: Path) -> None:
    gateway.chat(session)
    name = f"w-{session}"
    gateway.freeze(session, name)
    file = tmp_path / "w.cwg"
    done = cwg("export", name, str(file), url=gateway.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert [f.name for f in tmp_path.iterdir()] == ["w.cwg"]
    taken = cwg("import", str(file), url=gateway.url)
    assert (taken.returncode, name in taken.stderr) == (1, True)
    done = cwg("import", str(file), "--name", f"{name}-2", "--json", url=gateway.url)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["receipt"]["imported"]["name"] == name
    assert cwg("import", str(file), "--name", f"{name}-3", "--as-text", url=gateway.url).returncode == 0
    both = [gateway.http.get(f"/admin/windows/{w}/messages").json()["messages"] for w in (name, f"{name}-2")]
    assert both[0] == both[1]
    answer = gateway.http.get(f"/admin/windows/{name}/export")
    assert answer.content == file.read_bytes()
    head = gateway.http.head(f"/admin/windows/{name}/export")
    assert (head.status_code, int(head.headers["content-length"])) == (200, len(answer.content))
    lines = gateway.http.get(f"/admin/windows/{name}/export", headers={"accept": "application/x-ndjson"})
    assert lines.json()["error"]["code"] == "invalid_request"


def test_exported_file_is_private_and_overwrites_nothing(gateway: Gateway, session: str, tmp_path: Path) -> None:
    gateway.chat(session)
    gateway.freeze(session, session)
    file = tmp_path / "w.cwg"
    file.write_bytes(b"mine")
    refused = cwg("export", session, str(file), url=gateway.url)
    assert (refused.returncode, "--force" in refused.stderr) == (1, True)
    assert file.read_bytes() == b"mine"
    assert cwg("export", session, str(file), "--force", url=gateway.url).returncode == 0
    assert file.read_bytes() == gateway.http.get(f"/admin/windows/{session}/export").content
    assert cwg("export", session, str(tmp_path / "fresh.cwg"), url=gateway.url).returncode == 0
    assert {f.name: f.stat().st_mode & 0o777 for f in tmp_path.iterdir()} == {"w.cwg": 0o600, "fresh.cwg": 0o600}


def test_failed_export_leaves_no_file(gateway: Gateway, session: str, tmp_path: Path) -> None:
    failed = cwg("export", f"no-{session}", str(tmp_path / "w.cwg"), url=gateway.url)
    assert (failed.returncode, f"no-{session}" in failed.stderr) == (1, True)
    assert list(tmp_path.iterdir()) == []
    assert cwg("import", str(tmp_path / "none.cwg"), url=gateway.url).returncode == 1


def test_too_large_body_is_refused(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, max_import_bytes=4000) as gateway:
        for content in (bytes(5000), iter([file_format.header(file_format.MANIFEST, 8000), *[b" " * 2000] * 2])):
            answer = gateway.http.post("/admin/windows/import", content=content)
            assert answer.status_code == 413
            assert answer.json()["error"]["hint"] == "max_import_bytes sets the limit"
        assert gateway.http.post("/admin/windows/import?name=x", content=b"").status_code == 400
