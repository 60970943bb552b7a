"""`cwg completion`: print the script with which a shell completes commands, options and window names."""

import click
from click.shell_completion import get_completion_class

from gateway.cli.connection import Failure, Word

_HOW = {
    "bash": 'eval "$(cwg completion bash)"  # in ~/.bashrc',
    "zsh": 'eval "$(cwg completion zsh)"  # in ~/.zshrc, after compinit',
    "fish": "cwg completion fish | source  # in ~/.config/fish/config.fish",
}


@click.command(epilog="\b\n" + "\n".join(_HOW.values()))
@click.argument("shell", type=Word([*_HOW]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for SHELL."""
    complete = get_completion_class(shell)
    if complete is None:
        raise Failure(f"click cannot complete for {shell}")
    script = complete(context.find_root().command, {}, "cwg", "_CWG_COMPLETE")
    click.echo(script.source_template % script.source_vars())


COMMANDS = (completion,)
