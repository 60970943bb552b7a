"""Commands on the gateway's store itself."""

import asyncio

import click

from gateway.cli.connection import Failure
from gateway.cli.output import say
from gateway.errors import GatewayError, StartError


@click.group()
def store() -> None:
    """Work on the gateway's store."""


@store.command()
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
def copy(source: str, target: str) -> None:
    """Copy a store into an empty one, from SQLite to PostgreSQL or back.

    FROM and TO are values of store_url: sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE. Stop every gateway
    of FROM first. The secret file of FROM has to go along: salts are made with it, and without it no KV is found again.
    """
    from gateway.settings import SettingsError  # noqa: PLC0415 - other commands should not pay for the imports

    try:
        asyncio.run(_copy(source, target))
    except (SettingsError, StartError) as error:
        raise Failure(str(error)) from error
    except GatewayError as error:
        raise Failure(error.message) from error
    say("done: set store_url to TO, and take the secret file along (secret_file; by default data_dir/secret)")


async def _copy(source: str, target: str) -> None:
    from gateway.runtime import serve_lock  # noqa: PLC0415 - see `copy`
    from gateway.settings import load  # noqa: PLC0415
    from gateway.store import copying  # noqa: PLC0415
    from gateway.store.opening import store_of  # noqa: PLC0415

    of, to = (load(environment={}, overrides={"store_url": url}) for url in (source, target))
    if not source or not target or source == target:
        raise Failure("FROM and TO have to be the URLs of two stores")
    if of.store_path is not None and not of.store_path.is_file():
        raise Failure(f"there is no store {of.store_path}")
    paths = [path.resolve() for path in (of.store_path, to.store_path) if path is not None]
    if len(set(paths)) < len(paths):
        raise Failure("FROM and TO are the same store")
    locks = (lock for path in paths for lock in (path.parent / "serve.lock", path.with_name(f"{path.name}.lock")))
    serve_lock.lock(dict.fromkeys(locks))  # both may lie in one folder
    async with store_of(of) as old, store_of(to) as new:
        for settings, opened in ((of, old), (to, new)):
            if settings.store_path is None:  # no file that a gateway could have locked
                await copying.check_unused(opened)
        await copying.copy(old, new, lambda table, rows: say(f"{table}: {rows} rows") if rows else None)


COMMANDS = (store,)
