"""What a search looks for and in: the words of a text that somebody typed, and the text of messages.

A text is taken literally: it has no operators. Words are runs of letters, digits and marks, or one sign. A script that
is written without blanks has a word for each character, so that any part of such a text is found.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from gateway.dialects.titles import one_line, plain_text
from gateway.records import Message

TOKENIZER = "unicode61 remove_diacritics 2 categories 'L* N* Co Mn Mc So'"
"""SQLite's tokenizer for `indexed` texts (sqlite.org/fts5.html, section 4.3.1)."""

MAX_SEARCH = 10_000  # characters
_MAX_WORDS = 64  # that are looked for; of more, the longest
# Tokens of all words together, of more the first: looking for a row of them takes their number times that of a text's.
_MAX_TOKENS = 256
_LOCATING = 8  # tokens of a word by which a snippet finds its place
_MAX_TEXT = 2**18  # characters of a message that are searched
_SNIPPET = 160  # characters
_BEFORE = 50  # of them before the match
# Thai, Lao, Myanmar, Khmer, Chinese, Japanese and Korean; signs and emoji.
_UNSPACED_CLASS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2600-\u27bf\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U0001f000-\U0001faff\U00020000-\U0003ffff"
)
_UNSPACED = re.compile(f"([{_UNSPACED_CLASS}])")
_RUN = re.compile(rf"[{_UNSPACED_CLASS}]+|[^\W_{_UNSPACED_CLASS}]+")
TOKEN = re.compile(rf"[{_UNSPACED_CLASS}]|[^\W_{_UNSPACED_CLASS}]+")
# Words that a question has whatever it is about.
_FILLERS = """
a about after again all also am an and any are as at be because been before being between both but by can could did do
does doing done down during each few for from further had has have having he her here hers him his how i if in into is
it its just let made make many me more most much my no nor not now of off on once only or other our out over own
please said same say says see she should so some such tell than that the their them then there these they this those
through to too under until up us very was we were what when where which while who whom whose why will with would you
your aber als am auch auf aus bei das dass dem den der des die ein eine einen einer es fur haben hat hatte ich im ist
mit nach nicht oder sich sie sind uber um und uns von vor war wann warum wer werden wie wir wird wo zu zum zur au aux
avec avons ce ces comment dans de du elle en est et il je la le les leur mais nous ou par pas pour que quel quelle qui
quoi sur un une vous al con cual cuando del donde el ella esta este hay las lo los para pero por quien se sin sobre
son su una y
"""
_STOP_WORDS = frozenset(_FILLERS.split())


@dataclass(frozen=True)
class Search:
    """A text to look for. `every`: a match has all of its words, as they are or as the beginnings of longer ones."""

    text: str
    every: bool = True

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Its different words, folded; the stems of those that say something if not `every` word has to match."""
        text = folded(_bindable(self.text))
        return _bounded(_longest(dict.fromkeys(text.split() if self.every else _content_words(text))))

    @cached_property
    def typed(self) -> tuple[str, ...]:
        """Its different words as they were typed, which names and descriptions are searched for."""
        return _longest(dict.fromkeys(_bindable(self.text).split())) if self.every else self.words

    @property
    def expression(self) -> str:
        """An FTS5 expression; empty if no word has anything that is indexed."""
        return (" AND " if self.every else " OR ").join(_phrase(word) for word in self.words if TOKEN.search(word))

    @cached_property
    def _tokens(self) -> list[list[str]]:
        """The tokens of each word, those of the longest word first."""
        words = (TOKEN.findall(word) for word in sorted(self.words, key=len, reverse=True))
        return [tokens for tokens in words if tokens]

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        return [_pattern(tokens[:_LOCATING]) for tokens in self._tokens]

    def coverage(self, text: str) -> float:
        """The share of its words that a text has which is not indexed yet."""
        text = folded(text)
        # Looking for a part first takes a hundredth of the time in a text that does not have it.
        likely = [tokens for tokens in self._tokens if max(tokens, key=len) in text]
        row = _in_a_row(TOKEN.findall(text)) if likely else ""
        return sum(_in_a_row(tokens) in row for tokens in likely) / len(self._tokens) if likely else 0.0

    def snippet(self, text: str) -> str:
        """A part of a text on one line: around the first of the longest words that it has."""
        found = (pattern.search(text) for pattern in self._patterns)
        at = next((match.start() for match in found if match), 0)
        start = max(at - _BEFORE, 0)
        if start:
            start = text.find(" ", start, at) + 1 or start
        part = text[start : start + 4 * _SNIPPET]
        return ("…" if start else "") + one_line(part, _SNIPPET)


def _content_words(text: str) -> list[str]:
    """The words that say what a text is about; of a script without blanks each two characters that follow another."""
    words = [part for run in _RUN.findall(text) for part in (_pairs(run) if _UNSPACED.match(run) else [run])]
    content = [word for word in words if word not in _STOP_WORDS and not (len(word) == 1 and word.isascii())]
    return [_stem(word) for word in content or words]


def _pairs(run: str) -> list[str]:
    return [run[at : at + 2] for at in range(max(len(run) - 1, 1))]


def _longest(words: Collection[str]) -> tuple[str, ...]:
    return tuple(words) if len(words) <= _MAX_WORDS else tuple(sorted(words, key=len)[-_MAX_WORDS:])


def _bounded(words: Iterable[str]) -> tuple[str, ...]:
    """The first words that have `_MAX_TOKENS` tokens together, the last of them cut off there."""
    found, left = [], _MAX_TOKENS
    for word in words:
        tokens = list(islice(TOKEN.finditer(word), left))
        left -= len(tokens)
        found.append(word if left else word[: tokens[-1].end()])
        if not left:
            break
    return tuple(found)


def _bindable(text: str) -> str:
    """The text without what SQLite cannot be given: NULs end an expression, lone surrogates have no encoding."""
    return text.replace("\0", " ").encode(errors="replace").decode()


def _phrase(word: str) -> str:
    quoted = indexed(word).strip().replace('"', '""')
    return f'"{quoted}"*'


def _stem(word: str) -> str:
    """The beginning of an English-looking word, for its other forms: decide and decision, billing and bill."""
    return word[: max(4, len(word) - 3)] if word.isascii() and word.isalpha() else word


def _in_a_row(tokens: Iterable[str]) -> str:
    """Tokens as a text in which those of a word are found as a part, whatever stood between them.

    A regular expression would take the product of their numbers where tokens repeat, and hold up the whole process.
    """
    return "\n" + "\n".join(tokens)


def _pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    """What finds a word as the index does: whatever stands between its parts, and followed by more letters perhaps."""
    begin = "" if _UNSPACED.match(tokens[0]) else r"(?<![^\W_])"
    return re.compile(begin + r"[\W_]*".join(map(re.escape, tokens)), re.IGNORECASE)


def folded(text: str) -> str:
    """The text without case and accents."""
    text = text.casefold()
    if text.isascii():
        return text
    plain = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    return unicodedata.normalize("NFC", "".join(c for c in plain if not "\u0300" <= c <= "\u036f"))


def indexed(text: str) -> str:
    """The text as it is indexed, with blanks around the characters that are words of their own."""
    return text if text.isascii() else _UNSPACED.sub(r" \1 ", folded(text))


def message_text(message: Message) -> str:
    """The text of a message that is searched: its content, and its tool calls."""
    calls = message.get("tool_calls")
    texts = [plain_text(message.get("content")), *map(_call_text, calls if isinstance(calls, list) else ())]
    return "\n".join(text for text in texts if text)[:_MAX_TEXT]


def _call_text(call: Any) -> str:
    function = call.get("function") if isinstance(call, dict) else None
    values = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else ()
    return " ".join(value for value in values if isinstance(value, str))
