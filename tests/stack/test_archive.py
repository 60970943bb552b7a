"""A window is exported, deleted with everything it had, and imported: on the real engine and cache."""

import pytest

from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat, converse

pytestmark = pytest.mark.stack

CHUNK = 64
QUESTION = {"role": "user", "content": "And then?"}


def test_an_imported_window_hits_every_whole_chunk_and_continues_as_before(stack: Stack, own: Gateway) -> None:
    messages = converse(own.client("travels"), "A window on its way to another harness")
    frozen = own.freeze("travels", "travels")
    chunks = frozen["receipt"]["chunks"]
    assert chunks > 2
    # As the import will be: whole chunks loaded under its own salt, the tail computed in one go. How many tokens
    # are computed together decides the last bits, and a near tie between two tokens with them.
    clone = {"target_window": "stays", "isolate": True}
    assert own.http.post("/admin/windows/travels/clone", json=clone).status_code == 201
    control_session = own.thaw("stays", warm="gpu")["session_id"]
    control = chat(own.client(control_session), [*messages, QUESTION])
    blocks = own.http.get("/admin/windows/travels?include_blocks=true").json()["blocks"]
    hashes = [block["hash"] for block in blocks]
    assert len(hashes) == chunks
    before = own.thaw("travels")
    exported = own.http.get("/admin/windows/travels/export")
    assert exported.status_code == 200
    for session in ("travels", before["session_id"], control_session):
        assert own.http.delete(f"/admin/sessions/{session}").status_code == 200
    assert own.http.delete("/admin/windows/stays").status_code == 200
    assert own.http.delete("/admin/windows/travels").json()["blocks_deleted"] == chunks
    salt = before["cache_salt"]
    for digest in hashes:
        assert not list(stack.kv_dir.glob(f"*{digest}@{salt}*"))
        assert not stack.redis.keys(f"*{digest}@{salt}*")

    imported = own.http.post("/admin/windows/import", content=exported.content)
    assert imported.status_code == 201, imported.text
    assert (imported.json()["kv"], imported.json()["warnings"]) == ("complete", [])
    thawed = own.thaw("travels", warm="gpu")
    assert thawed["cache_salt"] != salt
    receipt = thawed["receipt"]
    assert receipt["chunks_found"] == receipt["chunks_expected"] == chunks
    assert receipt["cached_tokens"] == chunks * CHUNK
    assert not receipt["partial"]
    answer = chat(own.client(thawed["session_id"]), [QUESTION])
    assert answer.choices[0].message.content == control.choices[0].message.content
    assert answer.usage.prompt_tokens == control.usage.prompt_tokens


def test_a_window_moves_to_a_gateway_with_another_secret(stack: Stack, own: Gateway, shared: Gateway) -> None:
    converse(own.client("moves"), "A window for a gateway that never saw it")
    chunks = own.freeze("moves", "moves")["receipt"]["chunks"]
    file = own.http.get("/admin/windows/moves/export").content
    moved = shared.http.post("/admin/windows/import?window_name=moved", content=file)
    assert moved.status_code == 201, moved.text
    receipt = shared.thaw("moved", warm="gpu")["receipt"]
    assert receipt["cached_tokens"] == chunks * CHUNK
