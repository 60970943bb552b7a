"""A port in front of a server that holds back all of its answers until they are released."""

import asyncio


class HeldAnswers:
    """Passes requests on at once, and answers once `release` was called."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._released = asyncio.Event()
        self._asked = asyncio.Condition()
        self._requests = 0
        self.port = 0

    async def __aenter__(self) -> "HeldAnswers":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._released.set()
        self._server.close()

    async def until_asked(self, times: int) -> None:
        """Wait for so many requests."""
        async with self._asked:
            await self._asked.wait_for(lambda: self._requests >= times)

    def release(self) -> None:
        """Let all answers pass."""
        self._released.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            await asyncio.gather(self._ask(reader, back), self._answer(there, writer))
        except ConnectionError:  # one side is gone, and so is the other
            pass
        finally:
            for side in (back, writer):
                side.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            async with self._asked:
                self._requests += 1
                self._asked.notify_all()
            writer.write(data)
        writer.write_eof()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            await self._released.wait()
            writer.write(data)
