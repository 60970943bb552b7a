"""Salts: what keeps one conversation's KV apart from another's, in every tier.

vLLM folds `cache_salt` into the hash of a prompt's first block, and `LMCacheMPConnector` makes it a field of every
object key, so two salts never share a KV byte. It is keyed (HMAC-SHA256) so that no client can choose or guess it,
and it takes in the model's fingerprint because LMCache's keys hold the `--model` string but not the weights behind it.
"""

import hmac
import secrets
from functools import lru_cache
from pathlib import Path

from gateway.errors import StartError

VERSION = b"cwg1"
SALT_CHARS = 32  # hex: no `@ / \\ NUL`, which vLLM refuses, and short enough for LMCache's file names


@lru_cache(4096)  # every turn of a session asks for the same
def salt(secret: bytes, tenant: str, scope: str, fingerprint: str, client_salt: str = "") -> str:
    """Return the `cache_salt` of `scope` (a lineage, or a whole tenant) under the model with `fingerprint`.

    `client_salt` is what the client itself sent as `cache_salt`: it still separates what the client meant to separate.
    """
    fields = (tenant, scope, fingerprint, client_salt)
    # Length prefixes: ("ab", "c") and ("a", "bc") must not meet.
    text = VERSION + b"".join(len(raw).to_bytes(4, "big") + raw for raw in (f.encode() for f in fields))
    return hmac.digest(secret, text, "sha256").hex()[:SALT_CHARS]


def mark(secret: bytes, store_id: str) -> str:
    """Return by what a store knows its secret again; it tells nothing about the secret itself."""
    return hmac.digest(secret, b"cwg-store\0" + store_id.encode(), "sha256").hex()


def read_secret(path: Path) -> bytes:
    """Return the secret in `path`, made on first use (mode 0600). Raises StartError.

    Losing it loses no text, but every window's KV: new salts will not find it.
    """
    try:
        return _read_secret(path)
    except OSError as error:
        raise StartError(f"secret_file {path} cannot be read or made: {error.strerror}") from error


def _read_secret(path: Path) -> bytes:
    try:
        value = path.read_bytes().strip()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        fresh.touch(mode=0o600)
        fresh.write_text(secrets.token_hex(32))
        try:
            path.hardlink_to(fresh)  # unlike a rename, it leaves the secret of a gateway that was faster
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
        value = path.read_bytes().strip()
    if len(value) < 32:
        raise StartError(f"secret_file {path} holds {len(value)} characters; a secret has at least 32")
    return value
