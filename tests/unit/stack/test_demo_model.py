"""The demo model: the same on every build, and a template under which a conversation only ever grows at its end."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.stack import demo_model, models, smollm2
from gateway.stack.errors import StackError
from gateway.stack.fingerprint import fingerprint
from gateway.stack.gguf_llama import GgufLlama
from gateway.stack.model_dir import MARKER, is_made
from tests.support import tiny_gguf

pytestmark = pytest.mark.local

Message = dict[str, Any]
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}

texts = st.text(max_size=30) | st.sampled_from(
    ["", "\n", "\n\nx", " y ", "Hello, world!", "<tool_call>", "<|im_end|>", "</think> so", "e\u0301 \U0001f600"]
)
calls = st.builds(
    lambda arguments: {"type": "function", "function": {"name": "get_weather", "arguments": arguments}},
    st.dictionaries(texts, texts | st.integers() | st.none(), max_size=3),
)
users = st.builds(lambda content: {"role": "user", "content": content}, texts)
tools = st.builds(lambda content: {"role": "tool", "tool_call_id": "c", "content": content}, texts)
replies = st.builds(lambda content: {"role": "assistant", "content": content}, texts)
callers = st.builds(
    lambda content, made: {"role": "assistant", "content": content or None, "tool_calls": made},
    texts,
    st.lists(calls, min_size=1, max_size=2),
)
thinkers = st.builds(
    lambda content, thought: {"role": "assistant", "content": content, "reasoning": thought}, texts, texts
)
systems = st.builds(lambda content: {"role": "system", "content": content}, texts)
conversations = st.builds(
    lambda head, rest: head + rest,
    st.lists(systems, max_size=1),
    st.lists(users | tools | replies | callers | thinkers, min_size=1, max_size=6),
)


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of an older recipe, replaced by a build in a process that orders its sets in another way."""
    directory = tmp_path_factory.mktemp("model") / "demo"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({MARKER: "small-0"}))
    (directory / "old").touch()
    argv = [sys.executable, "-m", "gateway.stack.demo_model", str(directory), "--size", "small"]
    subprocess.run(argv, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    return directory


@pytest.fixture(scope="module")
def tokenizer(demo_folder: Path) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds to import

    return AutoTokenizer.from_pretrained(demo_folder)


@pytest.fixture(scope="module", params=["random", "smollm2"])
def either_tokenizer(request: pytest.FixtureRequest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """That of the random model, and SmolLM2's rules with a small vocabulary."""
    if request.param == "random":
        return tokenizer
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    tiny_gguf.write_gguf(tiny_gguf.random_llama(), path)
    return smollm2.make_tokenizer(GgufLlama(path).vocabulary())


def render(tokenizer: Any, messages: list[Message], **more: Any) -> list[int]:
    rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **more)
    return list(rendered["input_ids"])


@settings(max_examples=150)
@given(conversations, st.sampled_from([None, [TOOL]]))
def test_a_shorter_conversation_is_a_prefix_of_the_longer_one_in_tokens(
    either_tokenizer: Any, messages: list[Message], offered: list[Any] | None
) -> None:
    whole = render(either_tokenizer, messages, tools=offered)
    for length in range(1, len(messages)):
        part = render(either_tokenizer, messages[:length], tools=offered)
        assert whole[: len(part)] == part


@settings(max_examples=150)
@given(conversations, replies | callers)
def test_a_prompt_is_a_prefix_of_the_next_turns_prompt(
    either_tokenizer: Any, messages: list[Message], reply: Message
) -> None:
    prompt = render(either_tokenizer, messages, add_generation_prompt=True)
    following = render(
        either_tokenizer, [*messages, reply, {"role": "user", "content": "go on"}], add_generation_prompt=True
    )
    assert following[: len(prompt)] == prompt


@settings(max_examples=150)
@given(conversations, texts, texts.filter(bool), st.sampled_from(["thinking", "enable_thinking"]))
def test_reasoning_is_rendered_as_the_generated_tokens(
    tokenizer: Any, messages: list[Message], content: str, thought: str, asked: str
) -> None:
    prompt = render(tokenizer, messages, add_generation_prompt=True, **{asked: True})
    assert prompt[-1:] == ids(tokenizer, demo_model.THINK)
    reply = {"role": "assistant", "content": content, "reasoning": thought}
    said = [*ids(tokenizer, thought), *ids(tokenizer, demo_model.THOUGHT), *ids(tokenizer, content)]
    following = render(tokenizer, [*messages, reply])
    assert following[: len(prompt) + len(said)] == prompt + said


@pytest.mark.parametrize("mark", [demo_model.THINK, demo_model.THOUGHT])
def test_reasoning_marks_are_generated_only_with_a_bias(demo_folder: Path, tokenizer: Any, mark: str) -> None:
    from safetensors import safe_open  # noqa: PLC0415 - imports torch

    (token,) = ids(tokenizer, mark)
    assert token not in tokenizer.all_special_ids
    with safe_open(demo_folder / "model.safetensors", "pt") as weights:
        head = weights.get_tensor("lm_head.weight")
    assert len(tokenizer) == len(head)
    # Dimension 0 of what the head reads is a constant; nothing else moves the odds of these tokens and of the end.
    end = tokenizer.eos_token_id
    assert not head[[token, end], 1:].any()
    assert head[end, 0] - head[token, 0] == 47


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


@settings(max_examples=150)
@given(texts)
def test_every_text_survives_its_tokens(either_tokenizer: Any, text: str) -> None:
    assert either_tokenizer.decode(either_tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_tool_call_is_rendered_as_hermes_parses_it(either_tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    text = either_tokenizer.apply_chat_template([message], tokenize=False)
    body = text.partition("<tool_call>")[2].partition("</tool_call>")[0]
    assert json.loads(body) == {"name": "get_weather", "arguments": {"city": "Paris"}}


def test_every_process_builds_the_same_files(demo_folder: Path, rebuilt: Path) -> None:
    assert _digests(rebuilt) == _digests(demo_folder)
    assert fingerprint(rebuilt) == fingerprint(demo_folder)


@pytest.mark.parametrize(
    ("cpuinfo", "does"),
    [
        ("flags\t\t: fpu avx512f avx512_vnni\nmodel name\t: bf16\n", False),
        ("flags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("", False),
    ],
)
def test_bfloat16_support_is_read_from_cpuinfo(cpuinfo: str, does: bool) -> None:
    assert models.computes_bfloat16(cpuinfo) == does


def test_fingerprint_includes_the_served_type(demo_folder: Path) -> None:
    seen = {fingerprint(demo_folder), fingerprint(demo_folder, served_as="float32")}
    assert len(seen) == 2


def test_built_model_is_not_rebuilt(demo_folder: Path) -> None:
    before = {path: path.stat() for path in demo_folder.iterdir()}
    demo_model.build(demo_folder, "small")
    assert {path: path.stat() for path in demo_folder.iterdir()} == before


def test_model_of_an_older_recipe_is_rebuilt(rebuilt: Path) -> None:
    assert is_made(rebuilt, demo_model.recipe("small"))
    assert not (rebuilt / "old").exists()
    assert [path.name for path in rebuilt.parent.iterdir()] == ["demo"]


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_directory_without_a_demo_model_is_not_replaced(tmp_path: Path, content: str | None) -> None:
    directory = tmp_path / "mine"
    directory.mkdir()
    (directory / "thesis.txt").write_text("years of work")
    if content is not None:
        (directory / "config.json").write_text(content)
    with pytest.raises(StackError, match="not a demo model"):
        demo_model.build(directory, "small")
    assert (directory / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_fingerprint_changes_with_weights_tokenizer_and_config(demo_folder: Path, tmp_path: Path) -> None:
    seen = {fingerprint(demo_folder)}
    for name, step in (("model.safetensors", 1_000), ("tokenizer.json", 10_000), ("config.json", 1_000)):
        changed = tmp_path / name
        changed.mkdir()
        for path in demo_folder.iterdir():
            (changed / path.name).write_bytes(path.read_bytes())
        _flip(changed / name, step)
        seen.add(fingerprint(changed))
    assert len(seen) == 4


def test_the_fingerprint_of_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StackError, match="holds no weights"):
        fingerprint(tmp_path)


def test_kv_takes_1_kib_per_layer_and_token(demo_folder: Path) -> None:
    config = json.loads((demo_folder / "config.json").read_text())
    layers, heads, dimension = (config[k] for k in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    assert layers * 2 * heads * dimension * 2 == 1024 * demo_model.SHAPES["small"].layers == 8192


def _digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def _flip(path: Path, step: int) -> None:
    """Change a bit every so often from the end, where the header of the weights does not lie."""
    content = bytearray(path.read_bytes())
    for offset in range(len(content) - 1, len(content) // 2, -step):
        content[offset] ^= 1
    path.write_bytes(content)
