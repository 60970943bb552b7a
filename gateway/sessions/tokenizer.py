"""Build a tiktoken encoding from the served model's own tokenizer.json. Nothing is ever downloaded.

Only byte-level BPE is supported (GPT-2, Llama 3, Qwen, ...: merges over bytes). tiktoken has ranks of byte strings
where the file has merges of pairs. The two agree on every text if a token's rank is that of the merge which completes
it when it is encoded alone, and tokens that do not encode to themselves are left out: inside a longer text a token's
bytes go through the same merges as alone, unless a merge crosses their border, and then they do not become that token.
"""

import re
import unicodedata
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import tiktoken

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The split patterns of GPT-2, Llama 3 and Qwen 2: the tests show that they split texts as `tokenizers` does.
_KNOWN = frozenset({_GPT2, _WORDS + r"\p{N}{1,3}" + _OTHERS, _WORDS + r"\p{N}" + _OTHERS})
_NORMAL_FORMS = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
_BYTES = 256


class NoEncoding(Exception):
    """The file gives no encoding; the message says why."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """Counts tokens as the model does. `exact` is False if something in the file could only be approximated."""

    exact: bool
    _core: tiktoken.Encoding
    _form: str
    _cut: re.Pattern[str] | None

    def count(self, text: str) -> int:
        """Count the tokens of `text`, some 5 MB/s."""
        return sum(map(len, self.ids(text)))

    def ids(self, text: str) -> Iterator[list[int]]:
        """Yield the tokens of each part of `text`."""
        normal = unicodedata.normalize(self._form, text) if self._form else text  # type: ignore[arg-type]
        pieces = self._cut.split(normal) if self._cut else (normal,)
        return (self._core.encode(piece, allowed_special="all") for piece in pieces if piece)


def read(path: Path) -> Encoding:
    """Read a tokenizer.json. Takes a second or two for 150,000 tokens. Raises NoEncoding."""
    try:
        return _encoding(orjson.loads(path.read_bytes()))
    except OSError as error:
        raise NoEncoding(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise NoEncoding(f"{path} is not a tokenizer.json: {error!r:.100}") from error
    except NoEncoding as error:
        raise NoEncoding(f"{path}: {error}") from error


def _encoding(file: Mapping[str, Any]) -> Encoding:
    model = file["model"]
    _check(model)
    split = _split(list(_steps(file.get("pre_tokenizer"))))
    form, form_is_exact = _form(file.get("normalizer"))
    added = [token for token in file.get("added_tokens") or () if token["content"]]
    plain = not any(token.get(flag) for token in added for flag in ("lstrip", "rstrip", "single_word"))
    ranks, all_reached = _ranks(model, {token["content"] for token in added})
    special = {token["content"]: len(ranks) + number for number, token in enumerate(added)}
    try:
        core = tiktoken.Encoding("served", pat_str=split.pattern, mergeable_ranks=ranks, special_tokens=special)
    except ValueError as error:
        raise NoEncoding(f"its split pattern is not understood: {error!s:.200}") from error
    return Encoding(split.exact and form_is_exact and plain and all_reached, core, form, split.cut)


def _check(model: Mapping[str, Any]) -> None:
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise NoEncoding("it is not a byte-level BPE")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise NoEncoding(f"its BPE has a {name}")


# --- how a text is split before anything is merged


@dataclass(frozen=True, slots=True)
class _Split:
    pattern: str
    cut: re.Pattern[str] | None
    exact: bool


def _steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for inner in step["pretokenizers"]:
        yield from _steps(inner)


def _split(steps: Sequence[Mapping[str, Any]]) -> _Split:
    if not steps or steps[-1]["type"] != "ByteLevel":
        raise NoEncoding("it is not a byte-level BPE")
    *before, last = steps
    cuts: list[str] = []
    while before and (literal := _literal(before[0])) is not None:
        cuts.append(re.escape(literal))
        before.pop(0)
    patterns = [_pattern(step) for step in before]
    if last.get("use_regex", True):
        patterns.append(_GPT2)
    exact = len(cuts) <= 1 and len(patterns) <= 1 and all(p in _KNOWN for p in patterns)
    exact = exact and not last.get("add_prefix_space") and all(_is_isolating(step) for step in steps[:-1])
    return _Split(_joined(patterns), re.compile(f"({'|'.join(cuts)})") if cuts else None, exact)


def _joined(patterns: Sequence[str]) -> str:
    """One pattern for all; tiktoken drops text that a pattern does not match, so that becomes pieces of its own."""
    if not patterns:
        return r"[\s\S]+"
    if len(patterns) == 1 and patterns[0] in _KNOWN:
        return patterns[0]
    one = "|".join(f"(?:{pattern})" for pattern in patterns)
    return rf"{one}|(?:(?!{one})[\s\S])+|[\s\S]"


def _literal(step: Mapping[str, Any]) -> str | None:
    """The text at which a step splits, if it is that simple."""
    if step["type"] != "Split":
        return None
    ((kind, text),) = step["pattern"].items()
    return str(text) if kind == "String" or all(c.isspace() or c.isalnum() for c in text) else None


def _pattern(step: Mapping[str, Any]) -> str:
    if step["type"] == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    if step["type"] == "Split":
        return str(step["pattern"]["Regex"])
    raise NoEncoding(f"its pre-tokenizer {step['type']} is not supported")


def _is_isolating(step: Mapping[str, Any]) -> bool:
    """Whether every match becomes a piece of its own and nothing is dropped."""
    return bool(step.get("behavior", "Isolated") == "Isolated" or (step["behavior"] == "Removed" and step["invert"]))


def _form(normalizer: Mapping[str, Any] | None) -> tuple[str, bool]:
    """The Unicode form of the normalizer, and whether it does nothing else."""
    if normalizer is None or normalizer == {"type": "Sequence", "normalizers": []}:
        return "", True
    kind = normalizer["type"]
    return (kind, True) if kind in _NORMAL_FORMS else ("", False)


# --- merges of pairs as ranks of byte strings

Order = Mapping[tuple[str, str], int]


def _ranks(model: Mapping[str, Any], added: Container[str]) -> tuple[dict[bytes, int], bool]:
    """Ranks of all tokens that a text can become, and whether they are exact."""
    byte_of = {char: byte for byte, char in enumerate(_alphabet())}
    vocab = model["vocab"]
    missing = _BYTES - len(byte_of.keys() & vocab.keys())
    if missing:
        raise NoEncoding(f"its vocabulary lacks {missing} of the 256 bytes")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    order = {(left, right): number for number, (left, right) in enumerate(pairs)}
    completed = sorted(
        (number, token) for token in {left + right for left, right in order} if (number := _alone(token, order)[0]) >= 0
    )
    tokens = [*byte_of, *(token for _, token in completed)]
    words, exact = _words(vocab.keys() - set(tokens), added, order) if model.get("ignore_merges") else ([], True)
    return {bytes(byte_of[c] for c in token): rank for rank, token in enumerate([*tokens, *words])}, exact


def _words(tokens: Iterable[str], added: Container[str], order: Order) -> tuple[list[str], bool]:
    """Tokens that no merges lead to, but that a whole word becomes at once if the model has `ignore_merges`.

    Ranked after all merges they change nothing inside a longer word, unless merges leave a token in just two parts.
    """
    left = {token: _alone(token, order)[1] for token in tokens if token not in added}
    return [token for token, parts in left.items() if parts > 2], all(parts > 2 for parts in left.values())


def _alone(token: str, order: Order) -> tuple[int, int]:
    """Encode a token alone: the merge that completes it (-1 if none does), and how many parts are left."""
    parts, never = list(token), len(order)
    number = -1
    while len(parts) > 1:
        numbers = [order.get(pair, never) for pair in pairwise(parts)]
        number = min(numbers)
        if number == never:
            return -1, len(parts)
        place = numbers.index(number)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return number, 1


def _alphabet() -> list[str]:
    """The character that stands for each byte: itself if it is printable, else the next one after 255."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = iter(range(_BYTES, 2 * _BYTES))
    return [chr(byte if byte in seen else next(unseen)) for byte in range(_BYTES)]
