"""A client that sends a seed with a long prompt: the engine survives it, and the seed counts."""

from typing import Any

import pytest

from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat

pytestmark = pytest.mark.stack

STEP = 2048  # tokens that the engine computes at once


def drawn(gateway: Gateway, session: str, seed: int) -> Any:
    """A reply to a prompt of more than one step, computed from the first token."""
    text = {"role": "user", "content": "Draw lots among the crew, again and again. " * 350}
    reply = chat(gateway.client(session), [text], seed=seed, temperature=1.0, max_tokens=12)
    assert reply.usage.prompt_tokens > STEP
    assert reply.usage.prompt_tokens_details.cached_tokens == 0
    return reply.choices[0].message.content


def test_a_seed_with_a_long_prompt_draws_the_same_and_the_engine_lives(stack: Stack, shared: Gateway) -> None:
    before = stack.processes.engine.pid
    first = drawn(shared, "lots-1", 7)
    assert drawn(shared, "lots-2", 7) == first
    assert drawn(shared, "lots-3", 8) != first
    assert stack.processes.engine.pid == before
    assert stack.processes.engine.exit_code is None
