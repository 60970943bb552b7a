"""`cwg demo`: freeze two conversations, take their KV out of every memory, thaw them, and compare the answers.

The thaw must load from disk or Redis, and nothing else may help it: neither the engine's own prefix cache nor LMCache's
memory. Without `--restart` an isolated clone is thawed: its pins are those of the window, the very same bytes, but its
cache salt is a new one, and nothing in any memory is found under that. With `--restart` all memory is gone.
"""

import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from rich.table import Table
from rich.text import Text

from gateway.cli import connection
from gateway.cli.admin_client import Admin
from gateway.cli.connection import Failure, operation, window_path
from gateway.cli.demo_answers import Answer, ask, difference
from gateway.cli.demo_conversations import Script, long_script, short_script
from gateway.cli.demo_leftovers import Leftovers, uninterrupted
from gateway.cli.output import OUT, Result, say
from gateway.stack.terminal import Terminal
from gateway.windows.comparison import Comparison, compare

if TYPE_CHECKING:
    from gateway.cli.demo_restart import Restart

_REPLY_TOKENS = 32
_DURABLE = {"disk", "redis", "s3"}
_NEXT = """
Try next: talk to the model at {url}/v1 with any OpenAI client, then
  cwg sessions              find the conversation
  cwg freeze SESSION NAME   keep it under a name
  cwg thaw NAME             continue it, now or after a restart
  cwg verify NAME --deep    prove the same for a window of your own
"""


class Round(NamedTuple):
    """What was seen of one conversation: the receipts, and the answer live, thawed and computed without a cache."""

    script: Script
    window: dict[str, Any]
    thawed: dict[str, Any]
    live: Answer
    after: Answer
    recomputed: Answer

    @property
    def cacheable(self) -> int:
        """The tokens that a thaw can load: those of the whole chunks."""
        receipt = self.window["receipt"]
        return int(receipt["tokens"] - receipt["tail_tokens"])

    @property
    def comparison(self) -> Comparison:
        """The answer after the thaw, compared with the live one."""
        return compare(self.live, self.after)

    @property
    def difference(self) -> str:
        """What is wrong with the answer after the thaw; "" if nothing."""
        return difference(self.live, self.after, self.comparison)

    @property
    def tie(self) -> int | None:
        """The token at which a tie ended the comparison, counted from 1."""
        return self.comparison.tokens if self.comparison.verdict == "tie" else None

    @property
    def is_identical(self) -> bool:
        """Whether all tokens of the answer were compared, and are equal."""
        return not self.difference and self.tie is None


@operation
@click.option("--restart", is_flag=True, help="restart the stack in between: one that `cwg up` runs on this machine")
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data"),
    show_default=True,
    help="the data directory of that stack",
)
def demo(restart: bool, data_dir: Path) -> Result:
    """Prove that a thaw is lossless, and time it; about a minute."""
    from gateway.cli import demo_restart  # noqa: PLC0415 - other commands should not pay for the stack's imports

    terminal = Terminal()
    with connection.failures(), _interrupted_by_sigterm():
        admin = connection.admin()
        again = demo_restart.find(data_dir, admin.url) if restart else None
        try:
            rounds = _Demo(admin, terminal, again).run()
        finally:
            terminal.settled()
    return _result(rounds, admin.url, restarted=restart)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """A SIGTERM acts like a Ctrl-C: what the demo has made is removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Demo:
    """One run, with names that no other has."""

    def __init__(self, admin: Admin, terminal: Terminal, restart: "Restart | None") -> None:
        self._admin = admin
        self._show = terminal.waiting
        self._restart = restart
        self._id = f"demo-{secrets.token_hex(4)}"
        self._made = Leftovers(admin, self._show, lambda: restart is not None and restart.is_back(self._show))

    def run(self) -> list[Round]:
        """Both conversations through all steps; nothing of them is left behind. Raises AdminError, Failure."""
        check_cache(self._admin.call("GET", "/admin/cache"))
        model = self._admin.call("GET", "/v1/models")["data"][0]
        name, limit = str(model["id"]), int(model.get("max_model_len") or 0)
        with self._made.removed():
            return self._run(name, [short_script(), long_script(self._counter(name), limit)])

    def _run(self, model: str, scripts: list[Script]) -> list[Round]:
        frozen = [self._converse_and_freeze(model, script) for script in scripts]
        live = [self._ask(model, script, self._name(script), script.messages) for script in scripts]
        for script in scripts:
            self._evict(script)
        if self._restart:
            self._restart(self._show)
        thawed = [self._thaw(script) for script in scripts]
        after = [
            self._ask(model, script, answer["session_id"], []) for script, answer in zip(scripts, thawed, strict=True)
        ]
        recomputed = [self._recompute(model, script) for script in scripts]
        return [Round(*parts) for parts in zip(scripts, frozen, thawed, live, after, recomputed, strict=True)]

    def _name(self, script: Script, suffix: str = "") -> str:
        return f"{self._id}-{script.kind}{suffix}"

    def _converse_and_freeze(self, model: str, script: Script) -> dict[str, Any]:
        session = self._made.session(self._name(script))
        for turn in script.turns:
            self._show(f"{script.kind} conversation: turn {script.turns.index(turn) + 1} of {len(script.turns)}")
            script.messages.append({"role": "user", "content": turn})
            reply = ask(self._admin, session, model, script.messages, _REPLY_TOKENS)
            script.messages.append({"role": "assistant", "content": reply.text})
        self._show(f"{script.kind} conversation: freezing it")
        body = {"session_id": session, "window_name": self._made.window(self._name(script)), "tags": ["demo"]}
        return self._make("/admin/windows", body)

    def _ask(self, model: str, script: Script, session: str, history: list[dict[str, str]]) -> Answer:
        self._show(f"{script.kind} conversation: asking {script.question!r}")
        question = {"role": "user", "content": script.question}
        return ask(self._admin, session, model, [*history, question], _REPLY_TOKENS)

    def _evict(self, script: Script) -> None:
        self._show(f"{script.kind} conversation: evicting its KV from memory")
        evicted = self._admin.call("POST", window_path(self._name(script), "evict"), body={})
        if evicted["kept"]:
            raise Failure(f"{evicted['kept']} of {evicted['objects']} KV objects could not be evicted from memory")

    def _thaw(self, script: Script) -> dict[str, Any]:
        name = self._name(script)
        if not self._restart:
            self._show(f"{script.kind} conversation: cloning it under another salt")
            apart = self._made.window(self._name(script, "-apart"))
            self._make(window_path(name, "clone"), {"target_window": apart, "isolate": True})
            name = apart
        self._show(f"{script.kind} conversation: thawing it")
        thawed = self._made.session(self._name(script, "-thawed"))
        return self._make(window_path(name, "thaw"), {"new_session_id": thawed})

    def _make(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with uninterrupted():
            return self._admin.call("POST", path, body=body)

    def _recompute(self, model: str, script: Script) -> Answer:
        self._show(f"{script.kind} conversation: computing it again, under another salt")
        session = self._made.session(self._name(script, "-recomputed"))
        question = {"role": "user", "content": script.question}
        return ask(self._admin, session, model, [*script.messages, question], _REPLY_TOKENS)

    def _counter(self, model: str) -> Callable[[str], int]:
        def count(text: str) -> int:
            body = {"model": model, "messages": [{"role": "user", "content": text}]}
            return int(self._admin.call("POST", "/tokenize", body=body)["count"])

        return count


def check_cache(cache: dict[str, Any]) -> None:
    """Without a cache and a durable tier there is nothing to show. Raises Failure."""
    state = cache["lmcache"]["status"]
    if state == "not configured":
        raise Failure(
            "no cache is configured, so a freeze keeps only text: set CWG_CACHE_URL and CWG_KV_DIR, or use `cwg up`"
        )
    if state != "healthy":
        raise Failure(f"the cache is {state}; `cwg doctor` says more")
    if not _DURABLE & cache["tiers"].keys():
        raise Failure(
            "no durable tier is configured, so a freeze keeps only text: set CWG_KV_DIR or CWG_KV_REDIS_URL to where "
            "LMCache writes, or use `cwg up`"
        )


def problems(rounds: list[Round]) -> list[str]:
    """Everything that should have held and did not."""
    return [f"{one.script.kind} conversation: {problem}" for one in rounds for problem in _problems(one)]


def _problems(one: Round) -> Iterator[str]:
    receipt, restored = one.window["receipt"], one.thawed["receipt"]
    if one.window["kv"] != "complete":
        chunks = f"{receipt['chunks']} chunks of {receipt['chunk_size']} tokens"
        yield f"the freeze stored only {chunks} (kv {one.window['kv']})"
    if restored["partial"]:
        yield f"the thaw found {restored['chunks_found']} of {restored['chunks_expected']} chunks"
    if one.after.cached_tokens is None:
        yield "the engine does not report cached_tokens: start it with --enable-prompt-tokens-details"
    elif one.after.cached_tokens < one.cacheable:
        yield f"{one.after.cached_tokens} tokens came from the cache, not {one.cacheable}"
    if one.after.prompt_tokens != one.live.prompt_tokens:
        yield f"the prompt has {one.after.prompt_tokens} tokens after the thaw, not {one.live.prompt_tokens}"
    if one.difference:
        yield f"the answer {one.difference}"
    if one.recomputed.cached_tokens:
        yield f"another salt hit {one.recomputed.cached_tokens} tokens: sessions are not isolated"


def _result(rounds: list[Round], url: str, *, restarted: bool) -> Result:
    wrong = problems(rounds)
    answer = {
        "restarted": restarted,
        "identical": all(one.is_identical for one in rounds),
        "problems": wrong,
        "conversations": [_summary(one) for one in rounds],
    }

    def show() -> None:
        say(f"{rounds[0].script.question}\n{rounds[0].after.text}\n")
        OUT.print(_table(rounds))
        if not wrong:
            say(_NEXT.format(url=url).rstrip())

    return Result(answer, then=show, error="; ".join(wrong))


def _summary(one: Round) -> dict[str, Any]:
    return {
        "kind": one.script.kind,
        "question": one.script.question,
        "answer": one.after.text,
        "answer_live": one.live.text,
        "prompt_tokens": one.after.prompt_tokens,
        "cached_tokens": one.after.cached_tokens,
        "recomputed_cached_tokens": one.recomputed.cached_tokens,
        "bytes": one.window["receipt"]["bytes"],
        "first_token_s": {
            "live": one.live.first_token_s,
            "thawed": one.after.first_token_s,
            "recomputed": one.recomputed.first_token_s,
        },
        "tokens_compared": one.comparison.tokens,
        "largest_logprob_difference": one.comparison.largest,
        "largest_logprob_difference_recomputed": compare(one.live, one.recomputed).largest,
        "identical": one.is_identical,
        "tie_at_token": one.tie,
        "freeze_receipt": one.window["receipt"],
        "thaw_receipt": one.thawed["receipt"],
    }


def _table(rounds: list[Round]) -> Table:
    table = Table("", *(one.script.kind for one in rounds), box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for label, cell in _ROWS.items():
        table.add_row(label, *(Text(cell(one)) for one in rounds))
    return table


def outcome(one: Round) -> str:
    """What the table says of the two answers."""
    if one.tie is not None:
        return f"equal up to a tie at token {one.tie}"
    return "yes" if one.is_identical else "no"


_ROWS: dict[str, Callable[[Round], str]] = {
    "tokens of the prompt": lambda one: f"{one.after.prompt_tokens:,}",
    "of them from the cache": lambda one: f"{one.after.cached_tokens or 0:,}",
    "KV stored": lambda one: f"{one.window['receipt']['bytes'] / 2**20:.1f} MiB",
    "first token, thawed": lambda one: f"{one.after.first_token_s:.2f} s",
    "first token, recomputed": lambda one: f"{one.recomputed.first_token_s:.2f} s",
    "tokens compared": lambda one: str(one.comparison.tokens),
    "largest logprob difference": lambda one: f"{one.comparison.largest:.4f}",
    "identical": outcome,
}

COMMANDS = (demo,)
