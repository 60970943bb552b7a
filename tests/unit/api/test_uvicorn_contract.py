"""What the gateway uses of uvicorn beyond its public API, checked against the version that is installed."""

import ast
import asyncio
import inspect
import socket
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from gateway.api import server
from gateway.api.server import BoundedProtocol

_OURS = ast.parse(inspect.getsource(server))


def attributes_of(*names: str, within: ast.AST = _OURS) -> set[str]:
    """The attributes that `within` uses of whatever goes by one of `names`: of `cycle`, also as `self.cycle.x`."""

    def name_of(node: ast.expr) -> str:
        return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")

    return {node.attr for node in ast.walk(within) if isinstance(node, ast.Attribute) and name_of(node.value) in names}


def own_attributes() -> set[str]:
    """What `BoundedProtocol` defines itself and uvicorn does not."""
    return {*vars(BoundedProtocol), *BoundedProtocol.__annotations__} - set(dir(HttpToolsProtocol))


def bounded_protocol() -> ast.ClassDef:
    """The source of `BoundedProtocol`."""
    return next(node for node in _OURS.body if isinstance(node, ast.ClassDef) and node.name == BoundedProtocol.__name__)


def missing(thing: Any, names: set[str]) -> set[str]:
    """Those of `names` that `thing` does not have."""
    return {name for name in names if not hasattr(thing, name)}


@pytest.fixture
async def protocol() -> Any:
    """uvicorn's own protocol, in the middle of answering a request."""
    answering = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        answering.set()
        await asyncio.Event().wait()

    config = uvicorn.Config(app, lifespan="off", log_config=None)
    config.load()
    plain = HttpToolsProtocol(config=config, server_state=ServerState(), app_state={})
    ours, theirs = socket.socketpair()
    transport, _ = await asyncio.get_running_loop().connect_accepted_socket(lambda: plain, ours)
    with theirs:
        theirs.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.wait_for(answering.wait(), 10)
        yield plain
        transport.close()
        for task in plain.tasks:
            task.cancel()
        await asyncio.gather(*plain.tasks, return_exceptions=True)


@pytest.mark.anyio
async def test_protocol_has_attributes_in_use(protocol: Any) -> None:
    used = (attributes_of("self", within=bounded_protocol()) | attributes_of("_protocol")) - own_attributes()
    assert {"cycle", "pipeline", "parser", "flow", "_unset_keepalive_if_required"} <= used
    assert missing(protocol, used) == set()


@pytest.mark.anyio
async def test_request_cycle_has_attributes_in_use(protocol: Any) -> None:
    used = attributes_of("cycle", "_cycle")
    assert {"more_body", "waiting_for_100_continue", "body", "chunked_encoding", "expected_content_length"} <= used
    assert missing(protocol.cycle, used) == set()
    assert missing(protocol.flow, attributes_of("flow")) == set()


def test_server_has_attributes_in_use() -> None:
    running = uvicorn.Server(uvicorn.Config(lambda: None, log_config=None))
    assert missing(running, attributes_of("server")) == set()
    assert missing(running.server_state, attributes_of("server_state")) == set()


def test_overridden_methods_are_uvicorns() -> None:
    called = {
        node.func.attr
        for node in ast.walk(bounded_protocol())
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Call)
        and getattr(node.func.value.func, "id", "") == "super"
    }
    assert "on_headers_complete" in called
    assert missing(HttpToolsProtocol, called | {"data_received"}) == set()
