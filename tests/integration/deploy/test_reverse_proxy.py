"""The nginx configurations of docs/docker.md and of the profile team, in a real nginx in front of a real gateway."""

import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.support.certificates import self_signed
from tests.support.fakes.engine import MODEL, WITHIN, Exchange, FakeEngine, stream_of
from tests.support.gateway_process import ROOT, Gateway, eventually, free_port, gateway_in_front_of

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


def with_tls(folder: Path, port: int, gateway_port: int) -> str:
    """The page's configuration, but for ports and certificate."""
    certificate = self_signed(folder)
    (server,) = re.findall(r"^```nginx\n(.*?)^```", (ROOT / "docs/docker.md").read_text(), re.MULTILINE | re.DOTALL)
    server = re.sub(r"(?<=ssl_certificate )\S+(?=;)|(?<=ssl_certificate_key )\S+(?=;)", str(certificate), server)
    server = server.replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl").replace(":8700", f":{gateway_port}")
    return _MAIN.format(folder=folder, server=server)


def of_compose(folder: Path, port: int, gateway_port: int, second_port: int = 0) -> str:
    """The configuration of the profile team; its second gateway does not answer unless there is one.

    Without Docker's name server, and the look-ups that nginx has from 1.27.3 on.
    """
    config = (ROOT / "deploy/compose/nginx.conf").read_text().replace("/tmp/", f"{folder}/")
    config = re.sub(r"^ *(zone|resolver) .*\n| resolve(?=;)", "", config, flags=re.MULTILINE)
    config = config.replace("listen 8700", f"listen 127.0.0.1:{port}")
    config = config.replace("gateway-1:8700", f"127.0.0.1:{gateway_port}")
    return "daemon off;" + config.replace("gateway-2:8700", f"127.0.0.1:{second_port or free_port()}")


CONFIGURATIONS = {"docs": ("https", with_tls), "compose": ("http", of_compose)}


@contextmanager
def nginx(folder: Path, gateway_port: int, scheme: str, configuration: Callable[..., str]) -> Iterator[httpx.Client]:
    """A client of nginx with a configuration."""
    port, file = free_port(), folder / "nginx.conf"
    file.write_text(configuration(folder, port, gateway_port))
    with subprocess.Popen(["nginx", "-p", str(folder), "-c", str(file)], stderr=subprocess.PIPE, text=True) as process:
        certificate = folder / "server.pem"
        trusted = ssl.create_default_context(cafile=str(certificate) if certificate.exists() else None)
        trusted.check_hostname = False  # it is for an address, and the name is the page's
        url, headers = f"{scheme}://127.0.0.1:{port}", {"authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=url, verify=trusted, headers=headers, timeout=60) as client:
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
def gateway(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway_in_front_of(engine.url, tmp_path_factory.mktemp("gateway"), api_key=KEY) as gateway:
        yield gateway


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def proxied(
    gateway: Gateway, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[httpx.Client]:
    with nginx(tmp_path_factory.mktemp("proxied"), gateway.port, *CONFIGURATIONS[request.param]) as client:
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


def test_a_conversation_goes_on_while_either_gateway_is_replaced(
    engine: FakeEngine, tmp_path: Path, session: str, postgres_url: str
) -> None:
    """The profile team: two gateways over one store, and a client that knows the proxy alone."""
    places = {"api_key": KEY, "store_url": postgres_url, "secret_file": tmp_path / "salts"}
    with ExitStack() as stack:
        folders = [tmp_path / "1", tmp_path / "2"]
        for folder in folders:
            folder.mkdir()
        pair = [stack.enter_context(gateway_in_front_of(engine.url, folder, **places)) for folder in folders]
        configuration = partial(of_compose, second_port=pair[1].port)
        client = stack.enter_context(nginx(tmp_path, pair[0].port, "http", configuration))

        def turn(count: int, seen_by: Gateway) -> None:
            reply = client.post("/v1/chat/completions", json=CHAT, headers={"x-session-id": session})
            assert reply.status_code == 200
            assert len(seen_by.turns(session, count)) == count

        first, second = pair
        turn(1, first)
        first.stop()
        turn(2, second)
        first.start().wait()
        second.stop()
        turn(3, first)
