"""The options of command lines, to compare what `cwg up` starts with what deploy/ starts."""

from collections.abc import Iterable
from pathlib import Path

from gateway.stack import commands
from gateway.stack.local import LocalStack
from tests.support.local_stack import plan_for

Options = dict[str, list[str]]


def options(argv: Iterable[str]) -> Options:
    """Each option with its values, in either form, `--option value` or `--option=value`."""
    found: Options = {}
    last: list[str] = []
    for argument in argv:
        name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "=", argument)
        if name:
            last = found.setdefault(name, [])
        if equals:
            last.append(value)
    return found


def of_cwg_up(data_dir: Path) -> tuple[Options, Options]:
    """What `cwg up` gives to vLLM and to LMCache on a machine with a GPU, with Redis and a model of one's own."""
    plan = plan_for(LocalStack(data_dir=data_dir, redis_url="redis://redis:6379"), demo=None, on_cpu=False)
    return options(commands.engine_launch(plan).argv), options(commands.cache_launch(plan).argv)
