"""Estimate how many tokens a prompt will have, before the engine has counted them.

The tokens of a session so far are known exactly (`Session.token_count`); only new messages are estimated: their text
with the served model's tokenizer if it is on this machine, else by bytes per token, and the tokens that a template adds
to a message. Both are learned from the engine's own counts, and so is the error of the estimates.
"""

import logging
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from msgspec import Struct

from gateway.dialects.text_transcripts import TOKENS, kind
from gateway.errors import StartError
from gateway.records import Message
from gateway.sessions.tokenizer import Encoding, NoEncoding, read

log = logging.getLogger(__name__)

_ENCODED_CHARS = 16 * 1024  # on the loop that serves streams; the tokens of longer text are extrapolated
_BYTES_PER_TOKEN = 4.0  # until the engine has counted
_AROUND = 4.0
_NEWEST = 1 / 32  # the least weight of the newest count in an average
_PLAUSIBLE_AROUND = range(-8, 65)
_PLAUSIBLE_BYTES = range(1, 17)
_SHORT_BYTES = 64  # the bytes per token cannot be learned from less text
_ERRORS_KEPT = 512
_MODELS = 64
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Estimate(Struct, frozen=True):
    """A prompt: `known` tokens that the engine has counted before, and the new ones."""

    known: int
    text: int
    size: int  # bytes of the new text
    messages: int
    around: float  # tokens around each message
    framed: bool  # tools are part of it, with whatever the template adds to them

    @property
    def new(self) -> int:
        """Tokens that the engine has not counted yet."""
        return self.text + round(self.around * self.messages)

    @property
    def tokens(self) -> int:
        """Tokens of the whole prompt."""
        return self.known + self.new


@dataclass(slots=True)
class _Model:
    """What is known of one model's tokens."""

    looked_up: bool = False
    why: str = "its tokenizer has not been read yet"
    encoding: Encoding | None = None
    bytes_per_token: float = _BYTES_PER_TOKEN
    around: float = _AROUND
    learned: int = 0
    seen: int = 0
    errors: deque[float] = field(default_factory=lambda: deque(maxlen=_ERRORS_KEPT))
    new_errors: deque[float] = field(default_factory=lambda: deque(maxlen=_ERRORS_KEPT))


class Estimator:
    """Estimates prompts, and learns from the engine's counts. Each process has its own."""

    def __init__(self, *, file: Path | None = None, folders: Sequence[Path] = (), hub: Path | None = None) -> None:
        self._file = file
        self._folders = folders
        self._hub = hub
        self._models: dict[str, _Model] = {}
        self._read: dict[Path, Encoding] = {}

    def check(self) -> None:
        """Read the tokenizer that the settings name, if they do. Raises StartError."""
        if self._file is None:
            return
        try:
            self._read[self._file] = read(self._file)
        except NoEncoding as error:
            raise StartError(f"tokenizer_file: {error}") from error

    def knows(self, model: str) -> bool:
        """Whether the model's tokenizer has been looked for."""
        return model in self._models and self._models[model].looked_up

    def load_tokenizer(self, model: str, root: str) -> None:
        """Look for the tokenizer of a model. Call it in a thread: a large vocabulary takes seconds."""
        state = self._state(model)
        state.looked_up = True
        try:
            state.encoding, state.why = self._encoding(root), ""
        except NoEncoding as error:
            state.why = str(error)
            log.info("tokens of %s are estimated by the bytes of a text: %s", model, error)

    def estimate_next_turn(
        self, model: str, counted: int, messages: Sequence[Message], frame: Mapping[str, Any]
    ) -> Estimate:
        """Estimate the prompt of a session's next turn, whose tokens up to its last reply are `counted`.

        If there is no reply in it, `counted` is ignored: it is another conversation, or its first turn.
        """
        new = unseen(messages)
        if counted and len(new) < len(messages):
            return self.estimate(model, new, {}, counted)
        return self.estimate(model, messages, frame)

    def estimate(self, model: str, messages: Sequence[Message], frame: Mapping[str, Any], known: int = 0) -> Estimate:
        """Estimate a prompt of which `known` tokens have been counted, and `messages` and `frame` have not.

        The tokens of a very long text are extrapolated from its beginning. Media count nothing.
        """
        state = self._models.get(model) or _Model()
        texts = [text for message in messages for text in _texts(message)]
        tools = [orjson.dumps(tool).decode() for tool in _list(frame.get("tools"))]
        size, text = _count(state, [*texts, *tools])
        ids = sum(len(m["content"]) for m in messages if m.get("role") == TOKENS)
        wrapped = 0 if kind(messages) else len(messages)  # no template writes anything around a text
        return Estimate(known, text + ids, size, wrapped, state.around, bool(tools))

    def observe(self, model: str, estimate: Estimate, actual: int) -> None:
        """Compare an estimate with the engine's `prompt_tokens`, and learn from it."""
        if actual <= 0:
            return
        state = self._state(model)
        state.seen += 1
        state.errors.append(abs(estimate.tokens - actual) / actual)
        new = actual - estimate.known
        if new <= 0 or not estimate.messages:  # a retry, or a shortened history: nothing to learn from
            return
        state.new_errors.append(abs(estimate.new - new) / new)
        if not estimate.framed:
            _learn(state, estimate, new)

    def report(self) -> dict[str, dict[str, Any]]:
        """How each model's tokens are estimated, and the relative error of the last estimates."""
        return {name: _report(state) for name, state in self._models.items()}

    def _encoding(self, root: str) -> Encoding:
        path = self._file or find(root, self._folders, self._hub)
        if path is None:
            raise NoEncoding(f"no tokenizer.json of {root!r} on this machine; tokenizer_file may name one")
        if path not in self._read:
            self._read[path] = read(path)
        return self._read[path]

    def _state(self, model: str) -> _Model:
        state = self._models.get(model)
        if state is None:
            if len(self._models) >= _MODELS:
                self._models.pop(next(iter(self._models)))
            state = self._models[model] = _Model()
        return state


def unseen(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages after the last reply."""
    start = len(messages)
    while start and messages[start - 1].get("role") != "assistant":
        start -= 1
    return messages[start:]


def find(root: str, folders: Sequence[Path] = (), hub: Path | None = None) -> Path | None:
    """The tokenizer.json of a model: in a directory, which may be relative to one of `folders`, or in a repository in
    Hugging Face's cache on this machine."""
    for folder in (Path(root), *(folder / root for folder in folders)):
        if folder.is_dir():
            return _file(folder / "tokenizer.json")
    if hub is None or not _REPOSITORY.fullmatch(root):
        return None
    cached = hub / f"models--{root.replace('/', '--')}"
    ref = _file(cached / "refs" / "main")
    revisions = [ref.read_text().strip()] if ref else [path.name for path in cached.glob("snapshots/*")]
    return _file(cached / "snapshots" / revisions[0] / "tokenizer.json") if len(revisions) == 1 else None


def hub_folder(environment: Mapping[str, str]) -> Path:
    """The download cache of Hugging Face's libraries (huggingface_hub, "Environment variables")."""
    if cache := environment.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := environment.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def _file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _texts(message: Message) -> Iterator[str]:
    """The text that a template writes for a message, without reasoning: templates drop that of earlier turns."""
    content = message.get("content")
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        yield from (str(part["text"]) for part in content if isinstance(part, dict) and "text" in part)
    for call in _list(message.get("tool_calls")):
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            yield str(function.get("name", ""))
            yield str(function.get("arguments", ""))


def _list(value: Any) -> list[Any]:
    """A list that a client sent; empty if it sent anything else, which the engine refuses."""
    return value if isinstance(value, list) else []


def _count(state: _Model, texts: Sequence[str]) -> tuple[int, int]:
    """Bytes and tokens of `texts`."""
    size = sum(len(text.encode(errors="replace")) for text in texts)
    if state.encoding is None:
        return size, round(size / state.bytes_per_token)
    chars = tokens = 0
    for text in texts:
        part = text[: _ENCODED_CHARS - chars]
        tokens += state.encoding.count(part)
        chars += len(part)
    whole = sum(map(len, texts))
    return size, round(tokens * whole / chars) if chars else 0


def _learn(state: _Model, estimate: Estimate, new: int) -> None:
    """Update the averages. One count cannot separate both: without a tokenizer only the bytes per token are learned."""
    weight = max(1 / (state.learned + 1), _NEWEST)
    if state.encoding is not None:
        around = (new - estimate.text) / estimate.messages
        if not _within(around, _PLAUSIBLE_AROUND):
            return
        state.around += (around - state.around) * weight
    else:
        text = new - state.around * estimate.messages
        if estimate.size < _SHORT_BYTES or text <= 0 or not _within(estimate.size / text, _PLAUSIBLE_BYTES):
            return
        state.bytes_per_token += (estimate.size / text - state.bytes_per_token) * weight
    state.learned += 1


def _within(value: float, plausible: range) -> bool:
    return plausible.start <= value < plausible.stop


def _report(state: _Model) -> dict[str, Any]:
    encoding = state.encoding
    return {
        "source": "tokenizer" if encoding else "bytes_per_token",
        "exact": bool(encoding and encoding.exact),
        "why": state.why,
        "bytes_per_token": None if encoding else round(state.bytes_per_token, 3),
        "tokens_around_a_message": round(state.around, 2),
        "prompts": state.seen,
        "mean_error": _mean(state.errors),
        "p95_error": _p95(state.errors),
        "mean_error_of_new": _mean(state.new_errors),
        "p95_error_of_new": _p95(state.new_errors),
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 5) if values else None


def _p95(values: Sequence[float]) -> float | None:
    return round(sorted(values)[math.ceil(0.95 * len(values)) - 1], 5) if values else None
