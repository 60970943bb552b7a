"""The real stack under measurement, and the requests of a client: turns, freezes, thaws, clones."""

import json
import random
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from gateway.stack import commands, demo_model, local
from loadtests import machine
from loadtests.thaw_samples import Answer, Frozen, Step
from tests.support import local_stack

_GATEWAY_READY_S = 180.0  # ready once its self-test has passed through the engine
_TURN_TIMEOUT_S = 600.0
_WIPE_TIMEOUT_S = 30.0
_NDJSON = "application/x-ndjson"
_LOADED = re.compile(r"Retrieved (\d+) tokens in ([\d.]+) seconds")
Messages = list[dict[str, str]]


class Stack:
    """Gateway, vLLM and LMCache, which can be restarted."""

    def __init__(self, plan: local.Plan, processes: commands.Processes) -> None:
        self.plan = plan
        self._processes = processes
        self._http = httpx.Client(base_url=plan.url, timeout=_TURN_TIMEOUT_S)
        self._engine = httpx.Client(base_url=plan.engine_url, timeout=_TURN_TIMEOUT_S)
        self._log_read = 0

    def start_gateway(self) -> None:
        """Start the gateway and wait until it is ready."""
        self._processes.gateway.start()
        local_stack.wait_ready(self._processes.gateway, _GATEWAY_READY_S)

    def restart(self) -> None:
        """Restart all three: only what is on disk survives."""
        for part in (self._processes.gateway, self._processes.engine, self._processes.cache):
            part.stop()
        local_stack.start(self._processes)
        self._log_read = 0
        self.start_gateway()

    def cpu_s(self) -> float:
        """Return the CPU time that its processes have used."""
        return sum(
            machine.cpu_s(part.pid) for part in (self._processes.gateway, self._processes.engine, self._processes.cache)
        )

    def ask(self, session: str, messages: Messages, max_tokens: int) -> Answer:
        """Send one greedy streamed turn through the gateway."""
        body = {
            "model": self.plan.model.served_name, "messages": messages, "stream": True, "max_tokens": max_tokens,
            "temperature": 0, "seed": 1, "ignore_eos": True, "logprobs": True, "top_logprobs": 3,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        reply = _Reply()
        with self._http.stream("POST", f"/s/{session}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"a turn was answered {response.status_code}: {response.read().decode()}")
            for line in response.iter_lines():
                reply.add(line)
        return reply.answer()

    def freeze(self, session: str, window: str, *, again: bool) -> Frozen:
        """Freeze a session; with `again` a second time under another name."""
        result, steps = self._operation("/admin/windows", {"session_id": session, "window_name": window})
        receipt = result["receipt"]
        if receipt["kv"] != "complete":
            raise RuntimeError(f"{window} was not frozen completely: {result['warnings']}")
        second = (
            self._operation("/admin/windows", {"session_id": session, "window_name": f"{window}.2"}) if again else None
        )
        return Frozen(
            window=window,
            tokens=receipt["tokens"],
            chunks=receipt["chunks"],
            bytes=receipt["bytes"],
            computed=(receipt["prompt_tokens"] or 0) - (receipt["cached_tokens"] or 0),
            duration_ms=receipt["duration_ms"],
            again_ms=second[0]["receipt"]["duration_ms"] if second else None,
            steps=steps,
        )

    def thaw(self, window: str, session: str, warm: str) -> tuple[dict[str, Any], list[Step]]:
        """Thaw a window into a new session; return the result and its progress steps."""
        return self._operation(f"/admin/windows/{window}/thaw", {"new_session_id": session, "warm": warm})

    def compute_s(self, ids: list[int], salt: str) -> float:
        """Have the engine compute tokens under a salt of its own; return the seconds until its first token."""
        body = {
            "model": self.plan.model.served_name, "prompt": ids, "cache_salt": salt, "max_tokens": 1, "temperature": 0
        }  # fmt: skip
        began = time.perf_counter()
        answer = self._engine.post("/v1/completions", json=body).raise_for_status().json()
        took = time.perf_counter() - began
        if cached := (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens"):
            raise RuntimeError(f"{cached} tokens were not computed: salt {salt!r} was used before")
        return took

    def get(self, path: str) -> dict[str, Any]:
        """Return an answer of the admin API."""
        return dict(self._http.get(path).raise_for_status().json())

    def clone_ms(self, window: str, name: str) -> float:
        """Clone a window; return the client's waiting time in milliseconds."""
        began = time.perf_counter()
        self._post(f"/admin/windows/{window}/clone", {"target_window": name})
        return (time.perf_counter() - began) * 1000

    def blocks(self, window: str) -> list[dict[str, Any]]:
        """Return the KV objects of a window, in order."""
        answer = self._http.get(f"/admin/windows/{window}", params={"include_blocks": "true"})
        return list(answer.raise_for_status().json()["blocks"])

    def window_ids(self, window: str) -> list[int]:
        """Return the token ids of a window's text, as its next turn begins."""
        messages = self._http.get(f"/admin/windows/{window}/messages").raise_for_status().json()["messages"]
        return self._tokens({"messages": messages, "add_generation_prompt": False})

    def prompt_tokens(self, messages: Messages) -> int:
        """Return the engine's token count of a request."""
        return len(self._tokens({"messages": messages}))

    def wipe(self) -> None:
        """Empty vLLM's prefix cache (the route exists only in its development mode)."""
        deadline = time.monotonic() + _WIPE_TIMEOUT_S
        # vLLM refuses while blocks are in use, which they are until LMCache has stored what the last turn computed.
        while not self._engine.post("/reset_prefix_cache").raise_for_status().json()["success"]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"vLLM has not emptied its prefix cache within {_WIPE_TIMEOUT_S:g} s")
            time.sleep(0.1)

    def loads(self) -> list[tuple[int, float]]:
        """Return the loads that LMCache has logged since the last call: tokens and seconds."""
        with self._processes.cache.log.open(encoding="utf-8", errors="replace") as log:
            log.seek(self._log_read)
            text = log.read()
            self._log_read = log.tell()
        return [(int(tokens), float(seconds)) for tokens, seconds in _LOADED.findall(text)]

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        self._engine.close()

    def _tokens(self, request: Mapping[str, Any]) -> list[int]:
        answer = self._engine.post("/tokenize", json={"model": self.plan.model.served_name, **request})
        return list(answer.raise_for_status().json()["tokens"])

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._http.post(path, json=body)
        if answer.status_code >= 400:
            raise RuntimeError(f"{path} was answered {answer.status_code}: {answer.text}")
        return dict(answer.json())

    def _operation(self, path: str, body: Mapping[str, Any]) -> tuple[dict[str, Any], list[Step]]:
        """Call a window operation of the admin API; return its result and its progress steps."""
        began, steps, last = time.perf_counter(), [], {}
        with self._http.stream("POST", path, json=body, headers={"accept": _NDJSON}) as response:
            for line in response.iter_lines():
                last = json.loads(line)
                if "progress" in last:
                    steps.append(Step(**last["progress"], at_ms=round((time.perf_counter() - began) * 1000, 1)))
        if last.get("status", 500) >= 400:
            raise RuntimeError(f"{path} was answered {last}")
        return dict(last["result"]), steps


@contextmanager
def running(options: local.LocalStack) -> Iterator[Stack]:
    """Run the whole stack."""
    with local_stack.running(options) as (plan, parts):
        stack = Stack(plan, parts)
        try:
            stack.start_gateway()
            yield stack
        finally:
            stack.close()


class Writer:
    """Writes questions of an exact number of tokens, each different."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        corpus = Path(demo_model.__file__).with_name("demo_corpus.txt")
        self._words = corpus.read_text(encoding="utf-8").split()

    def question(self, topic: str, tokens: int) -> Messages:
        """Return a first request of `tokens` tokens, including the template; the same topic gives the same text."""
        words = random.Random(topic).choices(self._words, k=tokens)
        fewest, most = 0, tokens
        while fewest < most:
            middle = (fewest + most + 1) // 2
            fewest, most = (middle, most) if self._count(topic, words[:middle]) <= tokens else (fewest, middle - 1)
        selected = words[:fewest]
        # Less than one word is missing; a single letter is one token.
        selected += ["a"] * (tokens - self._count(topic, selected))
        if self._count(topic, selected) != tokens:
            raise RuntimeError(f"no text of exactly {tokens} tokens was found")
        return _question(topic, selected)

    def _count(self, topic: str, words: list[str]) -> int:
        return self._stack.prompt_tokens(_question(topic, words))


def _question(topic: str, words: list[str]) -> Messages:
    return [{"role": "user", "content": " ".join([topic, *words])}]


class _Reply:
    """Assembles a streamed reply, and records when its first text arrived."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._first: float | None = None
        self._text: list[str] = []
        self._usage: dict[str, Any] = {}
        self._logprobs: list[tuple[str, float, list[tuple[str, float]]]] = []

    def add(self, line: str) -> None:
        """Add one line of the stream."""
        data = line.removeprefix("data: ")
        if data in {line, "[DONE]"}:
            return
        event = json.loads(data)
        if "error" in event:
            raise RuntimeError(f"the engine failed in mid-stream: {event['error']}")
        self._usage = event.get("usage") or self._usage
        for choice in event["choices"]:
            content = choice["delta"].get("content")
            if content:
                self._first = self._first or time.perf_counter()
                self._text.append(content)
            for token in (choice.get("logprobs") or {}).get("content") or ():
                rest = [(other["token"], other["logprob"]) for other in token["top_logprobs"]]
                self._logprobs.append((token["token"], token["logprob"], rest))

    def answer(self) -> Answer:
        """Return the complete turn at the end of the stream."""
        if self._first is None:
            raise RuntimeError("the reply had no text")
        return Answer(
            ttft_ms=round((self._first - self._began) * 1000, 2),
            total_ms=round((time.perf_counter() - self._began) * 1000, 2),
            prompt_tokens=self._usage["prompt_tokens"],
            cached_tokens=(self._usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            text="".join(self._text),
            logprobs=self._logprobs,
        )
