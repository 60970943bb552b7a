"""The nginx configuration of docs/docker.md, in a real nginx in front of a real gateway."""

import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.certificates import self_signed
from tests.support.fakes.engine import MODEL, WITHIN, Exchange, FakeEngine, stream_of
from tests.support.gateway_process import ROOT, eventually, free_port, gateway_in_front_of

KEY = "k3y-of-the-proxy"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
# What Debian's own nginx.conf has around the files in conf.d, as far as a server needs it.
_MAIN = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr;
events {{ }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  {server}
}}
"""

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx: apt-get install nginx-light")


@contextmanager
def nginx(folder: Path, gateway_port: int) -> Iterator[httpx.Client]:
    """A client of nginx as the page configures it, but for ports and certificate."""
    port, certificate = free_port(), self_signed(folder)
    (server,) = re.findall(r"^```nginx\n(.*?)^```", (ROOT / "docs/docker.md").read_text(), re.MULTILINE | re.DOTALL)
    server = re.sub(r"(?<=ssl_certificate )\S+(?=;)|(?<=ssl_certificate_key )\S+(?=;)", str(certificate), server)
    server = server.replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl").replace(":8700", f":{gateway_port}")
    file = folder / "nginx.conf"
    file.write_text(_MAIN.format(folder=folder, server=server))
    with subprocess.Popen(["nginx", "-p", str(folder), "-c", str(file)], stderr=subprocess.PIPE, text=True) as process:
        trusted = ssl.create_default_context(cafile=str(certificate))
        trusted.check_hostname = False  # it is for an address, and the name is the page's
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted, headers=headers, timeout=60) as client:
            try:
                eventually(lambda: _answers(client), "nginx answers", more=lambda: str(process.poll()))
                yield client
            finally:
                process.terminate()


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine().start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def proxied(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("proxied")
    with gateway_in_front_of(engine.url, folder, api_key=KEY) as gateway, nginx(folder, gateway.port) as client:
        yield client


def test_a_stream_arrives_as_it_is_generated(engine: FakeEngine, proxied: httpx.Client) -> None:
    """The engine goes on only when the client has read the first event."""
    read = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        first, *others = stream_of(["Hello", " there"])
        exchange.chunk(first)
        if read.wait(WITHIN):
            for event in others:
                exchange.chunk(event)
            exchange.end()

    engine.on_chat = answer
    with proxied.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith("data: ")
        read.set()
        assert [*lines][-2] == "data: [DONE]"
    engine.reset()


def test_a_client_that_leaves_aborts_the_engines_work(engine: FakeEngine, proxied: httpx.Client) -> None:
    gone = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(stream_of(["Hello"])[0])
        if exchange.gone():
            gone.set()

    engine.on_chat = answer
    with proxied.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as reply:
        next(reply.iter_lines())
    assert gone.wait(WITHIN)
    engine.reset()


def test_session_headers_with_an_underscore_arrive(proxied: httpx.Client) -> None:
    """nginx drops such headers unless it is told not to, and agents send them."""
    reply = proxied.post("/v1/chat/completions", json=CHAT, headers={"session_id": "by-underscore"})
    assert reply.headers["x-session-id"] == "by-underscore"


def test_a_body_larger_than_nginx_takes_by_default_arrives(proxied: httpx.Client) -> None:
    large = {**CHAT, "messages": [{"role": "user", "content": "x" * 2 * 2**20}]}
    assert proxied.post("/v1/chat/completions", json=large).status_code == 200
