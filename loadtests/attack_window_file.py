"""Window files built byte by byte, so that they can be inconsistent while their own checksums match."""

import json
import tarfile
from collections.abc import Callable, Mapping
from typing import Any

from blake3 import blake3

from loadtests.attack_gateway import Gateway

TAR = {"content-type": "application/x-tar"}
BLOCK = tarfile.BLOCKSIZE
CHECKSUM = "checksum.blake3"
_TEXTS = ("transcript.json", "frame.json", "token_ids.u32")
_RECORD: Mapping[str, Any] = {
    "name": "w", "session_id": "s", "lineage": "l", "model": "demo", "model_root": "org/demo", "fingerprint": "",
    "world_size": 1, "token_count": 4, "chunk_size": 0, "chunk_count": 0, "created_at": 1.0, "description": "",
    "tags": [], "parent": None, "receipt": {},
}  # fmt: skip
_TALK = b'[{"role":"user","content":"hi"},{"role":"assistant","content":"there"}]'


def window_file(
    fingerprint: str, transcript: bytes = _TALK, frame: bytes = b"{}", ids: bytes = b"\1\0\0\0" * 4,
    manifest: Callable[[bytes], bytes] = bytes, **record: Any,
) -> bytes:  # fmt: skip
    """Build a window file; `manifest` rewrites the manifest's bytes, `record` overrides fields of the window record."""
    texts = (transcript, frame, ids)
    members = [{"size": len(text), "blake3": blake3(text).hexdigest()} for text in texts]
    window = {**_RECORD, "fingerprint": fingerprint, "token_count": len(ids) // 4, **record}
    first = {"format": "cwg-window", "version": 1, "window": window, "texts": members, "objects": []}
    body = member("manifest.json", manifest(json.dumps(first).encode()))
    body += b"".join(member(name, text) for name, text in zip(_TEXTS, texts, strict=True))
    return body + member(CHECKSUM, blake3(body).hexdigest().encode()) + bytes(2 * BLOCK)


def header(name: str, size: int) -> bytes:
    """Return the tar header of a member."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def member(name: str, data: bytes) -> bytes:
    """Return a tar member, padded to full blocks."""
    return header(name, len(data)) + data + bytes(-len(data) % BLOCK)


def with_object(manifest: bytes, size: int, chunk_size: int) -> bytes:
    """Return the manifest with one KV object of `size` bytes announced."""
    value = json.loads(manifest)
    value["objects"] = [{"size": size, "blake3": "0" * 64}]
    value["window"] |= {"chunk_count": 1, "chunk_size": chunk_size}
    return json.dumps(value).encode()


def fingerprint(gateway: Gateway) -> str:
    """Return the gateway's fingerprint of its model, read from a window it exported."""
    gateway.chat("own", "hi")
    gateway.freeze("own", "own")
    file = gateway.get("/admin/windows/own/export").body
    size = int(file[124:135], 8)
    return str(json.loads(file[BLOCK : BLOCK + size])["window"]["fingerprint"])
