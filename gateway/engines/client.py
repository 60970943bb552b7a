"""The gateway's own requests to vLLM: list models, render token ids, compute a prefix.

Requests of clients do not come through here; the relay streams them over `gateway.engines.connection_pool`.
"""

import asyncio
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx
from blake3 import blake3

from gateway.dialects import transcripts
from gateway.dialects.base import usage_of
from gateway.engines.connection import UNREACHABLE_HINT
from gateway.errors import GatewayError
from gateway.records import Message, Usage
from gateway.runtime.open_files import OutOfFiles
from gateway.runtime.stalls import LostSince, is_ours, never_lost

_ASK_AGAIN_S = 1.0
_UNSTORED: Mapping[str, Any] = {"kv_transfer_params": {"lmcache.max_offload_tokens": 0}}
Reply = httpx.Response  # for those who pass it on

AbortRisk = Literal["none", "mended", "exposed", "unknown"]
"""Whether aborting a request during its KV load may end an engine: it loads none; its connector sees to it
(`gateway.stack.connector`); it may; its metrics are not to be seen."""
_MENDED = re.compile(r"^vllm:lmcache_mp_abort_safe\b.* 1(\.0)?$", re.MULTILINE)
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
    """An answer of the model to the gateway itself."""

    text: str
    reasoning: str | None
    finish_reason: str | None
    usage: Usage


class EngineClient(ABC):
    """What the gateway asks for itself; `ask` knows whom."""

    @abstractmethod
    async def ask(
        self, method: str, path: str, *, json: Mapping[str, Any] | None = None, quick: bool = False
    ) -> httpx.Response:
        """Return the answer, whatever its status; `quick` is for requests that cost even a busy engine nothing.

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

    async def render(self, model: str, frame: Mapping[str, Any], messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a transcript as its next turn begins: no generation prompt at the end.

        Asks `/v1/chat/completions/render` (needs `--enable-scale-out`), which renders as a request does; `/tokenize`
        where that is not to be had, which knows fewer fields.
        """
        body = {**frame, "model": model, "messages": list(messages), "add_generation_prompt": False}
        response = await self._render(body)
        if response.status_code == 400 and (hoisted := transcripts.hoisted(messages)):
            # The template wants its system message first: the Messages API was rendered like this as well.
            response = await self._render({**body, "messages": hoisted})
        answer = _checked(response)
        return list(answer["token_ids"] if "token_ids" in answer else answer["tokens"])

    async def _render(self, body: Mapping[str, Any]) -> httpx.Response:
        response = await self.ask("POST", "/v1/chat/completions/render", json=body)
        unknown = response.status_code in (403, 404)
        return await self.ask("POST", "/tokenize", json=body) if unknown else response

    async def tokenize(self, model: str, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of a plain text, `special` ones added as a completion of it adds them."""
        body = {"model": model, "prompt": text, "add_special_tokens": special}
        return list(_checked(await self.ask("POST", "/tokenize", json=body))["tokens"])

    async def prefill(self, model: str, token_ids: Sequence[int], salt: str, *, store: bool = True) -> Usage:
        """Compute (or find) the KV of `token_ids` under `salt` by sampling one token; return the engine's count.

        Without `store` the cache is asked to keep nothing of it.
        """
        extra = {} if store else _UNSTORED
        answer = await self.complete(model, token_ids, salt, max_tokens=1, **extra)
        return usage_of(answer.get("usage")) or Usage(len(token_ids), 1)

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
        """Answer a conversation, greedily; the cache is asked to keep nothing of it.

        Raises `invalid_request` where the engine refuses it, `engine_unreachable`, `engine_timeout`.
        """
        body = {
            **frame,
            "model": model,
            "messages": list(messages),
            "cache_salt": salt,
            "max_tokens": max_tokens,
            "temperature": 0,
            **_UNSTORED,
        }
        response = await self.ask("POST", "/v1/chat/completions", json=body)
        if response.status_code == 400 and (hoisted := transcripts.hoisted(messages)):  # see `render`
            response = await self.ask("POST", "/v1/chat/completions", json={**body, "messages": hoisted})
        answer = _checked(response)
        choice = answer["choices"][0]
        message = choice["message"]
        return ModelReply(
            message.get("content") or "",
            message.get("reasoning") or message.get("reasoning_content"),
            choice.get("finish_reason"),
            usage_of(answer.get("usage")) or Usage(0, 0),
        )


class HttpEngineClient(EngineClient):
    """A client of one vLLM server."""

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
    ) -> None:
        self.url = url
        self._lost_since = lost_since
        self._out_of_files = OutOfFiles()
        self.abort_risk: AbortRisk = "unknown"
        self._abort_grace_s = abort_grace_s
        self._has_cache = has_cache
        self._left: set[asyncio.Task[httpx.Response]] = set()  # nobody waits for these any more
        self._fingerprint = fingerprint
        self._quick = httpx.Timeout(connect_timeout_s)
        self.cards: list[dict[str, Any]] = []  # the models as the engine itself describes them
        self._models: dict[str, Model] = {}
        self._asking: asyncio.Task[dict[str, Model]] | None = None
        self._asked_at = -_ASK_AGAIN_S
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
        if self._left:
            await asyncio.wait(self._left)
        await self._http.aclose()

    @property
    def grace_s(self) -> float:
        """Seconds that a request which may load KV has, after nobody wants it, to begin its reply; 0: none needed."""
        risky = self.abort_risk == "exposed" or (self.abort_risk == "unknown" and self._has_cache)
        return self._abort_grace_s if risky else 0.0

    def known(self, name: str) -> Model | None:
        """The model as last seen, without asking. No name means the engine's first, as it does to the engine itself."""
        return self._models.get(name) if name else next(iter(self._models.values()), None)

    @property
    def served(self) -> Collection[Model]:
        """The models as last seen."""
        return self._models.values()

    async def look_up(self, name: str) -> Model | None:
        """Ask the engine for a model not known yet, at most once a second: clients may name anything.

        Raises `engine_unreachable`, `engine_timeout`.
        """
        if self._asking is None and time.monotonic() - self._asked_at >= _ASK_AGAIN_S:
            self._asking = asyncio.create_task(self.models())
            self._asking.add_done_callback(self._on_asked)
        if self._asking is not None:  # everybody who does not know waits for the same answer
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
        """Find out whether it is well, and which models it serves now. Raises `engine_unreachable`, `engine_timeout`.

        Only a 5xx means that it is not: before some engines stands a proxy that shows nothing but `/v1`.
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
        return "mended" if _MENDED.search(answer.text) else "exposed"

    async def version(self) -> str:
        """Ask for vLLM's version; "" where it is not told."""
        try:
            return str((await self.ask("GET", "/version", quick=True)).json()["version"])
        except (GatewayError, ValueError, KeyError, TypeError):
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

    async def ask(
        self, method: str, path: str, *, json: Mapping[str, Any] | None = None, quick: bool = False
    ) -> httpx.Response:
        """See `EngineClient.ask`. Raises `rate_limited` when too many of our own files are open."""
        return await self._ask(method, path, json, quick=quick)

    async def _ask(
        self, method: str, path: str, json: Mapping[str, Any] | None, *, quick: bool, again: bool = True
    ) -> httpx.Response:
        began = time.monotonic()
        timeout = self._quick if quick else httpx.USE_CLIENT_DEFAULT
        request = self._http.request(method, path, json=json, timeout=timeout)
        try:
            if json and "cache_salt" in json and (grace_s := self.grace_s):
                return await self._not_aborted(request, grace_s)
            return await request
        except httpx.TimeoutException as error:
            if again and quick and is_ours(self._lost_since, began):  # such a question costs an engine nothing
                return await self._ask(method, path, json, quick=quick, again=False)
            code = "engine_unreachable" if isinstance(error, httpx.ConnectTimeout) else "engine_timeout"
            raise GatewayError(code, f"engine at {self.url} did not answer {path} in time") from error
        except httpx.HTTPError as error:
            if self._out_of_files.caused(error):
                raise GatewayError("rate_limited", "the gateway has too many open files") from error
            raise GatewayError(
                "engine_unreachable",
                f"engine at {self.url} does not answer: {error or type(error).__name__}",
                hint=UNREACHABLE_HINT,
            ) from error

    async def _not_aborted(self, request: Coroutine[Any, Any, httpx.Response], grace_s: float) -> httpx.Response:
        """Await a request; if this is cancelled, the request still has `grace_s` to end by itself."""
        task = asyncio.create_task(request)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._left.add(task)
            task.add_done_callback(self._on_left_done)
            asyncio.get_running_loop().call_later(grace_s, task.cancel)
            raise

    def _on_left_done(self, task: asyncio.Task[httpx.Response]) -> None:
        self._left.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, or asyncio logs that it never was


def _checked(response: httpx.Response) -> dict[str, Any]:
    if response.status_code >= 400:
        code = "engine_unreachable" if response.status_code >= 500 else "invalid_request"
        raise GatewayError(code, f"engine answered {response.status_code} to {response.url.path}: {response.text:.500}")
    answer: dict[str, Any] = response.json()
    return answer
