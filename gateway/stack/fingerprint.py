"""Fingerprint a model's weights: LMCache's keys hold only its path, so the salt has to identify the weights."""

from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3

from gateway.stack.errors import StackError

# Everything that determines the tokens of a conversation and their KV. Not the README, not the images.
_READ_WHOLE = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.py",
)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")

_SAMPLES = 64
_SAMPLE_BYTES = 4096
"""Two fine-tunes of one model agree in name, size and header, so a little of the weights is read as well: 256 KiB of a
file, spread over it. A file of 5 GB takes milliseconds."""


def fingerprint(model_dir: Path, served_as: str = "") -> str:
    """32 hex characters that change when the configuration, the tokenizer or the weights do.

    `served_as` is the type that the model is computed in, where that is not its own, and options of vLLM that change
    its KV: what else the bytes of KV depend on.
    """
    digest = blake3(served_as.encode())
    for name, content in _contents(model_dir):
        digest.update(f"{len(name)}:{name}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()[:32]


def _contents(model_dir: Path) -> Iterator[tuple[str, bytes]]:
    for path in _matching(model_dir, _READ_WHOLE):
        yield path.name, path.read_bytes()
    weights = _matching(model_dir, _WEIGHTS)
    if not weights:
        raise StackError(f"{model_dir} holds no weights ({', '.join(_WEIGHTS)}); is the download complete?")
    for path in weights:
        yield path.name, path.stat().st_size.to_bytes(8, "big") + _header(path) + b"".join(_samples(path))


def _matching(model_dir: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in model_dir.glob(pattern) if path.is_file()})


def _header(path: Path) -> bytes:
    """The names, types and shapes of a safetensors file; nothing for other formats."""
    if path.suffix != ".safetensors":
        return b""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise StackError(f"{path} is not a safetensors file; download the model again")
        return file.read(size)


def _samples(path: Path) -> Iterator[bytes]:
    step = max(path.stat().st_size // _SAMPLES, _SAMPLE_BYTES)
    with path.open("rb") as file:
        for offset in range(0, path.stat().st_size, step):
            file.seek(offset)
            yield file.read(_SAMPLE_BYTES)
