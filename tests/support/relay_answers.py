"""Answers of an engine for tests of the relay."""

from tests.support.fakes import engine as fake
from tests.support.fakes.engine import Exchange, usage_of

USAGE = usage_of(10, 2)


def answer_with(*chunks: bytes) -> fake.Handler:
    """An engine that streams these chunks."""

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        for chunk in chunks:
            exchange.chunk(chunk)
        exchange.end()

    return answer
