"""The gateway's own requests to vLLM: list models, render token ids, compute a prefix.

Requests of clients do not come through here; the relay streams them over `gateway.engines.connection_pool`.
"""

import asyncio
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import httpx
from blake3 import blake3

from gateway.dialects import transcripts
from gateway.dialects.base import engine_token_counts
from gateway.engines.cache_use import CacheUse
from gateway.engines.connection import TIMEOUT_HINT, UNREACHABLE_HINT
from gateway.errors import GatewayError
from gateway.records import Message, Usage
from gateway.runtime.open_files import OutOfFiles
from gateway.runtime.stalls import LostSince, caused_by_own_stall, never_lost

TOO_LONG = "maximum context length"
"""In vLLM's refusal of a prompt (vllm/renderers/params.py)."""

_MODELS_EVERY_S = 1.0
_UNSTORED: Mapping[str, Any] = {"kv_transfer_params": {"lmcache.max_offload_tokens": 0}}
Reply = httpx.Response

AbortRisk = Literal["none", "patched", "exposed", "unknown"]
"""Whether aborting a request during its KV load may crash an engine: it loads none; its connector is patched
(`gateway.stack.connector`); it may; its metrics are not available."""
_PATCHED = re.compile(r"^vllm:lmcache_mp_abort_safe\b.* 1(\.0)?$", re.MULTILINE)
_CONNECTOR = "vllm:lmcache_mp_lookup_duration_seconds"  # a metric of LMCacheMPConnector 0.5, there from the start


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the engine serves. `root` is the `--model` string, which LMCache's keys hold."""

    id: str
    root: str
    context_limit: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class ModelReply:
    """A reply of the model to the gateway itself."""

    text: str
    reasoning: str | None
    finish_reason: str | None
    usage: Usage


class EngineClient(ABC):
    """The gateway's own requests; `ask` decides which engine they go to."""

    @abstractmethod
    async def ask(self, method: str, path: str, *, json: Mapping[str, Any] | None = None, quick: bool = False) -> Reply:
        """Return the response, whatever its status; `quick` is for requests that cost even a busy engine nothing.

        Raises `engine_unreachable`, `engine_timeout`.
        """

    @abstractmethod
    async def models(self) -> dict[str, Model]:
        """Ask which models are served. Raises `engine_unreachable`, `engine_timeout`."""

    async def model(self, name: str) -> Model:
        """Return one model as it is served now. Raises `model_mismatch` when it is not."""
        served = await self.models()
        if name not in served:
            raise GatewayError(
                "model_mismatch",
                f"the engine does not serve model {name!r}",
                hint=f"it serves {', '.join(sorted(served)) or 'nothing'}; start it with that model",
                details={"model": name, "served": sorted(served)},
            )
        return served[name]

    async def render(
        self, model: str, frame: Mapping[str, Any], messages: Sequence[Message], *, any_length: bool = False
    ) -> list[int]:
        """Return the token ids of a transcript as its next turn begins: no generation prompt at the end.

        Asks `/v1/chat/completions/render` (needs `--enable-scale-out`), which renders as a request does; if the engine
        does not have that, `/tokenize`, which supports fewer fields. With `any_length` also if the transcript is longer
        than the context, which only `/tokenize` accepts.
        """
        body = {**frame, "model": model, "add_generation_prompt": False}
        answer = await self._with_messages(partial(self._render, any_length=any_length), body, messages)
        return list(answer["token_ids"] if "token_ids" in answer else answer["tokens"])

    async def _with_messages(
        self, send: Callable[[dict[str, Any]], Awaitable[Reply]], body: dict[str, Any], messages: Sequence[Message]
    ) -> dict[str, Any]:
        response = await send({**body, "messages": list(messages)})
        if response.status_code == 400 and (hoisted := transcripts.hoisted(messages)):
            # The template wants its system message first: the Messages API was rendered like this as well.
            response = await send({**body, "messages": hoisted})
        return _checked(response)

    async def _render(self, body: dict[str, Any], *, any_length: bool) -> Reply:
        response = await self.ask("POST", "/v1/chat/completions/render", json=body)
        too_long = response.status_code == 400 and TOO_LONG in response.text
        if response.status_code in (403, 404) or (too_long and any_length):
            return await self.ask("POST", "/tokenize", json=body)
        return response

    async def tokenize(self, model: str, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of a plain text; with `special` tokens as a completion of it would have them."""
        body = {"model": model, "prompt": text, "add_special_tokens": special}
        return list(_checked(await self.ask("POST", "/tokenize", json=body))["tokens"])

    async def prefill(self, model: str, token_ids: Sequence[int], salt: str, *, store: bool = True) -> Usage:
        """Compute (or load) the KV of `token_ids` under `salt` by sampling one token; return the engine's count.

        Without `store` the cache is asked not to store it.
        """
        extra = {} if store else _UNSTORED
        answer = await self.complete(model, token_ids, salt, max_tokens=1, **extra)
        return engine_token_counts(answer.get("usage")) or Usage(len(token_ids), 1)

    async def complete(
        self, model: str, token_ids: Sequence[int], salt: str, *, max_tokens: int, **extra: Any
    ) -> dict[str, Any]:
        """A greedy completion of exact token ids. Raises `engine_unreachable`, `engine_timeout`, `internal`."""
        body = {
            "model": model,
            "prompt": list(token_ids),
            "cache_salt": salt,
            "max_tokens": max_tokens,
            "temperature": 0,
            **extra,
        }
        return _checked(await self.ask("POST", "/v1/completions", json=body))

    async def chat(
        self, model: str, frame: Mapping[str, Any], messages: Sequence[Message], salt: str, *, max_tokens: int
    ) -> ModelReply:
        """Return a greedy reply to a conversation; the cache is asked not to store its KV.

        Raises `invalid_request` if the engine refuses it, `engine_unreachable`, `engine_timeout`.
        """
        body = {**frame, "model": model, "cache_salt": salt, "max_tokens": max_tokens, "temperature": 0, **_UNSTORED}

        async def send(full: dict[str, Any]) -> Reply:
            return await self.ask("POST", "/v1/chat/completions", json=full)

        answer = await self._with_messages(send, body, messages)
        choice = answer["choices"][0]
        message = choice["message"]
        return ModelReply(
            message.get("content") or "",
            message.get("reasoning") or message.get("reasoning_content"),
            choice.get("finish_reason"),
            engine_token_counts(answer.get("usage")) or Usage(0, 0),
        )


class HttpEngineClient(EngineClient):
    """A client of one vLLM server. `trace_headers` has what makes its spans part of the present trace."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str,
        fingerprint: str,
        connect_timeout_s: float,
        timeout_s: float,
        lost_since: LostSince = never_lost,
        abort_grace_s: float = 0.0,
        has_cache: bool = False,
        trace_headers: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self.url = url
        self._trace_headers = trace_headers
        self._lost_since = lost_since
        self._out_of_files = OutOfFiles()
        self.abort_risk: AbortRisk = "unknown"
        self._abort_grace_s = abort_grace_s
        self._has_cache = has_cache
        self._abandoned: set[asyncio.Task[Reply]] = set()  # requests whose caller was cancelled
        self._fingerprint = fingerprint
        self._quick = httpx.Timeout(connect_timeout_s)
        self.cards: list[dict[str, Any]] = []  # the models as the engine itself describes them
        self._models: dict[str, Model] = {}
        self._asking: asyncio.Task[dict[str, Model]] | None = None
        self._asked_at = -_MODELS_EVERY_S
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout_s, connect=connect_timeout_s),
            # vLLM closes idle connections after 5 s; its own transport retries a connection that failed to open.
            limits=httpx.Limits(keepalive_expiry=4.0),
        )

    async def __aenter__(self) -> "HttpEngineClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._abandoned:
            await asyncio.wait(self._abandoned)
        await self._http.aclose()

    @property
    def grace_s(self) -> float:
        """Seconds that an abandoned request which may load KV has to begin its reply; 0: it may be aborted at once."""
        risky = self.abort_risk == "exposed" or (self.abort_risk == "unknown" and self._has_cache)
        return self._abort_grace_s if risky else 0.0

    def known(self, name: str) -> Model | None:
        """The model as last reported. No name means the engine's first, as it does to the engine itself."""
        return self._models.get(name) if name else next(iter(self._models.values()), None)

    @property
    def served(self) -> Collection[Model]:
        """The models as last reported."""
        return self._models.values()

    async def look_up(self, name: str) -> Model | None:
        """Return a model, asking the engine at most once a second if it is unknown: clients may send any name.

        Raises `engine_unreachable`, `engine_timeout`.
        """
        if self._asking is None and time.monotonic() - self._asked_at >= _MODELS_EVERY_S:
            self._asking = asyncio.create_task(self.models())
            self._asking.add_done_callback(self._on_asked)
        if self._asking is not None:  # all callers wait for the same response
            await asyncio.shield(self._asking)
        return self.known(name)

    async def models(self) -> dict[str, Model]:
        """Ask which models are served. Raises `engine_unreachable`, `engine_timeout`."""
        answer = await self.ask("GET", "/v1/models", quick=True)
        try:
            cards = _checked(answer)["data"]
            listed = {card["id"]: card for card in cards}
            self._models = {name: self._model(card, listed) for name, card in listed.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GatewayError(
                "engine_unreachable", f"engine at {self.url} sent a list of models that cannot be read: {error!r}"
            ) from error
        self.cards = cards
        return self._models

    async def check(self) -> None:
        """Check whether it is healthy, and which models it serves. Raises `engine_unreachable`, `engine_timeout`.

        Only a 5xx means that it is not: some engines are behind a proxy that exposes nothing but `/v1`.
        """
        try:
            await self._check()
        except GatewayError:
            self.abort_risk = "unknown"  # it may come back with another connector
            raise
        if self.abort_risk == "unknown":
            self.abort_risk = await self._ask_abort_risk()

    async def _check(self) -> None:
        answer = await self.ask("GET", "/health", quick=True)
        if answer.status_code >= 500:
            raise GatewayError("engine_unreachable", f"engine at {self.url} answered {answer.status_code} to /health")
        await self.models()

    async def _ask_abort_risk(self) -> AbortRisk:
        try:
            answer = await self.ask("GET", "/metrics", quick=True)
        except GatewayError:
            return "unknown"
        if answer.status_code != 200 or "vllm:" not in answer.text:
            return "unknown"
        if _CONNECTOR not in answer.text:
            return "none"
        return "patched" if _PATCHED.search(answer.text) else "exposed"

    async def version(self) -> str:
        """Ask for vLLM's version; "" if it is not available."""
        try:
            return str((await self.ask("GET", "/version", quick=True)).json()["version"])
        except (GatewayError, ValueError, KeyError, TypeError):
            return ""

    async def cache_use(self) -> CacheUse | None:
        """Ask how full the engine's own cache is; None if it does not say."""
        return CacheUse.read(await self.metrics())

    async def metrics(self) -> str:
        """Ask for the engine's metrics; "" if it does not answer."""
        try:
            return (await self.ask("GET", "/metrics", quick=True)).text
        except GatewayError:
            return ""

    def _on_asked(self, _: object) -> None:
        self._asking = None
        self._asked_at = time.monotonic()

    def _model(self, card: Mapping[str, Any], listed: Mapping[str, Any]) -> Model:
        name, root = str(card["id"]), str(card.get("root") or card["id"])
        # A LoRA adapter's own root is its path, but LMCache keys KV by the base model's --model string.
        parent = listed.get(card.get("parent") or "")
        base = str(parent.get("root") or parent["id"]) if parent else root
        text = "\0".join((root, self._fingerprint))
        return Model(name, base, int(card.get("max_model_len") or 0), blake3(text.encode()).hexdigest()[:32])

    async def ask(self, method: str, path: str, *, json: Mapping[str, Any] | None = None, quick: bool = False) -> Reply:
        """See `EngineClient.ask`. Raises `rate_limited` when too many of our own files are open."""
        return await self._ask(method, path, json, quick=quick)

    async def _ask(
        self, method: str, path: str, json: Mapping[str, Any] | None, *, quick: bool, retry: bool = True
    ) -> Reply:
        began = time.monotonic()
        timeout = self._quick if quick else httpx.USE_CLIENT_DEFAULT
        request = self._http.request(method, path, json=json, timeout=timeout, headers=self._trace_headers())
        try:
            if json and "cache_salt" in json and (grace_s := self.grace_s):
                return await self._with_grace(request, grace_s)
            return await request
        except httpx.TimeoutException as error:
            if (
                retry and quick and caused_by_own_stall(self._lost_since, began)
            ):  # such a request costs an engine nothing
                return await self._ask(method, path, json, quick=quick, retry=False)
            connecting = isinstance(error, httpx.ConnectTimeout)
            code, hint = ("engine_unreachable", UNREACHABLE_HINT) if connecting else ("engine_timeout", TIMEOUT_HINT)
            raise GatewayError(code, f"engine at {self.url} did not answer {path} in time", hint=hint) from error
        except httpx.HTTPError as error:
            if self._out_of_files.caused(error):
                raise GatewayError("rate_limited", "the gateway has too many open files") from error
            raise GatewayError(
                "engine_unreachable",
                f"engine at {self.url} does not answer: {str(error) or type(error).__name__}",
                hint=UNREACHABLE_HINT,
            ) from error

    async def _with_grace(self, request: Coroutine[Any, Any, Reply], grace_s: float) -> Reply:
        """Await a request; if the caller is cancelled, the request still has `grace_s` to end by itself."""
        task = asyncio.create_task(request)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._abandoned.add(task)
            task.add_done_callback(self._on_abandoned_done)
            asyncio.get_running_loop().call_later(grace_s, task.cancel)
            raise

    def _on_abandoned_done(self, task: asyncio.Task[Reply]) -> None:
        self._abandoned.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, or asyncio logs that it never was


def _checked(response: httpx.Response) -> dict[str, Any]:
    if response.status_code >= 400:
        code = "engine_unreachable" if response.status_code >= 500 else "invalid_request"
        reason = f"engine answered {response.status_code} to {response.url.path}: {_reason(response):.500}"
        raise GatewayError(code, reason)
    answer: dict[str, Any] = response.json()
    return answer


def _reason(response: httpx.Response) -> str:
    """The message in an engine's error, or all of an answer that is none."""
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return response.text
