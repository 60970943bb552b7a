"""What has to be true of every window that a gateway has acknowledged, whatever happened meanwhile."""

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

from loadtests.attack_rig import Gateway

_NUMBERS = count()


def listed(gateway: Gateway) -> list[dict[str, Any]]:
    """Every window."""
    found: list[dict[str, Any]] = []
    while True:
        page = gateway.get(f"/admin/windows?limit=100&offset={len(found)}").json()
        found += page.get("windows", [])
        if not page.get("has_more"):
            return found


def faults(gateway: Gateway, names: Iterable[str]) -> list[str]:
    """What is not as it should be: text, checksums, a thaw, an export that comes back; one line each."""
    return [f"{name}: {fault}" for name in names for fault in _faults_of(gateway, name)]


def _faults_of(gateway: Gateway, name: str) -> list[str]:
    wrong = []
    said = gateway.get(f"/admin/windows/{name}/messages")
    messages = said.json().get("messages", [])
    if said.status != 200 or not messages:
        wrong.append(f"messages {said.status}, {len(messages)} of them")
    verified = gateway.post(f"/admin/windows/{name}/verify")
    if verified.status != 200 or not verified.json().get("ok"):
        wrong.append(f"verify {verified.status} ok={verified.json().get('ok')}")
    thawed = gateway.post(f"/admin/windows/{name}/thaw")
    if thawed.status != 200:
        wrong.append(f"thaw {thawed.status}")
    else:
        gateway.delete(f"/admin/sessions/{thawed.json()['session_id']}")
    return wrong + _travel(gateway, name, messages)


def _travel(gateway: Gateway, name: str, messages: Sequence[object]) -> list[str]:
    file = gateway.get(f"/admin/windows/{name}/export")
    if file.status != 200:
        return [f"export {file.status}"]
    copy = f"copy-{next(_NUMBERS)}"
    back = gateway.post(f"/admin/windows/import?window_name={copy}", file.body, {"content-type": "application/x-tar"})
    if back.status != 201:
        return [f"import of its export {back.status} {back.body[:120]!r}"]
    there = gateway.get(f"/admin/windows/{copy}/messages").json().get("messages")
    gateway.delete(f"/admin/windows/{copy}")
    return [] if there == messages else ["its export has another text"]
