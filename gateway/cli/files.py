"""Windows as files."""

import os
from pathlib import Path

import click

from gateway.cli import asking as gateway
from gateway.cli.asking import Failure, verb, window
from gateway.cli.showing import flat, show
from gateway.client import AdminError


@verb
@window
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--as-text", is_flag=True, help="leave the KV out")
def export(name: str, file: Path, as_text: bool, as_json: bool) -> None:
    """Write the window NAME into FILE, whole; FILE is there only when all of it is."""
    part = file.with_name(f"{file.name}.part")
    query = {"as_text": "true" if as_text else None}
    try:
        with part.open("wb") as out, gateway.bar() as on_progress:
            gateway.admin().download(f"/admin/windows/{gateway.part(name)}/export", out, query, on_progress)
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)
    except AdminError as error:
        part.unlink(missing_ok=True)
        raise gateway.failure(error) from error
    except OSError as error:
        part.unlink(missing_ok=True)
        raise Failure(f"cannot write {file}: {error.strerror}") from error
    answer = {"window": name, "file": str(file), "bytes": file.stat().st_size}
    show(answer, as_json, answer)


@verb
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--name", help="the window's name here; without it, the one that it was exported under")
@click.option(
    "--as-text", is_flag=True, help="take text and ids and leave the KV: for a model that is served otherwise"
)
def import_(file: Path, name: str | None, as_text: bool, as_json: bool) -> None:
    """Make the window in FILE a window of this gateway."""
    query = {"window_name": name, "as_text": "true" if as_text else None}
    try:
        with file.open("rb") as content, gateway.bar() as on_progress:
            size = file.stat().st_size
            answer = gateway.admin().upload("/admin/windows/import", content, size, query, on_progress)
    except AdminError as error:
        raise gateway.failure(error) from error
    except OSError as error:
        raise Failure(f"cannot read {file}: {error.strerror}") from error
    receipt = {k: v for k, v in answer["receipt"].items() if k != "imported"}
    show(answer, as_json, {"window": answer["name"], "kv": answer["kv"], **flat(receipt)})


COMMANDS = (export, import_)
