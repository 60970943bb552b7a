"""LMCache's object keys, computed from token ids.

Facts (lmcache 0.5.6): a chunk's hash is a rolling blake3 over the chunk before it and its own token ids as big-endian
uint32, beginning with the hash of (0 as int64, 0 as uint32) (`v1/multiprocess/token_hasher.py`); the salt, the
`--model` string and the rank are fields of the key (`v1/distributed/api.py`), not part of the hash; the file name and
the Redis key spell the same fields differently (`l2_adapters/fs_l2_adapter.py`, `native_connector_l2_adapter.py`).
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

_ROOT = blake3((0).to_bytes(8, "big", signed=True) + struct.pack(">I", 0)).digest()
DISK_SUFFIX = ".data"
_HASH_CHARS = 64


@dataclass(frozen=True, slots=True)
class ObjectKey:
    """Names one KV object: one chunk of one rank under one salt."""

    model: str
    rank: int
    group: int
    chunk_hash: str
    salt: str

    def __str__(self) -> str:
        """The key in Redis; also how the gateway's store spells it. One without a salt ends with the hash."""
        name = f"{self.model}@{self.rank:08x}@{self.group:x}@{self.chunk_hash}"
        return f"{name}@{self.salt}" if self.salt else name

    @classmethod
    def parse(cls, text: str) -> "ObjectKey":
        """Parse what `str` wrote."""
        *start, rank, group, chunk_hash, salt = text.rsplit("@", 4)
        if len(chunk_hash) != _HASH_CHARS:  # no salt: what looks like one is the hash
            *start, rank, group, chunk_hash, salt = *text.rsplit("@", 3), ""
        (model,) = start
        return cls(model, int(rank, 16), int(group, 16), chunk_hash, salt)

    @property
    def file_name(self) -> str:
        """The name in LMCache's disk tier."""
        name = f"{self.model.replace('/', '-SEP-')}@0x{self.rank:08x}@{self.group:x}@{self.chunk_hash}"
        return f"{name}@{self.salt}{DISK_SUFFIX}" if self.salt else f"{name}{DISK_SUFFIX}"

    @classmethod
    def parse_file_name(cls, name: str) -> "ObjectKey | None":
        """Parse a `file_name`; None for any other name.

        A model called `a-SEP-b` comes back as `a/b`: LMCache gives both the same name.
        """
        if not name.endswith(DISK_SUFFIX):
            return None
        return cls.parse_or_none(name.removesuffix(DISK_SUFFIX).replace("-SEP-", "/"))

    @classmethod
    def parse_or_none(cls, text: str) -> "ObjectKey | None":
        """Parse what others may have written; None if it is not a key."""
        try:
            key = cls.parse(text)
        except ValueError:
            return None
        return key if len(key.chunk_hash) == _HASH_CHARS else None

    @property
    def address(self) -> tuple[int, int, str, str]:
        """The key without its model, which a file name does not determine."""
        return self.rank, self.group, self.chunk_hash, self.salt

    def wire(self) -> dict[str, Any]:
        """The key as LMCache's HTTP interface takes it."""
        return {
            "chunk_hash_hex": self.chunk_hash,
            "model_name": self.model,
            "kv_rank": self.rank,
            "object_group_id": self.group,
            "cache_salt": self.salt,
        }


def file_names(names: Iterable[str]) -> list[str]:
    """The names in LMCache's disk tier of keys that are spelled as `str` writes them."""
    found: list[str] = []
    model = disk_model = ""
    for name in names:  # thousands, of one model: comparing its name is quicker than looking it up
        its_model, rank, group, digest, salt = name.rsplit("@", 4)
        if its_model != model:
            model, disk_model = its_model, its_model.replace("/", "-SEP-")
        found.append(f"{disk_model}@0x{rank}@{group}@{digest}@{salt}{DISK_SUFFIX}")
    return found


def with_salt(name: str, salt: str) -> str:
    """The key of the same chunk with another salt, both spelled as `str` writes them."""
    return f"{name[: name.rindex('@')]}@{salt}"


def chunk_hashes(token_ids: Sequence[int], chunk_size: int) -> Iterator[str]:
    """Yield the hash of every whole chunk of `token_ids`, as 64 hex characters."""
    pack = struct.Struct(f">{chunk_size}I").pack
    rolling = _ROOT
    for start in range(0, len(token_ids) - chunk_size + 1, chunk_size):
        rolling = blake3(rolling + pack(*token_ids[start : start + chunk_size])).digest()
        yield rolling.hex()


def ranks(world_size: int) -> list[int]:
    """The `kv_rank` of every worker of a tensor-parallel engine on one node."""
    return [world_size << 24 | rank << 16 | world_size << 8 | rank for rank in range(world_size)]


def object_keys(model: str, token_ids: Sequence[int], chunk_size: int, world_size: int, salt: str) -> list[ObjectKey]:
    """Return the keys of all whole chunks of `token_ids`, in chunk order, the ranks of a chunk side by side."""
    workers = ranks(world_size)
    return [
        ObjectKey(model, rank, 0, digest, salt) for digest in chunk_hashes(token_ids, chunk_size) for rank in workers
    ]
