"""A gateway killed during an export or import of a large window leaves nothing half done; the next start is clean."""

import asyncio
import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from gateway.app import open_services
from gateway.settings import Settings
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import ROOT, Gateway, environment, eventually
from tests.support.harness import CHUNKS, cache_server, window
from tests.support.postgres import store_settings

OBJECT = 6_000_000  # bytes; all of them are far more than what sockets and their buffers hold


@pytest.fixture
def gateway(engine: FakeEngine, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway on the disk tier, with a window `w` of tens of megabytes."""
    (tmp_path / "kv").mkdir()
    with cache_server() as cache:
        more = {"cache_url": cache, "kv_dir": str(tmp_path / "kv")}
        own = {"data_dir": str(tmp_path / "data"), **store_settings(tmp_path / "data"), **more}
        asyncio.run(_fill(Settings(engine_urls=(engine.url,), **own)))  # type: ignore[arg-type]
        gateway = Gateway(tmp_path, engine.url, **more)
        yield started(gateway)
        gateway.close()


async def _fill(settings: Settings) -> None:
    settings.data_path.mkdir()
    async with open_services(settings) as parts:
        await window(parts, size=OBJECT)


def started(gateway: Gateway) -> Gateway:
    """Started, and responding. It is never ready: its self-test needs more of LMCache than there is here."""
    return gateway.start().wait("/healthz")


def everything(gateway: Gateway) -> set[str]:
    """Every file of the tiers and of the gateway, except SQLite's own."""
    folder = gateway.data_dir.parent
    files = {str(f) for f in folder.rglob("*") if f.is_file()}
    return {f for f in files if not f.endswith(("-wal", "-shm"))}


def windows(gateway: Gateway) -> list[str]:
    """The existing windows, each of them complete."""
    names = [w["name"] for w in gateway.http.get("/admin/windows?sort_by=name&sort_order=asc").json()["windows"]]
    for name in names:
        verdict = gateway.http.post(f"/admin/windows/{name}/verify").json()
        assert (verdict["ok"], verdict["chunks_usable"]) == (True, CHUNKS), verdict
    return names


def killed(gateway: Gateway) -> None:
    """SIGKILL."""
    gateway.process.kill()
    gateway.process.wait()


def file_of(gateway: Gateway) -> bytes:
    """The whole file of the window."""
    return gateway.http.get("/admin/windows/w/export").content


def test_kill_during_export_is_seen_by_the_client(gateway: Gateway) -> None:
    before = everything(gateway)
    size, seen = 0, 0
    with suppress(httpx.TransportError), gateway.http.stream("GET", "/admin/windows/w/export") as answer:
        size = int(answer.headers["content-length"])
        for piece in answer.iter_raw():
            if not seen:
                killed(gateway)
            seen += len(piece)
    assert 0 < seen < size
    started(gateway)
    assert windows(gateway) == ["w"]
    assert everything(gateway) == before
    assert len(file_of(gateway)) == size


def test_kill_during_export_leaves_the_cli_no_file(gateway: Gateway, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "gateway", "export", "w", str(out / "w.cwg")]
    given = environment({"CWG_URL": gateway.url})
    with subprocess.Popen(command, env=given, cwd=ROOT, stderr=subprocess.PIPE) as client:
        eventually(lambda: any(f.stat().st_size for f in out.iterdir()), "the export has begun")
        killed(gateway)
        _, said = client.communicate(timeout=120)
    assert (client.returncode, b"Traceback" in said) == (1, False), said
    assert list(out.iterdir()) == []


def test_kill_while_import_is_read_leaves_nothing(gateway: Gateway) -> None:
    data = file_of(gateway)
    before = everything(gateway)
    for share in (0.001, 0.5, 0.999):
        _kill_in_mid_import(gateway, data[: int(len(data) * share)], len(data))
        assert everything(gateway) == before
        started(gateway)
        assert windows(gateway) == ["w"]
        assert everything(gateway) == before
    assert gateway.http.post("/admin/windows/import?window_name=again", content=data).status_code == 201
    assert windows(gateway) == ["again", "w"]


def _kill_in_mid_import(gateway: Gateway, part: bytes, size: int) -> None:
    """Send a part of a window's file, and kill the gateway while it waits for the rest."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)
    connection.putrequest("POST", "/admin/windows/import?window_name=again")
    connection.putheader("content-length", str(size))
    connection.endheaders()
    connection.send(part)
    killed(gateway)
    connection.close()


@pytest.mark.parametrize("stage", ["place", "commit"])
def test_kill_while_import_is_pinned_leaves_all_or_nothing(gateway: Gateway, stage: str) -> None:
    data = file_of(gateway)
    before = everything(gateway)
    path, headers = "/admin/windows/import?window_name=again", {"accept": "application/x-ndjson"}
    cut = suppress(httpx.TransportError)
    with cut, gateway.http.stream("POST", path, content=data, headers=headers) as answer:
        for line in answer.iter_lines():
            if json.loads(line).get("progress", {}).get("stage") == stage:
                killed(gateway)
                break
    started(gateway)
    left = windows(gateway)
    assert left in (["w"], ["again", "w"])
    if left == ["w"]:
        assert everything(gateway) == before
    for name in left:
        assert gateway.http.delete(f"/admin/windows/{name}").status_code == 200
    eventually(lambda: not [f for f in everything(gateway) if f.endswith((".data", ".put", ".link"))], "no object left")
