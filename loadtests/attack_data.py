"""What lies on disk: imports that lie, a full disk, secrets, a damaged store, two gateways in one directory."""

import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from loadtests.attack_file import CHECKSUM, TAR, fingerprint, header, window_file, with_object
from loadtests.attack_rig import (
    Effect,
    Gateway,
    Ground,
    Trials,
    Verdict,
    effect,
    first_false,
    head,
    pour,
    read_reply,
    verdict,
    wait_for,
)
from tests.support.harness import CHUNK, cache_server
from tests.support.tier_harness import small_disk

TRIALS = Trials()


def _bring(gateway: Gateway, file: bytes, name: str = "") -> Effect:
    query = f"?window_name={name}" if name else ""
    path = f"/admin/windows/import{query}"

    def send() -> str:
        answer = gateway.post(path, file, TAR, timeout=60)
        return f"{answer.status} {answer.json().get('error', {}).get('code', '')}".strip()

    return effect(gateway, send, len(file), give_up_s=15)


_SIZE = 26 * 2**20


def _list_of(unit: bytes) -> bytes:
    return b"[" + b",".join([unit] * (_SIZE // (len(unit) + 1))) + b"]"


def _members(manifest: bytes) -> bytes:
    one = b'{"size":1,"blake3":"' + b"0" * 64 + b'"}'
    return manifest.replace(b'"objects": []', b'"objects": ' + _list_of(one))


_OF_MANY: Mapping[str, Callable[[str], bytes]] = {
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
def imports_of_many(ground: Ground) -> Verdict:
    """A window file of 26 MB with a million messages, members, ids, tags or keys keeps nobody waiting"""
    engine = ground.engine()
    seen: dict[str, Effect] = {}
    gateway = ground.gateway(engine.url)
    print_of = fingerprint(gateway)
    for number, (name, shape) in enumerate(_OF_MANY.items()):
        if not gateway.alive or gateway.memory() > 500 * 2**20:
            gateway.close()
            gateway = ground.gateway(engine.url, model_fingerprint="")
            print_of = fingerprint(gateway)
        file = shape(print_of)
        seen[name] = _bring(gateway, file, f"w{number}")
        if not seen[name].in_bounds and seen[name].pause_ms < 1000 and gateway.alive:
            gateway.close()
            gateway = ground.gateway(engine.url)
            seen[name] = min(seen[name], _bring(gateway, file, f"x{number}"), key=lambda one: one.pause_ms)
    wrong = {name: one for name, one in seen.items() if not one.in_bounds or one.answer.startswith("500")}
    most = max(seen.values(), key=lambda one: one.pause_ms)
    return verdict(not wrong, *(f"NOT {name}: {one}" for name, one in wrong.items()), f"longest: {most}")


def _deep(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


@TRIALS.add
def imports_nested(ground: Ground) -> Verdict:
    """A file nested deeply is refused, or can be shown, thawed and exported again: no 500, nothing half"""
    gateway = ground.gateway(ground.engine().url)
    print_of = fingerprint(gateway)
    wrong, statuses = [], set()
    for depth in (60, 120, 200, 249, 250, 251, 252, 253, 254, 300, 1000, 1023):
        files = {
            "transcript": window_file(print_of, f'[{{"role":"user","content":{_deep(depth)}}}]'.encode()),
            "frame": window_file(print_of, frame=f'{{"tools":{_deep(depth)}}}'.encode()),
            "receipt": window_file(
                print_of,
                manifest=lambda m, d=depth: m.replace(b'"receipt": {}', f'"receipt": {{"a":{_deep(d)}}}'.encode()),
            ),  # type: ignore[misc]
        }
        for where, file in files.items():
            name = f"{where}-{depth}"
            answer = gateway.post(f"/admin/windows/import?window_name={name}", file, TAR)
            statuses.add(answer.status)
            if answer.status >= 500:
                wrong.append(f"{name} {answer.status}")
            shown = [gateway.get(f"/admin/windows/{name}{rest}").status for rest in ("", "/messages", "/export")]
            if any(status not in (200, 404) for status in shown) or (answer.status != 201 and shown != [404] * 3):
                wrong.append(f"{name} was answered {answer.status} and is shown {shown}")
    listed = gateway.get("/admin/windows").status
    return verdict(not wrong and listed == 200, *(f"NOT {each}" for each in wrong[:8]), f"answers {sorted(statuses)}")


@TRIALS.add
def imports_that_lie(ground: Ground) -> Verdict:
    """A file that is cut, flipped, or lies about itself is refused and leaves nothing"""
    gateway = ground.gateway(ground.engine().url)
    print_of = fingerprint(gateway)
    good = window_file(print_of)
    lies: dict[str, bytes] = {f"cut at {at}": good[:at] for at in range(0, len(good), 397)}
    lies |= {
        f"flipped at {at}": good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(0, len(good) - 1024, 211)
    }
    lies |= {
        "trailing": good + b"x",
        "token count": window_file(print_of, token_count=5),
        "chunks": window_file(print_of, chunk_count=1, chunk_size=1),
        "name": window_file(print_of, name="../x"),
        "tags": window_file(print_of, tags=["a b"]),
        "no list": window_file(print_of, b"{}"),
        "no messages": window_file(print_of, b"[]"),
        "no role": window_file(print_of, b'[{"content":"a"}]'),
        "role not text": window_file(print_of, b'[{"role":1}]'),
        "not utf-8": window_file(print_of, b'[{"role":"user","content":"\xff"}]'),
        "surrogate": window_file(print_of, b'[{"role":"user","content":"\\ud800"}]'),
        "frame list": window_file(print_of, frame=b"[]"),
        "created NaN": window_file(print_of, created_at=float("nan")),
        "created inf": window_file(print_of, created_at=float("inf")),
        "escape in session id": window_file(print_of, session_id="a\x1b]0;x\x07"),
        "newline in session id": window_file(print_of, session_id="a\r\nb"),
        "escape in parent": window_file(print_of, parent="\x1b[2J"),
        "escape in lineage": window_file(print_of, lineage="\x1b[2J"),
    }
    wrong = []
    for name, file in lies.items():
        answer = gateway.post("/admin/windows/import?window_name=lie", file, TAR)
        if answer.status < 400 or answer.status >= 500:
            wrong.append(f"{name}: {answer.status}")
            gateway.delete("/admin/windows/lie")
        elif gateway.get("/admin/windows/lie").status != 404:
            wrong.append(f"{name}: refused and there")
    return verdict(not wrong, *(f"NOT {each}" for each in wrong[:8]), f"{len(lies)} files")


@TRIALS.add
def imports_fill_no_disk(ground: Ground) -> Verdict:
    """An upload stops before it fills the disk that the store lies on"""
    with small_disk(ground.folder / "small", "size=96m") as disk:
        kv = disk / "kv"
        kv.mkdir()
        gateway = ground.gateway(
            ground.engine().url, data_dir=disk / "data", disk_reserve_bytes=48 * 2**20, kv_dir=kv,
            cache_url=ground.enter(cache_server()),
        )  # fmt: skip
        print_of = fingerprint(gateway)
        lowest = [shutil.disk_usage(disk).free]
        big = 2**30
        manifest = window_file(print_of, ids=b"\1\0\0\0" * CHUNK, manifest=lambda m: with_object(m, big, CHUNK))
        end = manifest.index(header(CHECKSUM, 64))
        with gateway.wire(timeout=15) as sock:
            sock.sendall(
                head("POST", "/admin/windows/import?window_name=big", "content-type: application/x-tar", length=2**30)
            )
            sock.sendall(manifest[:end] + header("objects/00000000", big))
            for _ in range(120):
                if pour(sock, b"\0" * 2**20, 2**20) < 2**20:
                    break
                lowest.append(shutil.disk_usage(disk).free)
            said = read_reply(sock).json().get("error", {}).get("code", "nothing")
        turn = gateway.chat("after", "hi")
        recorded = wait_for(lambda: bool(gateway.get("/admin/sessions/after").json().get("turns")), 5)
        gateway.close()
        return verdict(
            min(lowest) > 16 * 2**20 and recorded,
            f"{min(lowest) >> 20} MB stayed free, answered {said}, a turn after it {turn.status}, kept {recorded}",
        )


@TRIALS.add
def disk_full(ground: Ground) -> Verdict:
    """On a full disk no answered turn is lost, deletion works, readiness says so, and it goes on by itself"""
    with small_disk(ground.folder / "small", "size=24m") as disk:
        gateway = ground.gateway(ground.engine().url, data_dir=disk / "data", sweep_every_s=1, engine_check_s=1)
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
        states = (
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
        "turns go on": after == 200,
    }
    return first_false(checks, f"{len(answered)} of {len(answers)} answered, health {states or health.get('status')}")


def _fill(file: Path) -> None:
    with file.open("wb", buffering=0) as out:
        for size in (2**20, 4096, 512, 1):
            try:
                while True:
                    out.write(b"x" * size)
            except OSError:
                continue


@TRIALS.add
def file_size_limit(ground: Ground) -> Verdict:
    """A limit on the size of files (RLIMIT_FSIZE) ends no process, and what was said before can be read"""
    gateway = ground.gateway(ground.engine().url, {"fsize": str(3 * 2**20)})
    gateway.chat("before", "hi")
    gateway.freeze("before", "before")
    answers = [gateway.chat(f"s{n}", f"{n} " + "word " * 20000).status for n in range(60)]
    shown = gateway.get("/admin/windows/before/messages")
    return first_false(
        {
            "alive": gateway.alive,
            "the window is shown": shown.status == 200,
            "health": gateway.get("/healthz").status == 200,
        },
        f"answers {sorted(set(answers))}",
    )


@TRIALS.add
def two_gateways(ground: Ground) -> Verdict:
    """A second gateway on one data directory does not start, and says why"""
    engine = ground.engine()
    first = ground.gateway(engine.url)
    second = ground.idle(engine.url, data_dir=first.data)
    second.launch()
    ended = wait_for(lambda: not second.alive, 15)
    first.kill()
    again = ground.idle(engine.url, data_dir=first.data).start()
    return first_false(
        {"it ended": ended, "after a kill the next one starts": again.alive},
        second.log.strip().rpartition("\n")[2][:200] if ended else "both run",
    )


@TRIALS.add
def secrets(ground: Ground) -> Verdict:
    """A secret that is lost, replaced, short, or open to everybody is not passed over in silence"""
    engine = ground.engine()
    gateway = ground.gateway(engine.url)
    gateway.chat("s", "hi")
    gateway.freeze("s", "w")
    gateway.stop()
    secret, quiet = gateway.data / "secret", []
    kept = secret.read_bytes()
    deeds: dict[str, Callable[[], object]] = {
        "lost": secret.unlink,
        "replaced": lambda: secret.write_bytes(os.urandom(len(kept))),
        "empty": lambda: secret.write_bytes(b""),
        "readable by all": lambda: secret.chmod(0o666),
    }
    for name, deed in deeds.items():
        secret.write_bytes(kept)
        secret.chmod(0o600)
        deed()
        before = len(gateway.log)
        gateway.launch()
        wait_for(lambda: not gateway.alive or gateway.get("/readyz", timeout=2).status == 200, 20)
        said = gateway.log[before:].lower()
        if gateway.alive:
            gateway.stop()
        if "secret" not in said:
            quiet.append(name)
    return verdict(not quiet, *(f"NOT a word of a secret that is {name}" for name in quiet), f"{len(deeds)} secrets")


@TRIALS.add
def damaged_store(ground: Ground) -> Verdict:
    """Garbage in the middle of the store is found by the doctor or at the start"""
    gateway = ground.gateway(ground.engine().url)
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
    gateway.launch()
    wait_for(lambda: not gateway.alive or gateway.get("/healthz", timeout=2).status == 200, 20)
    if not gateway.alive:
        said = gateway.log.strip().rpartition("\n")[2]
        return verdict("Traceback" not in gateway.log, f"it does not start: {said[:200]}")
    doctor = gateway.post("/admin/doctor")
    broken = sum(gateway.get(f"/admin/windows/w{n}/messages").status >= 500 for n in range(30))
    said = doctor.status != 200 or not doctor.json().get("ok", True)
    return verdict(said, f"doctor {doctor.status} ok={doctor.json().get('ok')}, {broken} of 30 windows cannot be read")


@TRIALS.add
def file_modes(ground: Ground) -> Verdict:
    """What people said is for the owner alone: data directory, store, secret, an exported window"""
    gateway = ground.gateway(ground.engine().url)
    gateway.chat("s", "hi")
    gateway.freeze("s", "w")
    target = ground.folder / "w.cwg"
    old = os.umask(0o022)
    try:
        done = gateway.cli("export", "w", str(target))
    finally:
        os.umask(old)
    files = [gateway.data, target, *(file for file in gateway.data.rglob("*") if file.is_file())]
    open_ = [
        file.name
        for file in files
        if file.exists() and file.stat().st_mode & 0o077 and gateway.data.stat().st_mode & 0o077 | (file == target)
    ]
    return verdict(not open_ and done.returncode == 0, *(f"NOT {name}" for name in open_), f"{len(files)} files")
