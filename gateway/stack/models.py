"""Resolve `--model` to a directory, and to a name that stays the same for the cache's keys."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from gateway.stack import demo_model
from gateway.stack.errors import StackError
from gateway.stack.fingerprint import fingerprint

_CPUINFO = Path("/proc/cpuinfo")
DEMO_NAME = "demo"
_NOT_NEEDED = ["*.gguf", "*.onnx", "*.pth", "*.h5", "*.msgpack", "original/*", "onnx/*"]


@dataclass(frozen=True, slots=True)
class Model:
    """A model on this disk.

    `key` is what vLLM gets as `--model`, relative to the data directory. LMCache writes it into every key and file
    name, so it is short, says which weights it stands for, and survives a move of the data directory.
    """

    directory: Path
    key: str
    served_name: str
    fingerprint: str
    is_demo: bool
    dtype: str | None = None  # to be served in, where that is not the configuration's

    @property
    def weight_bytes(self) -> int:
        """Size of the files that vLLM loads into memory."""
        return sum(path.stat().st_size for path in self.directory.glob("*.safetensors"))


def prepare(
    data_dir: Path, model: str | None, served_name: str | None, demo_size: demo_model.Size, *, on_cpu: bool
) -> Model:
    """Build, find or download the model, and link it into the data directory."""
    if model is None:
        directory = data_dir / "models" / f"{DEMO_NAME}-{demo_size}"
        _build_demo(directory, demo_size)
        # One core that has to emulate bfloat16 computes a prompt of 4,000 tokens in 10 s, and in 3.9 s as float32. The
        # large one is for measuring, and keeps the usual type.
        dtype = "float32" if on_cpu and demo_size == "small" and not computes_bfloat16(_CPUINFO.read_text()) else None
        digest = fingerprint(directory, served_as=dtype or "")
        return Model(directory, f"models/{directory.name}", served_name or DEMO_NAME, digest, True, dtype)
    directory = find(model)
    digest = fingerprint(directory)
    name = Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2]
    return Model(directory, _link(data_dir, directory, f"{name[:40]}-{digest[:8]}"), served_name or name, digest, False)


def computes_bfloat16(cpuinfo: str) -> bool:
    """Whether a CPU has instructions for bfloat16 matrices, according to Linux (/proc/cpuinfo)."""
    flags = {word for line in cpuinfo.splitlines() if line.startswith(("flags", "Features")) for word in line.split()}
    return not flags.isdisjoint({"amx_bf16", "avx512_bf16", "bf16"})  # the last is what ARM calls it


def find(model: str) -> Path:
    """The directory of a model: itself, or the snapshot in Hugging Face's cache, downloaded first if need be."""
    directory = Path(model)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise StackError(f"--model {model}: the directory has no config.json; name the one that holds the weights")
        return directory.resolve()
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise StackError(f"--model {model}: no such directory")
    return _snapshot(model)


def _snapshot(model: str) -> Path:
    from huggingface_hub import constants, snapshot_download  # noqa: PLC0415 - comes with vLLM, not with the gateway
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except HFValidationError:
        raise StackError(f"--model {model}: neither a directory nor the name of a model") from None
    except LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE:
            raise StackError(
                f"--model {model}: not in the local cache, and HF_HUB_OFFLINE forbids the download"
            ) from None
    try:
        return Path(snapshot_download(model, ignore_patterns=_NOT_NEEDED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StackError(f"--model {model}: the download failed ({reason}); give a directory to work offline") from None


def _build_demo(directory: Path, size: demo_model.Size) -> None:
    """In a process of its own: transformers would stay in this one's memory for as long as the stack runs."""
    if demo_model.is_built(directory, size):
        return
    for unfinished in directory.parent.glob(f".{directory.name}-*"):
        shutil.rmtree(unfinished)  # of a build that was killed; the lock says that none is under way
    argv = [sys.executable, "-m", "gateway.stack.demo_model", str(directory), "--size", size]
    built = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if built.returncode:
        raise StackError(f"the demo model could not be built: {built.stderr.strip().splitlines()[-1]}")


def _link(data_dir: Path, directory: Path, name: str) -> str:
    link = data_dir / "models" / name.replace("@", "-")
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink() or link.readlink() != directory:
        link.unlink(missing_ok=True)
        link.symlink_to(directory)
    return f"models/{link.name}"
