"""docs/cli.md, generated from the commands themselves and one example of each: `make docs` writes it."""

import inspect
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import click

from gateway.cli import main
from tests.support.gateway_process import ROOT

PAGE = ROOT / "docs" / "cli.md"
# What is typed after `cwg`. A test parses each of them.
EXAMPLES: Mapping[str, str] = MappingProxyType(
    {
        "store copy": "store copy sqlite:///data/gateway.db postgresql://cwg:PASSWORD@db.example/cwg",
        "up": "up --model Qwen/Qwen3-8B --data-dir /srv/cwg -- --tensor-parallel-size 2 --tool-call-parser hermes",
        "serve": "serve --config gateway.toml --workers 4",
        "mcp": "mcp",
        "demo": "demo --restart",
        "freeze": "freeze alice kickoff --description 'Who owns what' --tag planning --ttl 604800",
        "thaw": "thaw kickoff --session alice-2",
        "clone": "clone kickoff kickoff-for-bob --description 'For Bob'",
        "describe": "describe kickoff --tag planning --tag widget --no-ttl",
        "ask": "ask kickoff 'Who owns the second part?' --max-tokens 60",
        "fanout": "fanout kickoff 3 --prefix attempt",
        "prefetch": "prefetch kickoff",
        "evict": "evict kickoff",
        "verify": "verify kickoff --deep",
        "delete": "delete kickoff",
        "messages": "messages kickoff",
        "export": "export kickoff kickoff.cwg",
        "import": "import kickoff.cwg --name kickoff-again",
        "list": "list --tag planning --no-auto --sort size --created-after 2026-11-01",
        "search": "search 'billing by the hour' --limit 5",
        "sessions": "sessions --state active --limit 50",
        "tree": "tree --limit 100",
        "status": "status kickoff --blocks",
        "session messages": "session messages alice",
        "session delete": "session delete alice --yes",
        "doctor": "doctor",
        "health": "health",
        "cache": "cache",
        "saved": "saved --limit 5",
        "metrics": "metrics --json",
        "policy": "policy --set idle_timeout_minutes=30 --set context_share=0.8",
        "drain": "drain 10.0.0.1:8000 --no-wait",
        "completion": "completion bash",
    }
)
_HEAD = """\
# Command line

Generated from the code by `make docs`; `cwg COMMAND --help` says the same. In a clone, `cwg` is `.venv/bin/cwg`,
and on the `PATH` after `source .venv/bin/activate`.

- All but `up`, `serve` and `completion` talk to a running gateway: at `--url`, else `CWG_URL`, else
  `http://127.0.0.1:8700`, with the key in `CWG_API_KEY`.
- What is printed is for people. With `--json` it is the answer of the [admin API](http.md#admin-api), as it is.
- Exit code 0: done. 1: failed, with the reason on stderr. 2: wrong usage.
- `cwg completion SHELL` completes commands, options and the names of windows and sessions.
"""


def commands(group: click.Group = main, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command with its full name, those of groups included."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        elif not command.hidden:
            yield prefix + name, command


def page() -> str:
    """The page as it should be."""
    found = list(commands())
    index = " · ".join(f"[{name}](#cwg-{name.replace(' ', '-')})" for name, _ in found)
    return "\n".join([_HEAD, index, "", *(_section(name, command) for name, command in found)])


def _section(name: str, command: click.Command) -> str:
    usage = f"cwg {name} {' '.join(command.collect_usage_pieces(click.Context(command)))}"
    about = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(command.help or ""))
    options = [_option(one) for one in command.params if isinstance(one, click.Option) and not _is_everywhere(one)]
    table = "\n".join(["| option | meaning |", "|---|---|", *options, ""]) if options else ""
    return (
        f"## cwg {name}\n\n{about}\n\n```bash\n# {usage.strip()}\ncwg {EXAMPLES[name]}\n```\n\n{table}".rstrip() + "\n"
    )


def _is_everywhere(option: click.Option) -> bool:
    return option.hidden or option.name == "as_json"


def _option(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    value = "" if option.is_flag else f" {_value(option)}"
    default = f" (default: {option.default})" if option.show_default and option.default is not None else ""
    return f"| {names}{value} | {_cell((option.help or '') + default)} |"


def _value(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return _cell("|".join(map(str, option.type.choices)))
    return option.metavar or option.type.name.split()[0].upper()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
