"""The S3 tier on moto's server, and what LMCache and others do to its buckets."""

import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from gateway.kv.keys import ObjectKey
from gateway.kv.tiers.s3 import S3Tier
from gateway.kv.tiers.s3_client import S3Options
from tests.support.gateway_process import ROOT, eventually
from tests.support.tier_harness import STORE, TierServer

# moto reads nothing of a signature but that there is one, and for which service.
_SIGNED = "AWS4-HMAC-SHA256 Credential=k/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
BUCKET, PINS_BUCKET = "kv-of-tests", "pins-of-tests"


def s3_options(port: int, **more: str) -> S3Options:
    """The buckets of a server on this machine: `localhost`, for LMCache's bucket is at the address itself."""
    fields: dict[str, Any] = {"bucket": BUCKET, "pins_bucket": PINS_BUCKET, "access_key_id": "k",
                              "secret_access_key": "s", **more}  # fmt: skip
    return S3Options(endpoint=f"http://localhost:{port}", path_style=True, **fields)


def s3_tier(
    port: int, store: str = STORE, timeout_s: float = 2, now: Callable[[], float] = time.monotonic, **more: str
) -> S3Tier:
    """The tier of a server on this machine."""
    return S3Tier(s3_options(port, **more), store, timeout_s, now)


class S3Server(TierServer):
    """moto on a free port, as `cwg up` starts it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._log = folder / "s3.log"

    def start(self) -> "S3Server":
        """Start it and wait until it answers."""
        argv = [sys.executable, "-m", "gateway.stack.s3_server", str(self.port), BUCKET, PINS_BUCKET]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(argv, cwd=ROOT, stdout=log, stderr=log)
        eventually(self._answers, f"moto answers; see {self._log}")
        return self

    def _answers(self) -> bool:
        try:
            return httpx.get(f"http://localhost:{self.port}/{BUCKET}").is_success
        except httpx.TransportError:
            return False


class S3TierHarness:
    """The buckets of a server, empty."""

    def __init__(self, server: S3Server, store: str = STORE) -> None:
        self._http = httpx.Client(headers={"authorization": _SIGNED})
        self._store = store
        self._lmcache = f"http://127.0.0.1:{server.port}"
        self._s3 = f"http://localhost:{server.port}"
        self._http.post(f"{self._s3}/moto-api/reset").raise_for_status()
        for bucket in (BUCKET, PINS_BUCKET):
            self._http.put(f"{self._s3}/{bucket}").raise_for_status()
        self.tier = s3_tier(server.port, store)

    def close(self) -> None:
        """Close the client."""
        self._http.close()

    def checksum(self, value: bytes) -> bytes:
        return hashlib.sha256(value).digest()

    def put(self, key: ObjectKey, value: bytes) -> None:
        self._http.put(self._original(key), content=value).raise_for_status()

    def live(self, key: ObjectKey) -> bytes | None:
        return self._get(self._original(key))

    def lose(self, key: ObjectKey) -> None:
        self._http.delete(self._original(key)).raise_for_status()

    def put_pin(self, key: ObjectKey, value: bytes) -> None:
        self._http.put(self._pin(key), content=value).raise_for_status()

    def pinned(self, key: ObjectKey) -> bytes | None:
        return self._get(self._pin(key))

    def drop_pin(self, key: ObjectKey) -> None:
        self._http.delete(self._pin(key)).raise_for_status()

    def _get(self, url: str) -> bytes | None:
        answer = self._http.get(url)
        return None if answer.status_code == 404 else answer.raise_for_status().content

    def _original(self, key: ObjectKey) -> str:
        return f"{self._lmcache}/{quote(str(key))}"

    def _pin(self, key: ObjectKey) -> str:
        return f"{self._s3}/{PINS_BUCKET}/{self._store}/{quote(str(key))}"
