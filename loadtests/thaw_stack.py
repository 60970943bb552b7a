"""The real stack under measurement, and what a client does to it: turns, freezes, thaws, clones."""

import json
import random
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from gateway.stack import demo_model, local
from loadtests import machine
from loadtests.thaw_samples import Answer, Frozen, Step

_GATEWAY_WITHIN = 180.0  # it is ready when its self-test has gone through the engine
_TURN_WITHIN = 600.0
_WIPED_WITHIN = 30.0
_NDJSON = "application/x-ndjson"
_LOADED = re.compile(r"Retrieved (\d+) tokens in ([\d.]+) seconds")
Messages = list[dict[str, str]]


class Stack:
    """Gateway, vLLM and LMCache, which can be stopped and started again."""

    def __init__(self, plan: local.Plan, parts: local.Parts) -> None:
        self.plan = plan
        self._services = parts
        self._http = httpx.Client(base_url=plan.url, timeout=_TURN_WITHIN)
        self._engine = httpx.Client(base_url=plan.engine_url, timeout=_TURN_WITHIN)
        self._log_read = 0

    def start_gateway(self) -> None:
        """Start the gateway and wait until it is ready."""
        self._services.gateway.start()
        self._services.gateway.wait_ready(_GATEWAY_WITHIN)

    def restart(self) -> None:
        """Stop all three and start them again: nothing is left but what is on the disk."""
        for part in (self._services.gateway, self._services.engine, self._services.cache):
            part.stop()
        self._services.cache.start()
        self._services.engine.start()
        self._services.cache.wait_ready(local.CACHE_WITHIN)
        self._services.engine.wait_ready(local.ENGINE_WITHIN)
        self._log_read = 0
        self.start_gateway()

    def cpu_s(self) -> float:
        """Processor time that its processes have used."""
        return sum(
            machine.cpu_s(part.pid) for part in (self._services.gateway, self._services.engine, self._services.cache)
        )

    def ask(self, session: str, messages: Messages, max_tokens: int) -> Answer:
        """One greedy streamed turn through the gateway."""
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
                reply.take(line)
        return reply.answer()

    def freeze(self, session: str, window: str, *, again: bool) -> Frozen:
        """Freeze a session; with `again` a second time, under another name."""
        result, steps = self._verb("/admin/windows", {"session_id": session, "window_name": window})
        receipt = result["receipt"]
        if receipt["kv"] != "complete":
            raise RuntimeError(f"{window} was not frozen whole: {result['warnings']}")
        second = self._verb("/admin/windows", {"session_id": session, "window_name": f"{window}.2"}) if again else None
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
        """Thaw a window into a new session; return the answer and its steps."""
        return self._verb(f"/admin/windows/{window}/thaw", {"new_session_id": session, "warm": warm})

    def clone_ms(self, window: str, name: str) -> float:
        """Clone a window; return how long the client waited."""
        began = time.perf_counter()
        self._post(f"/admin/windows/{window}/clone", {"target_window": name})
        return (time.perf_counter() - began) * 1000

    def blocks(self, window: str) -> list[dict[str, Any]]:
        """The KV objects of a window, in order."""
        answer = self._http.get(f"/admin/windows/{window}", params={"include_blocks": "true"})
        return list(answer.raise_for_status().json()["blocks"])

    def window_ids(self, window: str) -> list[int]:
        """The token ids of a window's text, as its next turn begins."""
        messages = self._http.get(f"/admin/windows/{window}/messages").raise_for_status().json()["messages"]
        return self._tokens({"messages": messages, "add_generation_prompt": False})

    def prompt_tokens(self, messages: Messages) -> int:
        """How many tokens the engine makes of a request."""
        return len(self._tokens({"messages": messages}))

    def wipe(self) -> None:
        """Empty vLLM's prefix cache (it has the route in its development mode only)."""
        deadline = time.monotonic() + _WIPED_WITHIN
        # It refuses while blocks are in use, and they are until LMCache has stored what the last turn computed.
        while not self._engine.post("/reset_prefix_cache").raise_for_status().json()["success"]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"vLLM has not emptied its prefix cache within {_WIPED_WITHIN:g} s")
            time.sleep(0.1)

    def loads(self) -> list[tuple[int, float]]:
        """What LMCache says that it gave the engine since this was asked last: tokens and seconds."""
        with self._services.cache.log.open(encoding="utf-8", errors="replace") as log:
            log.seek(self._log_read)
            text = log.read()
            self._log_read = log.tell()
        return [(int(tokens), float(seconds)) for tokens, seconds in _LOADED.findall(text)]

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()
        self._engine.close()

    def _tokens(self, what: Mapping[str, Any]) -> list[int]:
        answer = self._engine.post("/tokenize", json={"model": self.plan.model.served_name, **what})
        return list(answer.raise_for_status().json()["tokens"])

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._http.post(path, json=body)
        if answer.status_code >= 400:
            raise RuntimeError(f"{path} was answered {answer.status_code}: {answer.text}")
        return dict(answer.json())

    def _verb(self, path: str, body: Mapping[str, Any]) -> tuple[dict[str, Any], list[Step]]:
        """A verb of the admin door that tells its progress."""
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
    """The whole stack, gone when this is left."""
    with local.running(options) as (plan, parts):
        stack = Stack(plan, parts)
        try:
            stack.start_gateway()
            yield stack
        finally:
            stack.close()


class Writer:
    """Writes questions of an exact number of tokens, no two alike."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        corpus = Path(demo_model.__file__).with_name("demo_corpus.txt")
        self._words = corpus.read_text(encoding="utf-8").split()

    def question(self, topic: str, tokens: int) -> Messages:
        """A first request of `tokens` tokens, template included; the same topic gives the same text."""
        words = random.Random(topic).choices(self._words, k=tokens)
        fewest, most = 0, tokens
        while fewest < most:
            middle = (fewest + most + 1) // 2
            fewest, most = (middle, most) if self._count(topic, words[:middle]) <= tokens else (fewest, middle - 1)
        chosen = words[:fewest]
        # A letter alone is a token of its own; what is missing is less than a word.
        chosen += ["a"] * (tokens - self._count(topic, chosen))
        if self._count(topic, chosen) != tokens:
            raise RuntimeError(f"no text of exactly {tokens} tokens was found")
        return _asked(topic, chosen)

    def _count(self, topic: str, words: list[str]) -> int:
        return self._stack.prompt_tokens(_asked(topic, words))


def _asked(topic: str, words: list[str]) -> Messages:
    return [{"role": "user", "content": " ".join([topic, *words])}]


class _Reply:
    """Puts a streamed reply together and notes when its first text came."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._first: float | None = None
        self._text: list[str] = []
        self._usage: dict[str, Any] = {}
        self._logprobs: list[tuple[str, float, list[tuple[str, float]]]] = []

    def take(self, line: str) -> None:
        """One line of the stream."""
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
        """Everything, at the end of the stream."""
        if self._first is None:
            raise RuntimeError("a reply held no text")
        return Answer(
            ttft_ms=round((self._first - self._began) * 1000, 2),
            total_ms=round((time.perf_counter() - self._began) * 1000, 2),
            prompt_tokens=self._usage["prompt_tokens"],
            cached_tokens=(self._usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            text="".join(self._text),
            logprobs=self._logprobs,
        )
