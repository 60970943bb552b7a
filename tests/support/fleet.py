"""Two gateways of separate hosts, as far as one machine can be two: a store, a tier and a secret are all they share."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import Gateway

LEASE_S = 2.0


def gateway_of(folder: Path, name: str, engine_url: str, store_url: str, **settings: object) -> Gateway:
    """One of the gateways, not started yet."""
    own = folder / name
    own.mkdir(exist_ok=True)
    shared = {"store_url": store_url, "secret_file": folder / "secret", "gateway_lease_s": LEASE_S}
    return Gateway(own, engine_url, **{**shared, **settings})


@contextmanager
def two_gateways(
    folder: Path, engine: FakeEngine, store_url: str, path: str = "/readyz", **settings: Any
) -> Iterator[tuple[Gateway, Gateway]]:
    """Both, once each answers at `path`."""
    with ExitStack() as stack:
        pair = [gateway_of(folder, name, engine.url, store_url, **settings) for name in ("a", "b")]
        for gateway in pair:
            stack.callback(gateway.close)
            gateway.start().wait(path)
        yield pair[0], pair[1]
