"""Salts keep the KV of conversations apart in every tier; they are made with a secret, which the store remembers.

vLLM folds `cache_salt` into the hash of a prompt's first block, and `LMCacheMPConnector` makes it a field of every
object key, so two salts never share a KV byte. It is keyed (HMAC-SHA256) so that no client can choose or guess it,
and it includes the model's fingerprint because LMCache's keys hold the `--model` string but not the weights behind it.
"""

import hmac
import logging
import os
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from gateway.errors import StartError
from gateway.settings import Settings
from gateway.store.store import Store
from gateway.store.types import Peer, StoreUnavailable

log = logging.getLogger(__name__)

ISOLATED = "isolated/"  # begins the lineage of an isolated clone; no session id has a slash, so no other does
_VERSION = b"cwg1"
_SALT_CHARS = 32  # hex: no `@ / \\ NUL`, which vLLM refuses, and short enough for LMCache's file names


@dataclass(frozen=True, slots=True)
class SaltRule:
    """How salts are made: the secret, and whether a lineage or a whole tenant shares one."""

    secret: bytes
    per_tenant: bool

    def of(self, tenant: str, lineage: str, fingerprint: str, client_salt: str = "") -> str:
        """Return the salt of a lineage; an isolated one never shares its tenant's."""
        shared = self.per_tenant and not lineage.startswith(ISOLATED)
        return salt(self.secret, tenant, "" if shared else lineage, fingerprint, client_salt)


@lru_cache(4096)  # every turn of a session asks for the same
def salt(secret: bytes, tenant: str, scope: str, fingerprint: str, client_salt: str = "") -> str:
    """Return the `cache_salt` of `scope` (a lineage, or a whole tenant) under the model with `fingerprint`.

    `client_salt` is the `cache_salt` that the client sent: it still separates what the client meant to separate.
    """
    fields = [field.encode() for field in (tenant, scope, fingerprint, client_salt)]
    # Length prefixes: ("ab", "c") and ("a", "bc") must not meet.
    text = _VERSION + b"".join([len(field).to_bytes(4, "big") + field for field in fields])
    return hmac.digest(secret, text, "sha256").hex()[:_SALT_CHARS]


def read_secret(path: Path) -> bytes:
    """Return the secret in `path`, made on first use (mode 0600). Raises StartError.

    If it is lost, so is the KV of every window (not its text): new salts will not find it.
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


def is_exposed(about: os.stat_result) -> bool:
    """Whether others can read or change a secret. One that is not our own file may be read by our group.

    A Secret of Kubernetes is a file of root's, which a process of another user can only read by its group (`fsGroup`).
    """
    return bool(about.st_mode & (0o077 if about.st_uid == os.geteuid() else 0o027))


async def checked_secret(settings: Settings, store: Store, peers: Collection[Peer] = ()) -> bytes:
    """Return the secret, made on first use. Raises StartError if it is not the one that the store was used with, or
    that the other gateways on the store, `peers`, use."""
    path = settings.secret_path
    known_mark, in_use = await store.known_secret()
    shared = bool(peers) and known_mark is not None
    if not path.exists() and (shared or (in_use and not settings.accept_new_secret)):
        raise _refusal(settings, "is missing", peers)
    secret = read_secret(path)
    if is_exposed(path.stat()):
        log.warning("secret_file %s can be read by others: chmod 600 it", path)
    # The mark tells nothing about the secret itself.
    mark = hmac.digest(secret, b"cwg-store\0" + store.store_id.encode(), "sha256").hex()
    if known_mark == mark:
        return secret
    if known_mark is not None and (in_use or shared):
        if shared or not settings.accept_new_secret:
            raise _refusal(settings, "is not the one that the store was used with", peers)
        log.warning(
            "the secret differs from the store's (accept_new_secret): KV stored under the old one will not be found"
        )
    try:
        if await store.remember_secret(mark, known_mark) != mark:
            raise _refusal(settings, "is not the one of the gateway that has just started on the same store", peers)
    except StoreUnavailable as error:  # the gateway starts with a full disk, too: it is recorded next time
        log.warning("the store could not record its secret: %s", error.message)
    return secret


def _refusal(settings: Settings, what: str, peers: Collection[Peer] = ()) -> StartError:
    if peers:
        hosts = ", ".join(sorted({peer.host for peer in peers}))
        return StartError(
            f"secret_file {settings.secret_path} {what}, and other gateways use the store (on {hosts}): they would not "
            "find each other's KV; give all of them the same secret"
        )
    store = settings.store_path or "the store"
    return StartError(
        f"secret_file {settings.secret_path} {what}: the KV of {store} would not be found again; "
        "restore the secret from a backup, or set accept_new_secret=true to start with another one"
    )
