"""Commands that export and import windows as files."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import click

from gateway.cli.connection import Failure, admin, failures, operation, progress_bar, window, window_path
from gateway.cli.output import Result
from gateway.cli.receipts import stored
from gateway.cli.units import size

_IMPORT_HINTS = {"window_already_exists": "import it under another name with --name, or delete that window"}


@operation
@window
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--as-text", is_flag=True, help="omit the KV")
@click.option("--force", is_flag=True, help="overwrite FILE where it exists")
def export(name: str, file: Path, as_text: bool, force: bool) -> Result:
    """Export the window NAME to FILE.

    FILE appears once it is complete, and only you can read it.
    """
    query = {"as_text": "true" if as_text else None}
    if not force and file.exists():
        raise _exists(file)
    try:
        with failures(), _atomic_file(file, force=force) as out, progress_bar() as on_progress:
            admin().download(window_path(name, "export"), out, query, on_progress)
    except FileExistsError as error:
        raise _exists(file) from error
    except OSError as error:
        raise Failure(f"cannot write {file}: {error.strerror}") from error
    written = file.stat().st_size
    answer = {"window": name, "file": str(file)}
    return Result({**answer, "bytes": written}, {**answer, "size": size(written)})


@contextmanager
def _atomic_file(file: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """A file that gets its name at the end of the block. Raises FileExistsError if the name is taken by then."""
    fd, path = tempfile.mkstemp(prefix=f"{file.name}.", suffix=".part", dir=file.parent)  # mode 0600
    part = Path(path)
    try:
        with os.fdopen(fd, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        if force:
            part.replace(file)
        else:
            file.hardlink_to(part)  # unlike a rename, it never replaces a file
    finally:
        part.unlink(missing_ok=True)


def _exists(file: Path) -> Failure:
    return Failure(f"{file} already exists (--force overwrites it)")


@operation
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--name", help="name of the window; default: the name it was exported under")
@click.option("--as-text", is_flag=True, help="import text and ids without KV, for a model with other weights")
def import_(file: Path, name: str | None, as_text: bool) -> Result:
    """Import the window in FILE."""
    query = {"window_name": name, "as_text": "true" if as_text else None}
    try:
        with failures(**_IMPORT_HINTS), file.open("rb") as content, progress_bar() as on_progress:
            length = file.stat().st_size
            answer = admin().upload("/admin/windows/import", content, length, query, on_progress)
    except OSError as error:
        raise Failure(f"cannot read {file}: {error.strerror}") from error
    return Result(answer, stored(answer))


COMMANDS = (export, import_)
