"""Encodings made from a tokenizer.json cut and merge every text as `tokenizers` itself does, token by token."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.sessions.tokenizer import Encoding, NoEncoding, read
from tests.support.gateway_process import ROOT

pytest.importorskip("tokenizers", reason="tokenizers comes with the extra `local`, and with `gpu`")
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA, QWEN = WORDS + r"\p{N}{1,3}" + OTHERS, WORDS + r"\p{N}" + OTHERS
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())

TEXTS = [
    *(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("gateway/api/*.py"))),
    (ROOT / "gateway/stack/demo_template.jinja").read_text(encoding="utf-8"),
    (ROOT / "README.md").read_text(encoding="utf-8"),
    "",
    "\n",
    " ",
    "   x  \n\n \t\r\n\r\n  y   ",
    "\u0085\u00a0\u2003\u3000\u180e\ufeff\u200b x\u2028y",
    "日本語のテキスト、中文文本\uff0c한국어 텍스트",
    "Grüße, naïve café; e\u0301 a\u030a ﬁ Å \u1e9b\u0323",
    "👩‍👩‍👧‍👦 🎉🎉 🇩🇪 👍🏽",
    "12345678 ٣٤٥ ½ ² ① 3.14e-10",
    "it's IT'S I'LL we've \u2019s '\u017f '\u212a",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|><|im_start|>",
    "<|im_start<|im_start|>|>",
    "a" * 3000,
    "ab" * 3000,
    " " * 3000 + "x",
    "\n" * 3000,
    "!?" * 500 + "\n\n",
    '{"a": [1, 2, {"b": null}], "c": "\\u00e9\\n"}',
    "मानक हिन्दी العربية עברית ไทย ქართული",
]


def trained(kind: str, vocabulary: int = 1500, **model: Any) -> Tokenizer:
    """A tokenizer of one of the families, trained on the repository itself."""
    tokenizer = Tokenizer(models.BPE(**model))
    before = {"gpt2": [], "llama": [LLAMA], "qwen": [QWEN], "deepseek": [r"\p{N}{1,3}", "[一-龥぀-ヿ]+", LLAMA]}[kind]
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in before]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")]
    )
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|im_start|>", "<|im_end|>"], initial_alphabet=ALPHABET,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    return tokenizer


def made(tokenizer: Tokenizer, folder: Path) -> Encoding:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return read(path)


def same(tokenizer: Tokenizer, encoding: Encoding, text: str) -> None:
    """Insist that both give the same tokens."""
    theirs = tokenizer.encode(text, add_special_tokens=False).ids
    ours = [token for ids in encoding.ids(text) for token in encoding._core.decode_tokens_bytes(ids)]
    assert [_spelt(token) for token in ours] == [tokenizer.id_to_token(i) for i in theirs]
    assert encoding.count(text) == len(theirs)


def _byte_characters() -> dict[int, str]:
    """Which character `tokenizers` writes for each byte that occurs in UTF-8, asked of it."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    longer = [*range(0x800, 0x10000, 0x800), *range(0x10000, 0x110000, 0x10000)]
    known: dict[int, str] = {}
    for text in map(chr, (code for code in (*range(0x800), *longer) if not 0xD800 <= code < 0xE000)):
        ((written, _),) = level.pre_tokenize_str(text)
        known |= dict(zip(text.encode(), written, strict=True))
    return known


_CHARACTERS = _byte_characters()


def _spelt(token: bytes) -> str:
    """A token as tokenizer.json spells it."""
    if token.startswith((b"<|im_", b"<tool_call>", b"<|endoftext|>")):
        return token.decode()
    return "".join(_CHARACTERS[byte] for byte in token)


@pytest.fixture
def demo(demo_folder: Path) -> Path:
    return demo_folder / "tokenizer.json"


def test_the_demo_models_encoding_is_exact_on_every_text(demo: Path) -> None:
    tokenizer, encoding = Tokenizer.from_file(str(demo)), read(demo)
    assert encoding.exact
    for text in TEXTS:
        same(tokenizer, encoding, text)


@pytest.fixture(scope="module", params=["gpt2", "llama", "qwen"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Encoding]:
    tokenizer = trained(request.param, ignore_merges=request.param == "llama")
    return tokenizer, made(tokenizer, tmp_path_factory.mktemp(request.param))


def test_an_encoding_of_a_known_family_is_exact_on_every_text(pair: tuple[Tokenizer, Encoding]) -> None:
    assert pair[1].exact
    for text in TEXTS:
        same(*pair, text)


@settings(max_examples=300)
@given(text=st.text() | st.text(alphabet=" \n\r\t'sSlL1a\u0301é<|im_endx>", max_size=40))
def test_an_encoding_of_a_known_family_is_exact_on_any_text(pair: tuple[Tokenizer, Encoding], text: str) -> None:
    same(*pair, text)


def random_merges(seed: int, *, ignore: bool) -> Tokenizer:
    """Merges that no training would make: several for a token, tokens that are never reached, words without a merge."""
    chance = random.Random(seed)
    tokens, merges = ["a", "b", "c"], []
    for _ in range(chance.randrange(1, 40)):
        merge = (chance.choice(tokens), chance.choice(tokens))
        if len("".join(merge)) < 9 and merge not in merges:
            merges.append(merge)
            tokens.append("".join(merge))
    words = ["".join(chance.choices("abc", k=chance.randrange(4, 9))) for _ in range(2)] if ignore else []
    vocab = {token: number for number, token in enumerate(dict.fromkeys([*ALPHABET, *tokens, *words]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return tokenizer


@pytest.mark.parametrize("ignore", [False, True])
def test_any_merges_give_the_tokens_that_they_give_in_tokenizers(tmp_path: Path, ignore: bool) -> None:
    exact = 0
    for seed in range(400):
        tokenizer = random_merges(seed, ignore=ignore)
        encoding = made(tokenizer, tmp_path)
        exact += encoding.exact
        chance = random.Random(seed)
        if encoding.exact:
            for _ in range(40):
                same(tokenizer, encoding, "".join(chance.choices("abc ", weights=[9, 9, 9, 2], k=chance.randrange(30))))
    assert exact == 400 if not ignore else 40 < exact < 400, exact


def off(tokenizer: Tokenizer, encoding: Encoding, texts: Sequence[str]) -> float:
    """How far the count of all texts is off."""
    theirs = sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
    return abs(sum(map(encoding.count, texts)) - theirs) / theirs


def test_several_split_patterns_are_approximated_and_marked_inexact(tmp_path: Path) -> None:
    tokenizer = trained("deepseek")
    encoding = made(tokenizer, tmp_path)
    assert not encoding.exact
    assert off(tokenizer, encoding, TEXTS) < 0.01


def test_an_unknown_pattern_keeps_all_text_and_is_inexact(tmp_path: Path) -> None:
    tokenizer = trained("gpt2")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{L}+"), behavior="isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    encoding = made(tokenizer, tmp_path)
    assert not encoding.exact
    for text in TEXTS:
        same(tokenizer, encoding, text)


def _changed(demo: Path, folder: Path, **changes: Any) -> Path:
    file = json.loads(demo.read_bytes())
    for name, value in changes.items():
        (file["model"] if name in file["model"] or name == "merges" else file)[name] = value
    path = folder / "changed.json"
    path.write_text(json.dumps(file))
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"type": "Unigram"}, "not a byte-level BPE"),
        ({"byte_fallback": True}, "not a byte-level BPE"),
        ({"pre_tokenizer": None}, "not a byte-level BPE"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "not a byte-level BPE"),
        ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix"),
        ({"vocab": {"a": 0}}, "lacks 255 of the 256 bytes"),
        ({"merges": 7}, "is not a tokenizer.json"),
        ({"merges": ["a b c"]}, "is not a tokenizer.json"),
        ({"added_tokens": [{}]}, "is not a tokenizer.json"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated"}, {"type": "ByteLevel"}]}},
            "split pattern is not understood",
        ),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "X"}, {"type": "ByteLevel"}]}}, "X"),
    ],
)  # fmt: skip
def test_a_file_that_gives_no_encoding_says_why(demo: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(NoEncoding, match=says) as refused:
        read(_changed(demo, tmp_path, **changes))
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b"{}", b"\xff", b'{"model": null}'])
def test_a_file_that_is_not_a_tokenizer_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(NoEncoding, match=str(path)):
        read(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"added_tokens": [{"content": "<mask>", "lstrip": True}]},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
    ],
)
def test_what_is_not_followed_to_the_letter_is_not_called_exact(
    demo: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert not read(_changed(demo, tmp_path, **changes)).exact
