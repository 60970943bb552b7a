"""The S3 client in front of a server that answers what moto never does: errors, no checksums, failures inside a 200."""

import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gateway.kv.tiers.base import ObjectState, TierFull, TierUnavailable
from gateway.kv.tiers.s3_client import Head, Place, S3Client, S3Options
from gateway.records import PinnedObject
from tests.support.s3_harness import BUCKET, PINS_BUCKET, S3Server, S3TierHarness, s3_options, s3_tier
from tests.support.tier_harness import key, keys, spelled, value

pytestmark = pytest.mark.anyio

PLACE = Place(BUCKET, "org/model@01000100@0@ab@salt")
ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>No.</Message></Error>"


class ScriptedServer(ThreadingHTTPServer):
    """Answers every request with the next of its answers, the last one again and again, and keeps what was asked."""

    def __init__(self, *answers: tuple[int, dict[str, str], str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = list(answers)
        self.asked: list[tuple[str, str, dict[str, str]]] = []


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.asked.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        status, headers, body = self.server.answers[0]
        if len(self.server.answers) > 1:
            del self.server.answers[0]
        self.send_response(status)
        for name, text in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    do_GET = do_PUT = do_HEAD = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""


Serve = Callable[..., ScriptedServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start scripted servers."""
    running: list[ScriptedServer] = []

    def start(*answers: tuple[int, dict[str, str], str]) -> ScriptedServer:
        server = ScriptedServer(*answers)
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def client(server: ScriptedServer, **more: str) -> S3Client:
    return S3Client(s3_options(server.server_port, **more), 2)


async def test_busy_server_is_asked_again(serve: Serve) -> None:
    server = serve((503, {}, ERROR.format("SlowDown")), (200, {"content-length": "7", "etag": '"e"'}, ""))
    assert await client(server).head(PLACE) == Head(7, "e", None)
    assert [method for method, _, _ in server.asked] == ["HEAD", "HEAD"]


async def test_server_that_stays_busy_is_unavailable(serve: Serve) -> None:
    server = serve((503, {}, ERROR.format("SlowDown")))
    with pytest.raises(
        TierUnavailable, match=r"s3 tier: GET in bucket kv-of-tests was answered with 503 SlowDown: No\."
    ):
        await client(server).get(PLACE)
    assert len(server.asked) == 3


async def test_copy_that_fails_in_an_answer_of_200_is_a_failure(serve: Serve) -> None:
    failed = (200, {"content-type": "application/xml"}, ERROR.format("InternalError"))
    server = serve(failed)
    with pytest.raises(TierUnavailable, match="InternalError"):
        await client(server).copy(PLACE, Place(PINS_BUCKET, "x"))
    server = serve(failed, (200, {}, "<CopyObjectResult/>"))
    assert await client(server).copy(PLACE, Place(PINS_BUCKET, "x"))
    _, path, headers = server.asked[-1]
    assert path == f"/{PINS_BUCKET}/x"
    assert headers["x-amz-copy-source"] == f"/{BUCKET}/org/model%4001000100%400%40ab%40salt"
    assert headers["x-amz-checksum-algorithm"] == "SHA256"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((403, {}, ERROR.format("AccessDenied")), "403 AccessDenied: No.; the key needs s3:GetObject.* s3:ListBucket"),
        ((301, {"x-amz-bucket-region": "eu-west-1"}, ""), "301 ; set s3_region to eu-west-1"),
        ((301, {}, ""), "set s3_endpoint and s3_region to those of the bucket"),
        ((404, {}, ERROR.format("NoSuchBucket")), "there is no bucket pins-of-tests; create it"),
    ],
)
async def test_refusal_names_the_remedy(serve: Serve, answer: tuple[int, dict[str, str], str], message: str) -> None:
    with pytest.raises(TierUnavailable, match=message):
        await client(serve(answer)).put(Place(PINS_BUCKET, "x"), b"y", hashlib.sha256(b"y").digest())


@pytest.mark.parametrize("answer", [(507, {}, ""), (403, {}, ERROR.format("QuotaExceeded"))])
async def test_full_bucket_is_full(serve: Serve, answer: tuple[int, dict[str, str], str]) -> None:
    with pytest.raises(TierFull, match="bucket pins-of-tests is full"):
        await client(serve(answer)).put(Place(PINS_BUCKET, "x"), b"y", hashlib.sha256(b"y").digest())


async def test_requests_are_signed_for_region_and_path(serve: Serve) -> None:
    server = serve((404, {}, ""))
    assert await client(server, region="eu-west-1", access_key_id="AKID").head(Place(BUCKET, "/a b/é@1")) is None
    ((_, path, headers),) = server.asked
    assert path == f"/{BUCKET}//a%20b/%C3%A9%401"
    assert "Credential=AKID/" in headers["authorization"]
    assert "/eu-west-1/s3/aws4_request" in headers["authorization"]
    assert headers["x-amz-content-sha256"] == hashlib.sha256(b"").hexdigest()


def test_address_without_an_endpoint_is_amazons() -> None:
    assert S3Options(bucket="b", pins_bucket="p", region="eu-west-1").base_url == "https://s3.eu-west-1.amazonaws.com"
    assert S3Options(bucket="b", pins_bucket="p", region="cn-north-1").base_url.endswith(".amazonaws.com.cn")


async def test_missing_credentials_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    async with s3_tier(1, access_key_id="", secret_access_key="") as tier:
        with pytest.raises(TierUnavailable, match=r"no credentials were found; set s3_access_key_id"):
            await tier.sizes(spelled(key(0)))


# --- on moto


@pytest.fixture
async def rig(s3_server: S3Server) -> AsyncIterator[S3TierHarness]:
    rig = S3TierHarness(s3_server)
    async with rig.tier:
        yield rig
    rig.close()


async def test_checksums_of_s3_spare_reading(rig: S3TierHarness) -> None:
    content = value()
    rig.put(key(0), content)
    objects = await rig.tier.pin(keys(1), {})
    # Other bytes under the checksum that S3 has: only reading them would tell.
    wrong = [PinnedObject(o.key, o.tier, o.size, hashlib.sha256(b"other").digest()) for o in objects]
    assert await rig.tier.verify(wrong) == [ObjectState.CORRUPT]
    assert await rig.tier.verify(objects) == await rig.tier.verify(objects, deep=True) == [ObjectState.INTACT]


async def test_sizes_may_be_those_of_the_last_minute(rig: S3TierHarness, s3_server: S3Server) -> None:
    now = 100.0
    async with s3_tier(s3_server.port, now=lambda: now) as tier:
        for one in keys(3):
            rig.put(one, value(10))
        names = spelled(*keys(3))
        assert await tier.sizes(names, lately=True) == [10] * 3
        rig.lose(key(1))
        assert await tier.sizes(names, lately=True) == [10] * 3
        assert await tier.sizes(names[:2], lately=True) == [10, 0]
        assert await tier.sizes(names) == [10, 0, 10]
        now += 61
        assert await tier.sizes(names, lately=True) == [10, 0, 10]


async def test_own_deletion_ends_what_is_remembered(rig: S3TierHarness) -> None:
    rig.put(key(0), value(10))
    assert await rig.tier.sizes(spelled(key(0)), lately=True) == [10]
    await rig.tier.drop_original(keys(1))
    assert await rig.tier.sizes(spelled(key(0)), lately=True) == [0]


async def test_missing_buckets_are_a_risk(s3_server: S3Server) -> None:
    async with s3_tier(s3_server.port, bucket="not-there", pins_bucket="nor-this") as tier:
        assert [risk.partition(";")[0] for risk in await tier.risks()] == [
            "s3 tier: there is no bucket not-there", "s3 tier: there is no bucket nor-this",
        ]  # fmt: skip
        with pytest.raises(TierUnavailable, match="there is no bucket nor-this"):
            await tier.put(key(0), b"x")


async def test_nothing_of_a_bucket_is_ever_listed(rig: S3TierHarness) -> None:
    rig.put(key(0), value())
    await rig.tier.pin(keys(1), {})
    assert not rig.tier.lists
    assert await rig.tier.keys_with_salt({"salt"}) == set()
    with pytest.raises(TierUnavailable, match="never listed"):
        await rig.tier.inventory()
    assert await rig.tier.sweep([]) == 0
    assert rig.pinned(key(0))
