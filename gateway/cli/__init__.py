"""`cwg`: the local stack, the gateway, and the window operations as a client of the admin API.

Exit codes: 0 done, 1 failed (the reason is on stderr), 2 wrong usage.
"""

import click

from gateway import __version__
from gateway.cli import (
    archives,
    autofreeze,
    completion,
    demo,
    engines,
    lists,
    reports,
    serve,
    sessions,
    status,
    store,
    windows,
)
from gateway.cli.connection import url_option


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="cwg")
@url_option()
def main() -> None:
    """Context Window Gateway: durable, nameable, lossless KV caches for conversations on vLLM.

    Commands reach the gateway at CWG_URL (http://127.0.0.1:8700 by default), with the key in CWG_API_KEY.
    """


for _module in (
    serve, demo, windows, archives, lists, status, sessions, reports, autofreeze, engines, store, completion
):  # fmt: skip
    for _command in _module.COMMANDS:
        main.add_command(_command)
