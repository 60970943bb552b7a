"""A second node beside a running stack: another LMCache over the same tiers, and another vLLM that uses it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from gateway.stack import commands, local
from gateway.stack.process import ManagedProcess
from tests.support import local_stack

CACHE_GB = ENGINE_KV_GB = 0.25
"""Both are taken at once and as a whole. Twice the KV of the longest context here: 16,384 tokens of 8 KiB."""


@contextmanager
def second_node(first: local.Plan) -> Iterator[tuple[local.Plan, commands.Processes]]:
    """Run it for the block: about 2 GB of memory, and the better part of a minute until it is ready."""
    engine, cache, cache_http = local.free_ports(3)
    plan = replace(
        first, engine_port=engine, cache_port=cache, cache_http_port=cache_http, cache_gb=CACHE_GB,
        engine_kv_gb=ENGINE_KV_GB,
    )  # fmt: skip
    launches = [commands.cache_launch(plan), commands.engine_launch(plan), commands.gateway_launch(plan)]
    apart = [
        replace(one, log=one.log.with_stem(f"{one.name}-2"), ledger=one.ledger.with_stem(f"{one.name}-2"))
        for one in launches
    ]
    processes = commands.Processes(*map(ManagedProcess, apart))
    try:
        local_stack.start(processes)
        yield plan, processes
    finally:
        processes.engine.stop()
        processes.cache.stop()


def pair_settings(*plans: local.Plan) -> str:
    """The setting `engines` of these nodes, as JSON."""
    return json.dumps([{"url": plan.engine_url, "cache_url": plan.cache_url} for plan in plans])
