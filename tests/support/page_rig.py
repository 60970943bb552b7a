"""A gateway with something to look at: conversations, windows with KV on disk, a lineage, misses, automatic windows."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.fakes.engine import MODEL, Exchange, FakeEngine, render, whole_reply
from tests.support.fakes.lmcache import FakeLMCache
from tests.support.gateway_process import Gateway, gateway_in_front_of

CONTEXT = 32768
_SYSTEM = "You are the coding agent of the payments team. Answer briefly, and say what you are not sure of."
_BILLING = (
    (
        "We bill some customers twice after the move to the new scheduler. Where would you look first?",
        "At the retry of the nightly job. The old scheduler took a lock on (customer, period); the new one retries a "
        "task that has timed out although its first run is still going, so both write an invoice.\n\n"
        "1. invoices/run.py: is the insert keyed by (customer_id, period)?\n"
        "2. scheduler.yaml: is the task's time-out longer than its slowest run?",
    ),
    (
        "The insert has no unique key. What did we decide about that in the spring?",
        "You decided to keep invoices append-only and to put the uniqueness into a claims table, because the tax "
        "export reads invoices by insertion order. So: INSERT INTO billing_claims first, and write "
        "the invoice only if that has inserted a row.",
    ),
    (
        "Write the migration for the claims table, please.",
        "CREATE TABLE billing_claims (\n    customer_id BIGINT NOT NULL,\n    period      DATE NOT NULL,\n"
        "    claimed_at  TIMESTAMPTZ NOT NULL DEFAULT now(),\n    PRIMARY KEY (customer_id, period)\n);\n\n"
        "Fill it from the invoices of the last 24 months before the job uses it, or the first night bills everybody "
        "who was billed already.",
    ),
    (
        "And if the job dies between the claim and the invoice?",
        "Then that customer is not billed, which is better than twice, but has to be seen: a claim without an invoice "
        "that is older than an hour should alert. Or do both in one transaction; they are in one database, so that is "
        "what I would do.",
    ),
)
_BRANCH_A = (
    (
        "Take approach A: one transaction. Show me the job.",
        "with db.begin() as tx:\n    claimed = tx.execute(CLAIM, customer, period).rowcount\n    if claimed:\n"
        "        tx.execute(INVOICE, customer, period, amount)",
    ),
    ("Does that hold under READ COMMITTED?", "Yes: the primary key of the claim decides, at any isolation level."),
)
_BRANCH_B = (
    ("Take approach B: the claim first, and an alert.", "Then the alert is part of the change. It needs an owner."),
)
_LOGS = (
    ("Read tonight's logs of the gateway and tell me what is odd.", "Three time-outs at 02:14, all of one engine."),
    ("Which engine was it?", "engine-2; its queue was full from 02:12 to 02:16."),
)
_WEATHER = (
    ("明日の東京の天気を教えて。", "晴れ、最高気温は12度の見込みです。"),
    ("ありがとう 🙏", "どういたしまして。"),
)


@dataclass(frozen=True, slots=True)
class PageRig:
    """The gateway, and the fakes behind it."""

    gateway: Gateway
    engine: FakeEngine
    cache: FakeLMCache

    def talk(self, session: str, turns: Sequence[tuple[str, str]], system: str = _SYSTEM) -> list[dict[str, Any]]:
        """Have a conversation: the engine gives the replies that are written here."""
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
        for question, reply in turns:
            messages.append({"role": "user", "content": question})
            self.say(session, messages, {"content": reply})
        return messages

    def say(self, session: str, messages: list[dict[str, Any]], reply: Mapping[str, Any], model: str = MODEL) -> None:
        """Send one turn, and add its reply to the messages."""
        self.engine.on_chat = lambda exchange: self._answer(exchange, reply)
        answer = self.gateway.http.post(
            f"/s/{session}/v1/chat/completions", json={"model": model, "messages": messages, "max_tokens": 200}
        )
        assert answer.status_code == 200, answer.text
        messages.append(answer.json()["choices"][0]["message"])
        self.engine.on_chat = self.engine.answer_chat

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """Send an operation."""
        answer = self.gateway.http.post(f"/admin/{path}", json=body)
        assert answer.status_code < 300, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def freeze(self, session: str, window: str, **more: Any) -> None:
        """Freeze a session."""
        self.post("windows", session_id=session, window_name=window, **more)

    def _answer(self, exchange: Exchange, reply: Mapping[str, Any]) -> None:
        body = exchange.request.json
        ids = render(body["messages"], generation_prompt=True)
        self.engine.on_computed(body, ids)
        said = f"{reply.get('content') or ''}</>".encode()
        usage = self.engine._usage(body.get("cache_salt"), ids, completion=len(said))
        self.engine._kv[body.get("cache_salt") or ""].append([*ids, *said])  # the KV of the reply is there too
        answer = whole_reply("", usage)
        answer["choices"][0]["message"].update(reply)
        exchange.json(answer)


@contextmanager
def page_rig(engine: FakeEngine, folder: Path, *, object_bytes: int = 200, **settings: object) -> Iterator[PageRig]:
    """An empty gateway in front of an engine and a cache."""
    engine.context_limit = CONTEXT
    cache = FakeLMCache(folder / "kv", object_bytes=object_bytes).start().behind(engine)
    try:
        own = {"cache_url": cache.url, "kv_dir": cache.folder, "freeze_timeout_s": 5, "auto_freeze": True}
        with gateway_in_front_of(engine.url, folder, **{**own, **settings}) as gateway:
            yield PageRig(gateway, engine, cache)
    finally:
        cache.stop()


def seed(rig: PageRig) -> None:
    """Fill it: a lineage with branches, tags, an expiry, a miss, a tool call, other scripts."""
    rig.talk("payments-1", _BILLING)
    about = "Double billing: the cause, and the claims table that was decided on"
    rig.freeze("payments-1", "billing-decision", description=about, tags=["billing", "decision"])
    for branch, turns in (("approach-a", _BRANCH_A), ("approach-b", _BRANCH_B)):
        rig.post("windows/billing-decision/thaw", new_session_id=branch, warm="gpu")
        rig.talk(branch, [*_BILLING, *turns][len(_BILLING) :], _SYSTEM)
    rig.freeze("approach-a", "billing-approach-a", tags=["billing"], ttl_seconds=86400 * 14)
    rig.post("windows/billing-decision/clone", target_window="billing-for-audit", description="For the auditors")
    rig.talk("logs-0211", _LOGS)
    rig.talk("logs-0211", _LOGS[:1], f"{_SYSTEM} It is 02:30.")  # another system prompt: a miss
    rig.freeze("logs-0211", "auto-logs-0211-20261130", tags=["auto"], ttl_seconds=86400 * 30)
    rig.talk("tokyo", _WEATHER, "あなたは親切なアシスタントです。")
    _tool_call(rig)
    rig.post("windows/billing-decision/prefetch")


def _tool_call(rig: PageRig) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "How many invoices were written twice last night?"}]
    function = {"name": "query", "arguments": '{"sql": "SELECT count(*) FROM invoices GROUP BY customer_id, period"}'}
    call = {"id": "call-1", "type": "function", "function": function}
    rig.say("tools-1", messages, {"content": None, "tool_calls": [call]})
    messages.append({"role": "tool", "tool_call_id": "call-1", "content": "41"})
    rig.say("tools-1", messages, {"content": "41 customers have two invoices of last night."})
    rig.freeze("tools-1", "invoice-count", tags=["billing"])
