"""An engine that answers late now and then, so that operations of several clients overlap."""

import random
import threading
import time
from collections.abc import Callable

from tests.support.fakes.engine import Exchange, FakeEngine


class Delays:
    """Keeps an engine from answering at once, for moments that come from a seed."""

    def __init__(self, engine: FakeEngine, seed: int) -> None:
        self._random, self._guard = random.Random(seed), threading.Lock()
        engine.on_chat = self._late(engine.answer_chat, 0.3)
        engine.on_completion = self._late(engine.answer_completion, 0.6)
        engine.on_tokenize = self._late(engine._tokens, 0.6)

    def _late(self, answer: Callable[[Exchange], None], often: float) -> Callable[[Exchange], None]:
        def late(exchange: Exchange) -> None:
            with self._guard:
                held = self._random.expovariate(40) if self._random.random() < often else 0.0
            time.sleep(min(held, 0.15))
            answer(exchange)

        return late
