"""The S3 requests of the S3 tier, signed by AWS's Common Runtime (awscrt) and sent by httpx.

awscrt also has the chain of credentials: environment, profile, web identity, container, instance metadata. LMCache's
`s3` adapter needs it too, so it is there wherever LMCache is.
"""

import asyncio
import hashlib
import re
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import httpx
from awscrt import auth
from awscrt.exceptions import AwsCrtError
from awscrt.http import HttpHeaders, HttpRequest

from gateway.kv.tiers.base import TierFull, TierUnavailable

_NO_BODY = hashlib.sha256(b"").hexdigest()
_PAUSES_S = (0.1, 0.4)  # between tries; S3 asks for that with a 503 (SlowDown)
_BUSY = frozenset({429, 500, 502, 503, 504})
_FULL = frozenset({"QuotaExceeded", "XMinioStorageFull", "InsufficientCapacity", "InsufficientStorage"})
_CREDENTIALS_S = 10.0  # the chain ends with the instance metadata, which elsewhere has to time out
_SHOWN = 200
_CODE = re.compile(rb"<Code>([^<]*)</Code>")
_MESSAGE = re.compile(rb"<Message>([^<]*)</Message>")
_WITH_CHECKSUM: Mapping[str, str] = {"x-amz-checksum-mode": "ENABLED"}


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Options:
    """Where the buckets are, and as whom they are used; without keys the chain of credentials says."""

    bucket: str
    pins_bucket: str
    endpoint: str = ""
    """Base URL of a server that speaks S3; empty: Amazon's."""
    region: str = "us-east-1"
    path_style: bool = False
    access_key_id: str = ""
    secret_access_key: str = ""

    @property
    def base_url(self) -> str:
        """The endpoint, Amazon's of the region if there is none."""
        domain = "amazonaws.com.cn" if self.region.startswith("cn-") else "amazonaws.com"
        return self.endpoint.rstrip("/") or f"https://s3.{self.region}.{domain}"


class Place(NamedTuple):
    """The bucket and the key of an object."""

    bucket: str
    key: str


class Head(NamedTuple):
    """What S3 says of an object; `sha256` is None where it keeps none. Of many objects `etag` is the MD5."""

    size: int
    etag: str
    sha256: bytes | None

    def has_bytes_of(self, other: "Head") -> bool:
        """Whether two objects certainly have the same bytes.

        An ETag is the MD5 of the bytes unless they came in parts (it then has a dash) or are encrypted with a key of
        KMS; equal ones are certain in any case, different ones are not.
        """
        return self.size == other.size and self.etag == other.etag != "" and "-" not in self.etag


class S3Client:
    """A client of one S3 server. Every method raises TierUnavailable, TierFull, and TimeoutError if S3 is silent."""

    def __init__(self, options: S3Options, timeout_s: float) -> None:
        self._options = options
        self._credentials = _credentials(options)
        timeout = httpx.Timeout(2 * timeout_s, connect=timeout_s, pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=4.0)
        self._http = httpx.AsyncClient(timeout=timeout, limits=limits, follow_redirects=False)

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def head(self, place: Place) -> Head | None:
        """Ask for size and checksum; None if there is no such object."""
        async with self._send("HEAD", place, _WITH_CHECKSUM) as response:
            return None if response.status_code == 404 else _head(response)

    async def head_bucket(self, bucket: str) -> bool:
        """Whether a bucket is there."""
        async with self._send("HEAD", Place(bucket, "")) as response:
            return response.status_code != 404

    async def get(self, place: Place) -> bytes | None:
        """Read an object; None if there is none."""
        async with self._send("GET", place) as response:
            return None if response.status_code == 404 else await response.aread()

    async def digest(self, place: Place) -> tuple[int, bytes] | None:
        """Read an object, and return its size and the SHA-256 of its bytes, of which few are in memory at a time."""
        async with self._send("GET", place) as response:
            if response.status_code == 404:
                return None
            size, digest = 0, hashlib.sha256()
            async for part in response.aiter_bytes():
                size += len(part)
                digest.update(part)
            return size, digest.digest()

    async def put(self, place: Place, value: bytes, sha256: bytes) -> None:
        """Write an object; S3 refuses bytes that do not match the checksum, and keeps it."""
        headers = {"x-amz-checksum-sha256": b64encode(sha256).decode(), "x-amz-sdk-checksum-algorithm": "SHA256"}
        async with self._send("PUT", place, headers, body=value, body_sha256=sha256.hex()) as response:
            _require_found(response, place)

    async def copy(self, source: Place, target: Place) -> bool:
        """Copy an object inside S3, with a SHA-256 of the bytes; False if there is no source."""
        headers = {"x-amz-copy-source": quote(f"/{source.bucket}/{source.key}"), "x-amz-checksum-algorithm": "SHA256"}
        async with self._send("PUT", target, headers) as response:
            if response.status_code == 404 and _code(response.content) in ("NoSuchKey", ""):
                return False
            _require_found(response, target)
            return True

    async def delete(self, place: Place) -> None:
        """Delete an object, if there is one."""
        async with self._send("DELETE", place):
            return

    @asynccontextmanager
    async def _send(
        self, method: str, place: Place, headers: Mapping[str, str] | None = None, *, body: bytes = b"",
        body_sha256: str = _NO_BODY,
    ) -> AsyncIterator[httpx.Response]:  # fmt: skip
        """Send a request, again if S3 is busy or drops the connection; yield an answer that is a success or a 404."""
        response = await self._answer(method, place, headers or {}, body, body_sha256)
        try:
            yield response
        except httpx.HTTPError as error:
            raise self._no_answer(error) from error
        finally:
            await response.aclose()

    async def _answer(
        self, method: str, place: Place, headers: Mapping[str, str], body: bytes, body_sha256: str
    ) -> httpx.Response:
        for pause in (*_PAUSES_S, None):
            try:
                request = await self._signed(method, place, headers, body, body_sha256)
                response = await self._http.send(request, stream=True)
            except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as error:
                if pause is None:
                    raise self._no_answer(error) from error
            except httpx.HTTPError as error:
                raise self._no_answer(error) from error
            else:
                failed = await self._failure(response)
                if failed is None:
                    return response
                if pause is None or response.status_code not in {200, *_BUSY}:
                    raise self._refusal(method, place, response, failed)
            await asyncio.sleep(pause)
        raise AssertionError("the last try returns or raises")

    async def _failure(self, response: httpx.Response) -> bytes | None:
        """The body of an answer that is a failure; None for one that is not. A copy may fail in an answer of 200."""
        if response.is_success and response.request.method == "GET":
            return None
        try:
            body = await response.aread()
        except httpx.HTTPError as error:
            raise self._no_answer(error) from error
        if response.status_code == 404:
            return None
        return body if not response.is_success or b"<Error>" in body[:_SHOWN] else None

    async def _signed(
        self, method: str, place: Place, headers: Mapping[str, str], body: bytes, body_sha256: str
    ) -> httpx.Request:
        base, path = self._address(place)
        request = HttpRequest(method, path, HttpHeaders([("Host", urlsplit(base).netloc), *headers.items()]))
        config = auth.AwsSigningConfig(
            algorithm=auth.AwsSigningAlgorithm.V4,
            signature_type=auth.AwsSignatureType.HTTP_REQUEST_HEADERS,
            credentials_provider=self._credentials,
            region=self._options.region,
            service="s3",
            use_double_uri_encode=False,
            should_normalize_uri_path=False,
            signed_body_value=body_sha256,
            signed_body_header_type=auth.AwsSignedBodyHeaderType.X_AMZ_CONTENT_SHA_256,
        )
        try:
            async with asyncio.timeout(_CREDENTIALS_S):
                await asyncio.wrap_future(auth.aws_sign_request(request, config))
        except (AwsCrtError, TimeoutError) as error:
            raise TierUnavailable(
                "s3 tier: no credentials were found; set s3_access_key_id and s3_secret_access_key, or AWS's variables "
                f"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role ({_named(error)})"
            ) from error
        # What is in `path` is encoded as S3 expects it in the signature.
        url = httpx.URL(base).copy_with(raw_path=path.encode())
        signed = [*request.headers, ("accept-encoding", "identity")]
        return self._http.build_request(method, url, headers=signed, content=body or None)

    def _address(self, place: Place) -> tuple[str, str]:
        """The base URL and the path of an object: the bucket is in either of them."""
        url, key = urlsplit(self._options.base_url), quote(place.key)
        if self._options.path_style:
            return f"{url.scheme}://{url.netloc}", f"{url.path}/{place.bucket}/{key}"
        return f"{url.scheme}://{place.bucket}.{url.netloc}", f"{url.path}/{key}"

    def _no_answer(self, error: httpx.HTTPError) -> TierUnavailable | TimeoutError:
        if isinstance(error, httpx.TimeoutException):
            return TimeoutError(f"s3 tier: {self._options.base_url} does not answer")
        return TierUnavailable(f"s3 tier: {self._options.base_url} does not answer: {_named(error)}")

    def _refusal(self, method: str, place: Place, response: httpx.Response, body: bytes) -> TierUnavailable:
        code, status = _code(body), response.status_code
        if status == 507 or code in _FULL:
            return TierFull(f"s3 tier: bucket {place.bucket} is full ({code or status})")
        return TierUnavailable(
            f"s3 tier: {method} in bucket {place.bucket} was answered with {status} {code}{_text(_MESSAGE, body, ': ')}"
            f"{_remedy(status, response)}"
        )


def _credentials(options: S3Options) -> auth.AwsCredentialsProvider:
    if options.access_key_id:
        return auth.AwsCredentialsProvider.new_static(options.access_key_id, options.secret_access_key)
    return auth.AwsCredentialsProvider.new_default_chain()


def _head(response: httpx.Response) -> Head:
    checksum: bytes | None = None
    text = response.headers.get("x-amz-checksum-sha256", "")
    if text and "-" not in text and response.headers.get("x-amz-checksum-type", "FULL_OBJECT") == "FULL_OBJECT":
        with suppress(ValueError):  # then it is as good as none
            checksum = b64decode(text, validate=True)
    etag = response.headers.get("etag", "").strip('"')
    return Head(int(response.headers.get("content-length", "0")), etag, checksum)


def _require_found(response: httpx.Response, place: Place) -> None:
    if response.status_code == 404:
        raise TierUnavailable(f"s3 tier: there is no bucket {place.bucket}; create it")


def _named(error: Exception) -> str:
    return str(error) or type(error).__name__


def _code(body: bytes) -> str:
    return _text(_CODE, body)


def _text(pattern: re.Pattern[bytes], body: bytes, before: str = "") -> str:
    found = pattern.search(body)
    return before + found[1][:_SHOWN].decode(errors="replace") if found else ""


def _remedy(status: int, response: httpx.Response) -> str:
    region = response.headers.get("x-amz-bucket-region", "")
    if region and status in (301, 400):
        return f"; set s3_region to {region[:_SHOWN]}"
    if status == 301:
        return "; set s3_endpoint and s3_region to those of the bucket"
    if status == 403:
        return (
            "; the key needs s3:GetObject, s3:PutObject and s3:DeleteObject in both buckets, s3:ListBucket of both, "
            "without which S3 answers so for an object that is missing"
        )
    return ""
