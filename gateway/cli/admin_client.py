"""The CLI's client of a running gateway's admin API."""

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import IO, Any

import click
import httpx
import orjson

from gateway.api.mcp.admin_request import AdminRequest, Json, ReportProgress
from gateway.records import SESSION_ID
from gateway.telemetry import trace_context

OnProgress = Callable[[Mapping[str, Any]], None]
_CHUNK_BYTES = 2**18
_CLIENT_PATH = re.compile(r"(/[sw]/[^/]+)?/v1$")
_ADDRESS_HINT = "CWG_URL or --url is the gateway's address, such as http://127.0.0.1:8700"


@dataclass(eq=False)
class AdminError(Exception):
    """An error answer of the gateway, or none at all."""

    message: str
    hint: str = ""
    code: str = "gateway_unreachable"
    retryable: bool = True
    details: dict[str, Any] = field(default_factory=dict)


class Admin:
    """A client of one gateway's admin API. `session_id`: the caller's own session, where it is known; `traceparent`:
    the span that its requests belong to, if any.
    """

    def __init__(
        self, url: str, api_key: str, timeout_s: float = 600, session_id: str = "", traceparent: str = ""
    ) -> None:
        self.url = url
        _check_address(url)
        if not api_key.isascii() or not api_key.isprintable():
            raise AdminError("CWG_API_KEY has characters that a header cannot carry")
        if session_id and not SESSION_ID.fullmatch(session_id):
            raise AdminError(f"CWG_SESSION_ID {session_id!r:.200} is no session id", "use A-Z a-z 0-9 _ . : -")
        sent = {
            "authorization": api_key and f"Bearer {api_key}",
            "x-session-id": session_id,
            "traceparent": _valid(traceparent),
        }
        headers = {name: value for name, value in sent.items() if value}
        try:
            self._http = httpx.Client(
                base_url=url, headers=headers, timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 5))
            )
        except httpx.InvalidURL as error:
            raise AdminError(f"{url!r} is not a URL: {error}", _ADDRESS_HINT) from error
        if context := click.get_current_context(silent=True):
            context.call_on_close(self._http.close)

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        nulls: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Send one request and return its answer. With `nulls`, None in the body is sent as null. Raises AdminError."""
        try:
            response = self._http.request(
                method, path, params=_without_none(query), json=body if nulls else _without_none(body), headers=headers
            )
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        return _checked(response.status_code, _json(response.content))

    def watch(
        self, path: str, body: Mapping[str, Any], on_progress: OnProgress, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """POST, and report each step to `on_progress` until the answer arrives. Raises AdminError."""
        return self._follow(on_progress, path, headers=headers or {}, json=_without_none(body))

    def _follow(
        self, on_progress: OnProgress, path: str, *, headers: Mapping[str, str], **request: Any
    ) -> dict[str, Any]:
        accept = {"accept": "application/x-ndjson", **headers}
        try:
            with self._http.stream("POST", path, headers=accept, **request) as response:
                for line in response.iter_lines():
                    step = _json(line.encode())
                    if "progress" not in step:
                        return _checked(step.get("status", response.status_code), step.get("result", step))
                    on_progress(step["progress"])
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        raise AdminError("the gateway closed the connection before the operation finished", "look at its log")

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """POST an inference request, and yield the events of its stream. Raises AdminError."""
        try:
            with self._http.stream("POST", path, json=body) as response:
                if response.status_code >= 400:
                    _checked(response.status_code, _json(response.read()))
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        event = _json(line.removeprefix("data: ").encode())
                        yield _checked(500 if "error" in event else 200, event)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def download(self, path: str, file: IO[bytes], query: Mapping[str, Any], on_progress: OnProgress) -> None:
        """GET the complete response into `file`. Raises AdminError, OSError."""
        try:
            with self._http.stream("GET", path, params=_without_none(query)) as response:
                if response.status_code >= 400:
                    _checked(response.status_code, _json(response.read()))
                total, received = int(response.headers.get("content-length", 0)), 0
                for chunk in response.iter_raw():
                    file.write(chunk)
                    received += len(chunk)
                    on_progress({"stage": "receive", "done": received, "total": total})
        except httpx.RemoteProtocolError as error:
            raise AdminError("the gateway cut the export short", "its log says why") from error
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def upload(
        self, path: str, file: IO[bytes], size: int, query: Mapping[str, Any], on_progress: OnProgress
    ) -> dict[str, Any]:
        """POST `size` bytes of `file`, and report each step to `on_progress`. Raises AdminError, OSError."""

        def chunks() -> Iterator[bytes]:
            sent = 0
            while chunk := file.read(_CHUNK_BYTES):
                sent += len(chunk)
                on_progress({"stage": "send", "done": sent, "total": size})
                yield chunk

        headers = {"content-type": "application/x-tar", "content-length": str(size)}
        return self._follow(on_progress, path, headers=headers, params=_without_none(query), content=chunks())

    async def ask(self, request: AdminRequest, report: ReportProgress) -> Json:
        """Send one request from an event loop; the answer to a failed one has `error` in it."""
        loop = asyncio.get_running_loop()

        def step(progress: Mapping[str, Any]) -> None:
            asyncio.run_coroutine_threadsafe(report(progress), loop).result()

        try:
            context = {"traceparent": request.traceparent} if request.traceparent else {}
            if request.method == "POST":
                return await asyncio.to_thread(self.watch, request.path, request.body or {}, step, context)
            query, body = request.query, request.body
            return await asyncio.to_thread(
                self.call, request.method, request.path, query=query, body=body, nulls=True, headers=context
            )
        except AdminError as error:
            return {"error": asdict(error)}

    def _unreachable(self, error: httpx.HTTPError) -> AdminError:
        hint = "start it with `cwg up` or `cwg serve`, or set CWG_URL"
        return AdminError(f"no gateway answers at {self.url}: {str(error) or type(error).__name__}", hint)


def _valid(traceparent: str) -> str:
    return traceparent if traceparent.isascii() and trace_context.parse(traceparent.encode()) else ""


def _check_address(url: str) -> None:
    """Raise AdminError for what is no gateway's address: one without a scheme, or a base URL of clients."""
    if _CLIENT_PATH.search(url):
        own = _CLIENT_PATH.sub("", url)
        raise AdminError(f"{url!r} is a base URL for clients", f"set CWG_URL or --url to the gateway itself: {own}")
    if not url.lower().startswith(("http://", "https://")):
        hint = _ADDRESS_HINT if "://" in url else f"did you mean http://{url}?"
        raise AdminError(f"the gateway's address {url!r} must begin with http:// or https://", hint)


def _without_none(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return {k: v for k, v in values.items() if v is not None} if values is not None else None


def _json(content: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise AdminError(f"the answer is not a JSON object: {content[:100]!r}", "is CWG_URL a gateway's address?")
    return value


def _checked(status: int, answer: dict[str, Any]) -> dict[str, Any]:
    if status < 400:
        return answer
    error = answer.get("error")
    if not isinstance(error, dict):
        raise AdminError(f"HTTP {status}: {orjson.dumps(answer).decode():.200}", "is CWG_URL a gateway's address?")
    raise AdminError(
        str(error.get("message", f"HTTP {status}")),
        str(error.get("hint", "")),
        str(error.get("code", "")),
        bool(error.get("retryable")),
        dict(error.get("details") or {}),
    )
