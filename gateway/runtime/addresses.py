"""The addresses of a name in DNS, looked up again and again: the pods of a headless Service, for example."""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

OnAddresses = Callable[[list[str]], Awaitable[None]]
Resolve = Callable[[str, float], Awaitable[list[str]]]
"""`look_up`, or what takes its place."""
_LEAST_S = 1.0  # for one look-up


class LookupFailed(Exception):
    """A name without an address, or a resolver that did not answer."""


async def look_up(name: str, timeout_s: float) -> list[str]:
    """Return every `host:port` that a name with a port has, in order, IPv6 in brackets. Raises LookupFailed."""
    host, _, port = name.rpartition(":")
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError) as error:
        raise LookupFailed(f"{name} has no address: {str(error) or type(error).__name__}") from error
    return sorted({_spelt(*address[4][:2]) for address in found})


def _spelt(host: object, port: object) -> str:
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


class Lookup:
    """Looks a name up every `every_s` seconds, and gives its addresses to `on_addresses`.

    A look-up that fails changes nothing: the name server may be what is down, and whether an address answers is seen
    there. `trouble` says why, "" after one that succeeded.
    """

    def __init__(self, name: str, every_s: float, on_addresses: OnAddresses, resolve: Resolve) -> None:
        self.name = name
        self.trouble = ""
        self._resolve = resolve
        self._every_s = every_s
        self._on_addresses = on_addresses

    async def once(self) -> None:
        """Look it up now."""
        try:
            found = await self._resolve(self.name, max(self._every_s, _LEAST_S))
        except LookupFailed as error:
            if not self.trouble:
                log.warning("%s; the addresses known before stay", error)
            self.trouble = str(error)
            return
        if self.trouble:
            log.info("%s has addresses again", self.name)
        self.trouble = ""
        await self._on_addresses(found)

    async def run(self) -> None:
        """Look it up again and again; ends only when cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self.once()
            except Exception:  # must not end; the next look-up may succeed
                log.exception("could not take over the addresses of %s", self.name)
