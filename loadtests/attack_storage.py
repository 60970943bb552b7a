"""Storage: inconsistent imports, a full disk, secrets, a damaged store, two gateways in one directory."""

import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from loadtests.attack_harness import (
    Gateway,
    Impact,
    Testbed,
    Trials,
    Verdict,
    check_all,
    head,
    measure,
    read_reply,
    send_repeatedly,
    verdict,
    wait_for,
)
from loadtests.attack_window_file import CHECKSUM, TAR, fingerprint, header, window_file, with_object
from tests.support.harness import CHUNK, cache_server
from tests.support.tier_harness import small_disk

TRIALS = Trials()


def _import(gateway: Gateway, file: bytes, name: str = "") -> Impact:
    query = f"?window_name={name}" if name else ""
    path = f"/admin/windows/import{query}"

    def send() -> str:
        answer = gateway.post(path, file, TAR, timeout=60)
        return f"{answer.status} {answer.json().get('error', {}).get('code', '')}".strip()

    return measure(gateway, send, len(file), give_up_s=15)


_SIZE = 26 * 2**20


def _list_of(unit: bytes) -> bytes:
    return b"[" + b",".join([unit] * (_SIZE // (len(unit) + 1))) + b"]"


def _members(manifest: bytes) -> bytes:
    entry = b'{"size":1,"blake3":"' + b"0" * 64 + b'"}'
    return manifest.replace(b'"objects": []', b'"objects": ' + _list_of(entry))


_MANY_ITEMS: Mapping[str, Callable[[str], bytes]] = {
    "messages": lambda f: window_file(f, _list_of(b'{"role":"a"}')),
    "parts": lambda f: window_file(f, b'[{"role":"user","content":' + _list_of(b"{}") + b"}]"),
    "frame": lambda f: window_file(f, frame=b'{"tools":' + _list_of(b"{}") + b"}"),
    "frame keys": lambda f: window_file(f, frame=b"{" + b",".join(b'"k%d":1' % n for n in range(_SIZE // 12)) + b"}"),
    "receipt": lambda f: window_file(f, receipt={f"k{n}": 1 for n in range(_SIZE // 14)}),
    "members": lambda f: window_file(f, manifest=_members),
    "brackets": lambda f: window_file(f, b"[" * _SIZE),
    "token ids": lambda f: window_file(f, ids=b"\1\0\0\0" * (_SIZE // 4)),
    "one text": lambda f: window_file(f, b'[{"role":"user","content":"' + b"a" * _SIZE + b'"}]'),
}


@TRIALS.add
def imports_with_many_items(testbed: Testbed) -> Verdict:
    """A 26 MB window file with a million messages, members, ids, tags or keys does not block other requests"""
    engine = testbed.engine()
    impacts: dict[str, Impact] = {}
    gateway = testbed.gateway(engine.url)
    model_fingerprint = fingerprint(gateway)
    for number, (name, shape) in enumerate(_MANY_ITEMS.items()):
        if not gateway.alive or gateway.memory() > 500 * 2**20:
            gateway.close()
            gateway = testbed.gateway(engine.url, model_fingerprint="")
            model_fingerprint = fingerprint(gateway)
        file = shape(model_fingerprint)
        impacts[name] = _import(gateway, file, f"w{number}")
        if not impacts[name].within_limits and impacts[name].pause_ms < 1000 and gateway.alive:
            gateway.close()
            gateway = testbed.gateway(engine.url)
            impacts[name] = min(impacts[name], _import(gateway, file, f"x{number}"), key=lambda impact: impact.pause_ms)
    failures = {
        name: impact for name, impact in impacts.items() if not impact.within_limits or impact.answer.startswith("500")
    }
    most = max(impacts.values(), key=lambda impact: impact.pause_ms)
    return verdict(not failures, *(f"NOT {name}: {impact}" for name, impact in failures.items()), f"longest: {most}")


def _deep(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


@TRIALS.add
def nested_imports(testbed: Testbed) -> Verdict:
    """A deeply nested file is refused, or can be shown, thawed and exported again: no 500, nothing half-done"""
    gateway = testbed.gateway(testbed.engine().url)
    model_fingerprint = fingerprint(gateway)
    failures, statuses = [], set()
    for depth in (60, 120, 200, 249, 250, 251, 252, 253, 254, 300, 1000, 1023):
        files = {
            "transcript": window_file(model_fingerprint, f'[{{"role":"user","content":{_deep(depth)}}}]'.encode()),
            "frame": window_file(model_fingerprint, frame=f'{{"tools":{_deep(depth)}}}'.encode()),
            "receipt": window_file(
                model_fingerprint,
                manifest=lambda m, d=depth: m.replace(b'"receipt": {}', f'"receipt": {{"a":{_deep(d)}}}'.encode()),
            ),  # type: ignore[misc]
        }
        for where, file in files.items():
            name = f"{where}-{depth}"
            answer = gateway.post(f"/admin/windows/import?window_name={name}", file, TAR)
            statuses.add(answer.status)
            if answer.status >= 500:
                failures.append(f"{name} {answer.status}")
            shown = [gateway.get(f"/admin/windows/{name}{rest}").status for rest in ("", "/messages", "/export")]
            if any(status not in (200, 404) for status in shown) or (answer.status != 201 and shown != [404] * 3):
                failures.append(f"{name} was answered {answer.status} and is shown {shown}")
    listed = gateway.get("/admin/windows").status
    return verdict(
        not failures and listed == 200, *(f"NOT {failure}" for failure in failures[:8]), f"answers {sorted(statuses)}"
    )


@TRIALS.add
def inconsistent_imports(testbed: Testbed) -> Verdict:
    """A truncated, corrupted or inconsistent file is refused and leaves nothing behind"""
    gateway = testbed.gateway(testbed.engine().url)
    model_fingerprint = fingerprint(gateway)
    good = window_file(model_fingerprint)
    files: dict[str, bytes] = {f"cut at {at}": good[:at] for at in range(0, len(good), 397)}
    files |= {
        f"flipped at {at}": good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(0, len(good) - 1024, 211)
    }
    files |= {
        "trailing": good + b"x",
        "token count": window_file(model_fingerprint, token_count=5),
        "chunks": window_file(model_fingerprint, chunk_count=1, chunk_size=1),
        "name": window_file(model_fingerprint, name="../x"),
        "tags": window_file(model_fingerprint, tags=["a b"]),
        "no list": window_file(model_fingerprint, b"{}"),
        "no messages": window_file(model_fingerprint, b"[]"),
        "no role": window_file(model_fingerprint, b'[{"content":"a"}]'),
        "role not text": window_file(model_fingerprint, b'[{"role":1}]'),
        "not utf-8": window_file(model_fingerprint, b'[{"role":"user","content":"\xff"}]'),
        "surrogate": window_file(model_fingerprint, b'[{"role":"user","content":"\\ud800"}]'),
        "frame list": window_file(model_fingerprint, frame=b"[]"),
        "created NaN": window_file(model_fingerprint, created_at=float("nan")),
        "created inf": window_file(model_fingerprint, created_at=float("inf")),
        "escape in session id": window_file(model_fingerprint, session_id="a\x1b]0;x\x07"),
        "newline in session id": window_file(model_fingerprint, session_id="a\r\nb"),
        "escape in parent": window_file(model_fingerprint, parent="\x1b[2J"),
        "escape in lineage": window_file(model_fingerprint, lineage="\x1b[2J"),
    }
    failures = []
    for name, file in files.items():
        answer = gateway.post("/admin/windows/import?window_name=lie", file, TAR)
        if answer.status < 400 or answer.status >= 500:
            failures.append(f"{name}: {answer.status}")
            gateway.delete("/admin/windows/lie")
        elif gateway.get("/admin/windows/lie").status != 404:
            failures.append(f"{name}: refused, but it exists")
    return verdict(not failures, *(f"NOT {failure}" for failure in failures[:8]), f"{len(files)} files")


@TRIALS.add
def imports_leave_disk_space(testbed: Testbed) -> Verdict:
    """An upload stops before it fills the disk that holds the store"""
    with small_disk(testbed.folder / "small", "size=96m") as disk:
        kv = disk / "kv"
        kv.mkdir()
        gateway = testbed.gateway(
            testbed.engine().url, data_dir=disk / "data", disk_reserve_bytes=48 * 2**20, kv_dir=kv,
            cache_url=testbed.enter_context(cache_server()),
        )  # fmt: skip
        model_fingerprint = fingerprint(gateway)
        lowest = [shutil.disk_usage(disk).free]
        big = 2**30
        manifest = window_file(
            model_fingerprint, ids=b"\1\0\0\0" * CHUNK, manifest=lambda m: with_object(m, big, CHUNK)
        )
        end = manifest.index(header(CHECKSUM, 64))
        with gateway.connect(timeout=15) as sock:
            sock.sendall(
                head("POST", "/admin/windows/import?window_name=big", "content-type: application/x-tar", length=2**30)
            )
            sock.sendall(manifest[:end] + header("objects/00000000", big))
            for _ in range(120):
                if send_repeatedly(sock, b"\0" * 2**20, 2**20) < 2**20:
                    break
                lowest.append(shutil.disk_usage(disk).free)
            code = read_reply(sock).json().get("error", {}).get("code", "nothing")
        turn = gateway.chat("after", "hi")
        recorded = wait_for(lambda: bool(gateway.get("/admin/sessions/after").json().get("turns")), 5)
        gateway.close()
        return verdict(
            min(lowest) > 16 * 2**20 and recorded,
            f"at least {min(lowest) >> 20} MB free, answer {code}, a later turn {turn.status}, recorded {recorded}",
        )


@TRIALS.add
def full_disk(testbed: Testbed) -> Verdict:
    """On a full disk no answered turn is lost, deletion works, readiness says so, and it recovers by itself"""
    with small_disk(testbed.folder / "small", "size=24m") as disk:
        gateway = testbed.gateway(testbed.engine().url, data_dir=disk / "data", sweep_every_s=1, engine_check_s=1)
        for number in range(6):
            gateway.chat(f"old-{number}", "hello " * 200)
            gateway.freeze(f"old-{number}", f"old-{number}")
        ballast = disk / "ballast"
        _fill(ballast)
        answers = [gateway.chat(f"full-{n}", f"{n} " + "word " * 3000).status for n in range(40)]
        time.sleep(3)
        _fill(disk / "more")
        not_ready = wait_for(lambda: gateway.get("/readyz").status == 503, 15)
        health = gateway.get("/admin/health").json()
        deleted = [gateway.delete(f"/admin/windows/old-{n}").status for n in range(3)]
        deleted += [gateway.delete(f"/admin/sessions/old-{n}").status for n in range(3)]
        ballast.unlink()
        (disk / "more").unlink()
        ready = wait_for(lambda: gateway.get("/readyz").status == 200, 30)
        answered = [n for n, status in enumerate(answers) if status == 200]
        time.sleep(5)
        lost = [n for n in answered if gateway.get(f"/admin/sessions/full-{n}").status != 200]
        component_states = (
            {name: part.get("status") for name, part in health.get("components", {}).items()}
            if isinstance(health.get("components"), dict)
            else {}
        )
        after = gateway.chat("after", "hi").status
        gateway.close()
    checks = {
        f"no answered turn is lost, not {len(lost)} of {len(answered)}": not lost,
        "not ready while the disk is full": not_ready,
        f"deletion works, not {deleted}": all(status in (200, 404) for status in deleted),
        "ready again by itself": ready,
        "turns work again": after == 200,
    }
    return check_all(
        checks, f"{len(answered)} of {len(answers)} answered, health {component_states or health.get('status')}"
    )


def _fill(file: Path) -> None:
    with file.open("wb", buffering=0) as out:
        for size in (2**20, 4096, 512, 1):
            try:
                while True:
                    out.write(b"x" * size)
            except OSError:
                continue


@TRIALS.add
def file_size_limit(testbed: Testbed) -> Verdict:
    """A file size limit (RLIMIT_FSIZE) ends no process, and earlier text stays readable"""
    gateway = testbed.gateway(testbed.engine().url, {"fsize": str(3 * 2**20)})
    gateway.chat("before", "hi")
    gateway.freeze("before", "before")
    answers = [gateway.chat(f"s{n}", f"{n} " + "word " * 20000).status for n in range(60)]
    shown = gateway.get("/admin/windows/before/messages")
    return check_all(
        {
            "alive": gateway.alive,
            "the window is shown": shown.status == 200,
            "health": gateway.get("/healthz").status == 200,
        },
        f"answers {sorted(set(answers))}",
    )


@TRIALS.add
def two_gateways(testbed: Testbed) -> Verdict:
    """A second gateway on one data directory does not start, and says why"""
    engine = testbed.engine()
    first = testbed.gateway(engine.url)
    second = testbed.unstarted_gateway(engine.url, data_dir=first.data)
    second.spawn()
    ended = wait_for(lambda: not second.alive, 15)
    first.kill()
    again = testbed.unstarted_gateway(engine.url, data_dir=first.data).start()
    return check_all(
        {"it ended": ended, "after a kill the next one starts": again.alive},
        second.log.strip().rpartition("\n")[2][:200] if ended else "both run",
    )


@TRIALS.add
def secrets(testbed: Testbed) -> Verdict:
    """A secret that is lost, replaced, short or world-readable is reported"""
    engine = testbed.engine()
    gateway = testbed.gateway(engine.url)
    gateway.chat("s", "hi")
    gateway.freeze("s", "w")
    gateway.stop()
    secret, unreported = gateway.data / "secret", []
    kept = secret.read_bytes()
    operations: dict[str, Callable[[], object]] = {
        "lost": secret.unlink,
        "replaced": lambda: secret.write_bytes(os.urandom(len(kept))),
        "empty": lambda: secret.write_bytes(b""),
        "readable by all": lambda: secret.chmod(0o666),
    }
    for name, operation in operations.items():
        secret.write_bytes(kept)
        secret.chmod(0o600)
        operation()
        before = len(gateway.log)
        gateway.spawn()
        wait_for(lambda: not gateway.alive or gateway.get("/readyz", timeout=2).status == 200, 20)
        new_log = gateway.log[before:].lower()
        if gateway.alive:
            gateway.stop()
        if "secret" not in new_log:
            unreported.append(name)
    return verdict(
        not unreported, *(f"NOT reported: a secret that is {name}" for name in unreported), f"{len(operations)} secrets"
    )


@TRIALS.add
def damaged_store(testbed: Testbed) -> Verdict:
    """Garbage in the middle of the store is found by the doctor or at start-up"""
    gateway = testbed.gateway(testbed.engine().url)
    for number in range(30):
        gateway.chat(f"s{number}", f"{number} " + os.urandom(3000).hex())
        gateway.freeze(f"s{number}", f"w{number}")
    gateway.stop()
    store = gateway.data / "gateway.db"
    with closing(sqlite3.connect(store)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    raw = bytearray(store.read_bytes())
    for page in range(len(raw) // 4096 // 2, len(raw) // 4096 // 2 + 8):
        raw[page * 4096 : page * 4096 + 64] = b"\xa5" * 64
    store.write_bytes(raw)
    gateway.spawn()
    wait_for(lambda: not gateway.alive or gateway.get("/healthz", timeout=2).status == 200, 20)
    if not gateway.alive:
        last_line = gateway.log.strip().rpartition("\n")[2]
        return verdict("Traceback" not in gateway.log, f"it does not start: {last_line[:200]}")
    doctor = gateway.post("/admin/doctor")
    broken = sum(gateway.get(f"/admin/windows/w{n}/messages").status >= 500 for n in range(30))
    failed = [check["name"] for check in doctor.json().get("checks", ()) if check["status"] == "failed"]
    reported = doctor.status != 200 or "store" in failed
    return verdict(reported, f"doctor {doctor.status}, failed: {failed}, {broken} of 30 windows cannot be read")


@TRIALS.add
def file_modes(testbed: Testbed) -> Verdict:
    """Conversations are readable by the owner alone: data directory, store, secret, an exported window"""
    gateway = testbed.gateway(testbed.engine().url)
    gateway.chat("s", "hi")
    gateway.freeze("s", "w")
    target = testbed.folder / "w.cwg"
    old = os.umask(0o022)
    try:
        exported = gateway.run_cli("export", "w", str(target))
    finally:
        os.umask(old)
    files = [gateway.data, target, *(file for file in gateway.data.rglob("*") if file.is_file())]
    readable = [
        file.name
        for file in files
        if file.exists() and file.stat().st_mode & 0o077 and gateway.data.stat().st_mode & 0o077 | (file == target)
    ]
    return verdict(
        not readable and exported.returncode == 0, *(f"NOT {name}" for name in readable), f"{len(files)} files"
    )
