"""Metrics: exact after known traffic, the same as text and JSON, documented, bounded, and one sum over all workers."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.errors import StartError
from gateway.records import Turn, Usage
from gateway.telemetry.metrics import METRICS, Metrics, Stored, clear, forget
from tests.support.admin_requests import error_of
from tests.support.fakes.engine import MODEL, Exchange, FakeEngine, delta, usage_of, whole_reply
from tests.support.gateway_process import ROOT, Gateway, eventually, gateway_in_front_of
from tests.support.raw_http import RawHttpClient
from tests.support.worker_crew import COUNT, ask, chat, crew, pid_of, pids, two_workers, workers_of

Labels = tuple[tuple[str, str], ...]
Numbers = dict[tuple[str, Labels], float]

# What moves by itself between two looks.
LIVE = {"cwg_event_loop_lag_seconds", "cwg_turns_in_flight", "cwg_turns_unrecorded"}


@pytest.fixture
def gateway(engine: FakeEngine, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway that has counted nothing yet."""
    with gateway_in_front_of(engine.url, tmp_path, busy_wait_s=0.2) as gateway:
        yield gateway


def numbers(text: str) -> Numbers:
    """Every sample of Prometheus' text format, by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(gateway: Gateway) -> Numbers:
    """What Prometheus would get now."""
    return numbers(gateway.http.get("/metrics").raise_for_status().text)


def value(seen: Numbers, name: str, **labels: str) -> float:
    """One number; it has to be there."""
    return seen[name, tuple(sorted(labels.items()))]


def test_turns_and_tokens_are_exact_after_known_traffic(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    engine.on_chat = lambda exchange: exchange.json(whole_reply("Hello", usage_of(100, 7, 64)))
    for _ in range(5):
        gateway.chat(session)
    engine.on_chat = lambda exchange: exchange.json({"error": {"message": "no"}}, 400)
    gateway.chat(session)
    seen = scrape(gateway)
    assert value(seen, "cwg_turns_total", dialect="chat", model=MODEL, outcome="completed") == 5
    assert value(seen, "cwg_turns_total", dialect="chat", model=MODEL, outcome="engine_error") == 1
    assert value(seen, "cwg_prompt_tokens_total", model=MODEL) == 500
    assert value(seen, "cwg_completion_tokens_total", model=MODEL) == 35
    assert value(seen, "cwg_cached_tokens_total", model=MODEL) == 320
    assert value(seen, "cwg_turn_seconds_count", dialect="chat") == 6
    assert value(seen, "cwg_overhead_seconds_count", dialect="chat") == 6
    assert value(seen, "cwg_turns_in_flight") == 0
    assert value(seen, "cwg_turns_unrecorded") == 0
    assert value(seen, "cwg_workers") == 1


def test_what_is_spent_on_our_own_work_is_less_than_the_turn(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    for _ in range(20):
        gateway.chat(session)
    seen = scrape(gateway)
    overhead = value(seen, "cwg_overhead_seconds_sum", dialect="chat")
    assert 0 < overhead < value(seen, "cwg_turn_seconds_sum", dialect="chat")
    assert value(seen, "cwg_overhead_seconds_bucket", dialect="chat", le="+Inf") == 20


def test_outcomes_not_caused_by_the_client_are_distinguished(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    def cut(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(delta(content="half"))
        exchange.cut()

    def stall(exchange: Exchange) -> None:
        exchange.gone()

    engine.on_chat = cut
    gateway.chat(session, stream=True)
    engine.on_chat = stall
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True)
        eventually(lambda: value(scrape(gateway), "cwg_turns_in_flight") == 1, "the turn is under way")
    gone = ("cwg_turns_total", (("dialect", "chat"), ("model", MODEL), ("outcome", "client_gone")))
    eventually(lambda: scrape(gateway).get(gone) == 1, "it is seen that the client has gone")
    seen = scrape(gateway)
    assert value(seen, "cwg_turns_total", dialect="chat", model=MODEL, outcome="engine_cut") == 1
    assert value(seen, "cwg_turns_in_flight") == 0


def test_a_model_that_is_not_served_makes_no_series_of_its_own(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    engine.on_chat = lambda exchange: exchange.json({"error": {"message": "no such model"}}, 404)
    for number in range(5):
        gateway.chat(session, model=f"made-up-{number}")
    text = gateway.http.get("/metrics").text
    assert "made-up" not in text
    assert session not in text
    assert value(numbers(text), "cwg_turns_total", dialect="chat", model="", outcome="engine_error") == 5


def test_operations_are_counted_by_result_and_windows_from_the_store(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    gateway.chat(session)
    assert gateway.freeze(session, "w").status_code == 201
    assert gateway.freeze(session, "w").status_code == 409
    assert gateway.freeze("nobody", "x").status_code == 404
    assert gateway.http.post("/admin/windows/w/thaw", json={}).status_code == 200
    assert gateway.http.post("/admin/windows/w/clone", json={"target_window": "v"}).status_code == 201
    assert value(scrape(gateway), "cwg_windows", kv="absent") == 2
    assert gateway.http.delete("/admin/windows/w").status_code == 200
    assert gateway.http.delete("/admin/windows/w").status_code == 404
    seen = scrape(gateway)
    for verb, result in (
        ("freeze", "ok"), ("freeze", "window_already_exists"), ("freeze", "session_not_found"), ("thaw", "ok"),
        ("clone", "ok"), ("delete", "ok"), ("delete", "window_not_found"),
    ):  # fmt: skip
        assert value(seen, "cwg_verbs_total", verb=verb, result=result) == 1
    assert value(seen, "cwg_verb_seconds_count", verb="freeze") == 1
    assert value(seen, "cwg_windows", kv="absent") == 1


def test_an_engine_that_is_down_is_counted(engine: FakeEngine, gateway: Gateway) -> None:
    where = engine.url.removeprefix("http://")
    assert value(scrape(gateway), "cwg_engine_up", engine=where) == 1
    engine.stop()
    try:
        eventually(lambda: value(scrape(gateway), "cwg_engine_up", engine=where) == 0, "it is noticed", within=30)
    finally:
        engine.start()


def test_json_holds_what_the_text_format_holds(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    gateway.freeze(session, "w")
    rows = gateway.http.get("/admin/metrics").json()["metrics"]
    as_json = {(r["name"], tuple(sorted(r["labels"].items()))): r["value"] for r in rows}
    as_text = scrape(gateway)
    assert as_json.keys() == as_text.keys()
    assert {k: v for k, v in as_json.items() if k[0] not in LIVE} == {
        k: v for k, v in as_text.items() if k[0] not in LIVE
    }
    assert all(row["help"] and row["type"] in ("counter", "gauge", "histogram") for row in rows)
    assert error_of(gateway.http.get("/admin/metrics?x=1")) == (400, "unknown_parameter")


def test_metrics_require_the_key(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, api_key="k3y") as gateway:
        for path in ("/metrics", "/admin/metrics"):
            assert error_of(httpx.get(gateway.url + path)) == (401, "unauthorized")
            assert httpx.get(gateway.url + path, headers={"authorization": "Bearer k3y"}).status_code == 200


def test_a_variable_meant_for_another_process_does_no_harm(
    engine: FakeEngine, tmp_path: Path, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "elsewhere"))  # vLLM sets it for itself
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        gateway.chat(session)
        assert value(scrape(gateway), "cwg_turn_seconds_count", dialect="chat") == 1


def test_the_text_is_what_prometheus_reads(gateway: Gateway) -> None:
    response = gateway.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert response.text.endswith("\n")
    assert error_of(gateway.http.post("/metrics")) == (405, "method_not_allowed")


# --- the table


def test_docs_have_every_metric_as_the_code_has_it() -> None:
    _, rest = (ROOT / "docs/metrics.md").read_text().split("<!-- metrics -->")
    listed, _ = rest.split("<!-- /metrics -->")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in listed.strip().splitlines()]
    assert rows[0] == ["metric", "kind", "labels", "what it is"]
    assert set(rows[1]) == {"---"}
    assert rows[2:] == [[f"`{m.name}`", m.kind, ", ".join(f"`{x}`" for x in m.labels), m.help] for m in METRICS]


def test_exactly_the_documented_metrics_are_exported_with_their_labels() -> None:
    metrics = Metrics()
    use_all(metrics)
    text = metrics.text(Stored({"complete": 1}, {"disk": (2, 3)}, {"turn": (4, 0.5)})).decode()
    families = list(text_string_to_metric_families(text))
    told = {
        (f"{family.name}_total" if family.type == "counter" else family.name, family.type): {
            tuple(sorted(sample.labels.keys() - {"le"})) for sample in family.samples
        }
        for family in families
    }
    assert told == {(m.name, m.kind): {m.labels} for m in METRICS}


def use_all(metrics: Metrics) -> None:
    """Count in every metric."""
    turn = Turn("t", "s", MODEL, "completed", 200, 0.0, 1500.0, Usage(3, 2, None))
    metrics.count_turn(turn, "chat", 0.001, served=True)
    metrics.count_miss("evicted")
    metrics.count_spans("dropped", 2)
    for name in ("cwg_engine_up", "cwg_engine_draining", "cwg_cache_up"):
        metrics.watch_address(name, "http://user:password@host:1/v1", lambda: True)
    for name in ("cwg_turns_in_flight", "cwg_turns_unrecorded"):
        metrics.register_gauge(name, lambda: 4)
    with metrics.operation("freeze"):
        pass


def test_no_password_is_exported() -> None:
    metrics = Metrics()
    use_all(metrics)
    assert 'engine="host:1"' in (text := metrics.text(Stored({}, {})).decode())
    assert "password" not in text


def test_an_engine_that_is_forgotten_is_exported_no_more() -> None:
    metrics = Metrics()
    use_all(metrics)
    metrics.watch_address("cwg_engine_up", "http://other:1", lambda: False)
    metrics.forget_address("http://user:password@host:1/v1")
    text = metrics.text(Stored({}, {})).decode()
    assert "host:1" not in text.replace("other:1", "")
    assert 'cwg_engine_up{engine="other:1"} 0.0' in text


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_an_operation_that_raises_is_counted_as_failed(raised: type[BaseException]) -> None:
    metrics = Metrics()

    def breaks() -> None:
        with metrics.operation("thaw"):
            raise raised

    with pytest.raises(raised):
        breaks()
    seen = numbers(metrics.text(Stored({}, {})).decode())
    assert value(seen, "cwg_verbs_total", verb="thaw", result="failed") == 1
    assert ("cwg_verb_seconds_count", (("verb", "thaw"),)) not in seen


# --- several workers


def test_whichever_worker_is_asked_answers_for_all(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    engine.on_chat = lambda exchange: exchange.json(whole_reply("Hello", usage_of(10, 2, 5)))
    with crew(engine, tmp_path) as gateway, two_workers(gateway) as (one, other):
        for wire, turns in ((one, 3), (other, 4)):
            for _ in range(turns):
                chat(wire, session)
        ask(one, "POST", "/admin/windows", session_id=session, window_name="w")
        for wire in (one, other):
            seen = told(wire)
            assert value(seen, "cwg_turns_total", dialect="chat", model=MODEL, outcome="completed") == 7
            assert value(seen, "cwg_prompt_tokens_total", model=MODEL) == 70
            assert value(seen, "cwg_turn_seconds_count", dialect="chat") == 7
            assert value(seen, "cwg_verbs_total", verb="freeze", result="ok") == 1
            assert value(seen, "cwg_windows", kv="absent") == 1
            assert value(seen, "cwg_workers") == COUNT
            # Another worker reports it only now and then.
            eventually(lambda wire=wire: value(told(wire), "cwg_turns_in_flight") == 0, "nothing is in flight")  # type: ignore[misc]
            assert value(seen, "cwg_engine_up", engine=engine.url.removeprefix("http://")) == 1


def test_the_counters_of_a_killed_worker_are_kept(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    with crew(engine, tmp_path) as gateway:
        for pid in sorted(workers_of(gateway.process.pid)):
            turns_on(gateway, pid, f"{session}-{pid}")
        victim = min(workers_of(gateway.process.pid))
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: victim not in (now := pids(gateway)) and len(now) == COUNT, "another takes its place")
        with RawHttpClient(gateway.url) as wire:
            assert value(told(wire), "cwg_turns_total", dialect="chat", model=MODEL, outcome="completed") == COUNT
        for pid in sorted(workers_of(gateway.process.pid)):
            turns_on(gateway, pid, f"{session}-{pid}-again")
        with RawHttpClient(gateway.url) as wire:
            seen = told(wire)
        assert value(seen, "cwg_turns_total", dialect="chat", model=MODEL, outcome="completed") == 2 * COUNT
        assert value(seen, "cwg_workers") == COUNT
        files = {path.name for path in (gateway.data_dir / "metrics").iterdir()}
        assert len(files) == 4 * COUNT  # however many have died
        gateway.stop()
        gateway.start().wait()
        assert ("cwg_turn_seconds_count", (("dialect", "chat"),)) not in scrape(gateway)


def told(wire: RawHttpClient) -> Numbers:
    """The numbers, from the worker at the other end."""
    rows = ask(wire, "GET", "/admin/metrics").json()["metrics"]
    return {(r["name"], tuple(sorted(r["labels"].items()))): r["value"] for r in rows}


def turns_on(gateway: Gateway, pid: int, session: str) -> None:
    """One turn on this very worker."""
    while True:
        with RawHttpClient(gateway.url) as wire:
            if pid_of(wire) == pid:
                chat(wire, session)
                ask(wire, "GET", f"/admin/sessions/{session}")  # recorded, and so counted
                return


def test_an_unusable_metrics_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="metrics"):
        clear(tmp_path / "file" / "metrics")


def test_forgetting_a_worker_takes_its_gauges_and_leaves_its_counts(tmp_path: Path) -> None:
    for name in ("gauge_livesum_1.db", "gauge_livemax_1.db", "gauge_livesum_2.db", "counter_1.db", "histogram_1.db"):
        (tmp_path / name).touch()
    forget(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"gauge_livesum_2.db", "counter_1.db", "histogram_1.db"}
