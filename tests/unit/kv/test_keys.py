"""Object keys: known vectors, their two spellings, and LMCache's own functions where LMCache is installed."""

import json
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise

import pytest

from gateway.kv.keys import ObjectKey, chunk_hashes, object_keys, ranks
from gateway.kv.lmcache import ENCRYPTING_SERDE

TOKENS = list(range(600))
HASH = "084547b6c40ed5b0"
KEY = ObjectKey("org/some-model", 0x02010200, 0, "ab" * 32, "5a17")

# Prints what LMCache itself makes of the same tokens and keys.
LMCACHE = """
import json, logging, sys
logging.disable(logging.CRITICAL)
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import _object_key_to_filename
from lmcache.v1.distributed.l2_adapters.native_connector_l2_adapter import _object_key_to_string
from lmcache.v1.distributed.serde.base import SerdeConfig
from lmcache.v1.multiprocess.token_hasher import TokenHasher
asked = json.load(sys.stdin)
hashes = [[TokenHasher.hash_to_bytes(h).hex() for h in TokenHasher(size).compute_chunk_hashes(tokens)]
          for tokens, size in asked["chunks"]]
keys = [ObjectKey(bytes.fromhex(h), model, rank, group, salt) for model, rank, group, h, salt in asked["keys"]]
kv_ranks = [[ObjectKey.ComputeKVRank(world_size=w, global_rank=r, local_world_size=w, local_rank=r) for r in range(w)]
            for w in asked["worlds"]]
files, strings = [_object_key_to_filename(k) for k in keys], [_object_key_to_string(k) for k in keys]
print(json.dumps([hashes, files, strings, kv_ranks, str(SerdeConfig("aesgcm", {"master_key_path": "key"}))]))
"""


def test_hashes_match_known_vectors() -> None:
    first, second = chunk_hashes(TOKENS, 256)
    assert first.startswith(HASH)
    assert second.startswith("e5ffee45c2b9db32")
    assert len(first) == 64


@pytest.mark.parametrize(("count", "chunks"), [(0, 0), (1, 0), (255, 0), (256, 1), (257, 1), (511, 1), (512, 2)])
def test_only_whole_chunks_are_hashed(count: int, chunks: int) -> None:
    assert len(list(chunk_hashes(TOKENS[:count], 256))) == chunks


def test_chunk_hash_depends_on_its_prefix_only() -> None:
    whole = list(chunk_hashes(TOKENS, 100))
    changed = list(chunk_hashes([*TOKENS[:250], 7, *TOKENS[251:]], 100))
    assert [a == b for a, b in zip(whole, changed, strict=True)] == [True, True, False, False, False, False]
    assert list(chunk_hashes(TOKENS[:300], 100)) == whole[:3]
    assert len(set(whole)) == 6


def test_ids_beyond_32_bits_are_refused() -> None:
    assert len(list(chunk_hashes([2**32 - 1], 1))) == 1
    for bad in (2**32, -1):
        with pytest.raises(Exception, match=r"argument|format|range"):
            list(chunk_hashes([bad], 1))


def test_key_has_one_name_in_redis_and_one_on_disk() -> None:
    assert str(KEY) == f"org/some-model@02010200@0@{'ab' * 32}@5a17"
    assert KEY.file_name == f"org-SEP-some-model@0x02010200@0@{'ab' * 32}@5a17.data"
    assert KEY.wire() == {
        "chunk_hash_hex": "ab" * 32, "model_name": "org/some-model", "kv_rank": 0x02010200, "object_group_id": 0,
        "cache_salt": "5a17",
    }  # fmt: skip


@pytest.mark.parametrize("model", ["plain", "org/model", "/a/b/c", "with space", "a@b", "x-SEP-y", "日本"])
@pytest.mark.parametrize(("rank", "group"), [(0, 0), (0x01000100, 0), (0xFFFFFFFF, 31)])
@pytest.mark.parametrize("salt", ["salt", "", "ab" * 32])
def test_parse_reads_what_str_writes(model: str, rank: int, group: int, salt: str) -> None:
    one = ObjectKey(model, rank, group, "cd" * 32, salt)
    assert ObjectKey.parse(str(one)) == one


@pytest.mark.parametrize("salt", ["salt", ""])
def test_file_name_reads_back_with_and_without_salt(salt: str) -> None:
    one = ObjectKey("org/some-model", 0x01000100, 0, "cd" * 32, salt)
    assert ObjectKey.parse_file_name(one.file_name) == one


@pytest.mark.parametrize("name", ["", "m", "m@0@0", "m@0@0@ab@salt", f"{'cd' * 32}@salt", f"0@0@{'cd' * 32}"])
def test_what_is_no_key_is_not_parsed(name: str) -> None:
    assert ObjectKey.parse_or_none(name) is None


def test_object_keys_are_in_chunk_order_ranks_together() -> None:
    assert ranks(1) == [0x01000100]
    assert ranks(4) == [0x04000400, 0x04010401, 0x04020402, 0x04030403]
    made = object_keys("m", TOKENS, 256, 2, "s")
    assert [(k.chunk_hash[:4], k.rank) for k in made] == [
        ("0845", 0x02000200), ("0845", 0x02010201), ("e5ff", 0x02000200), ("e5ff", 0x02010201),
    ]  # fmt: skip
    assert {(k.model, k.group, k.salt) for k in made} == {("m", 0, "s")}
    assert all(a != b for a, b in pairwise(made))
    assert object_keys("m", TOKENS[:255], 256, 2, "s") == []


@pytest.mark.skipif(find_spec("lmcache") is None, reason="LMCache is not installed")
def test_keys_match_lmcache() -> None:
    chunks: list[tuple[list[int], int]] = [(TOKENS, 256), (TOKENS, 16), ([2**32 - 1] * 9, 4), ([0] * 16, 16), ([1], 16)]
    models, salts = ("org/some-model", "/a/b", "plain"), ("5a17", "")
    keys = [ObjectKey(m, r, 0, "ef" * 32, salt) for m in models for r in ranks(2) for salt in salts]
    asked = {
        "chunks": chunks,
        "keys": [(k.model, k.rank, k.group, k.chunk_hash, k.salt) for k in keys],
        "worlds": [1, 2, 8],
    }
    done = subprocess.run(
        [sys.executable, "-c", LMCACHE],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    hashes, file_names, redis_keys, kv_ranks, serde = json.loads(done.stdout.splitlines()[-1])
    assert hashes == [list(chunk_hashes(tokens, size)) for tokens, size in chunks]
    assert file_names == [k.file_name for k in keys]
    assert redis_keys == [str(k) for k in keys]
    assert kv_ranks == [ranks(world) for world in (1, 2, 8)]
    assert serde.startswith(ENCRYPTING_SERDE)
