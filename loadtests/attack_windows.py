"""What has to be true of every window that a gateway has acknowledged, whatever happened since."""

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

from loadtests.attack_harness import Gateway

_NUMBERS = count()


def list_windows(gateway: Gateway) -> list[dict[str, Any]]:
    """Return every window of the gateway."""
    windows: list[dict[str, Any]] = []
    while True:
        page = gateway.get(f"/admin/windows?limit=100&offset={len(windows)}").json()
        windows += page.get("windows", [])
        if not page.get("has_more"):
            return windows


def find_faults(gateway: Gateway, names: Iterable[str]) -> list[str]:
    """Check the text, the checksums, a thaw and an export with its import; one line for each fault."""
    return [f"{name}: {fault}" for name in names for fault in _faults_of(gateway, name)]


def _faults_of(gateway: Gateway, name: str) -> list[str]:
    faults = []
    transcript = gateway.get(f"/admin/windows/{name}/messages")
    messages = transcript.json().get("messages", [])
    if transcript.status != 200 or not messages:
        faults.append(f"messages: {transcript.status}, {len(messages)} returned")
    verified = gateway.post(f"/admin/windows/{name}/verify")
    verdict = verified.json()
    if verified.status != 200 or verdict.get("ok") is not (verdict.get("kv") != "absent"):
        faults.append(f"verify {verified.status} ok={verdict.get('ok')} kv={verdict.get('kv')}")
    thawed = gateway.post(f"/admin/windows/{name}/thaw")
    if thawed.status != 200:
        faults.append(f"thaw {thawed.status}")
    else:
        gateway.delete(f"/admin/sessions/{thawed.json()['session_id']}")
    return faults + _round_trip_faults(gateway, name, messages)


def _round_trip_faults(gateway: Gateway, name: str, messages: Sequence[object]) -> list[str]:
    file = gateway.get(f"/admin/windows/{name}/export")
    if file.status != 200:
        return [f"export {file.status}"]
    copy = f"copy-{next(_NUMBERS)}"
    imported = gateway.post(
        f"/admin/windows/import?window_name={copy}", file.body, {"content-type": "application/x-tar"}
    )
    if imported.status != 201:
        return [f"import of its export {imported.status} {imported.body[:120]!r}"]
    copied = gateway.get(f"/admin/windows/{copy}/messages").json().get("messages")
    gateway.delete(f"/admin/windows/{copy}")
    return [] if copied == messages else ["its export has a different text"]
