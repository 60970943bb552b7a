"""Resolve `--model` to a directory, and to a name that stays the same for the cache's keys."""

from dataclasses import dataclass
from pathlib import Path

from gateway.stack import demos
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
    demo: demos.Demo | None = None
    dtype: str | None = None  # to be served in, where that is not the configuration's
    about: str = ""
    warning: str = ""

    @property
    def is_demo(self) -> bool:
        """Whether it is one of the two built-in ones."""
        return self.demo is not None

    @property
    def memory_bytes(self) -> int:
        """Size of the weights in memory; that of the files, unless they are converted to another type."""
        size = sum(path.stat().st_size for path in self.directory.glob("*.safetensors"))
        return size * 2 if self.dtype == "float32" else size


def prepare(data_dir: Path, model: str, served_name: str | None, served_as: str = "") -> Model:
    """Find or download a model, and link it into the data directory; `served_as` as in `fingerprint`.

    Raises `StackError`.
    """
    directory = find(model)
    digest = fingerprint(directory)
    name = Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2]
    key = _link(data_dir, directory, f"{name[:40]}-{digest[:8]}")
    return Model(directory, key, served_name or name, fingerprint(directory, served_as) if served_as else digest)


def served_demo(
    made: demos.DemoModel, served_name: str | None, served_as: str = "", *, on_cpu: bool, may_convert: bool
) -> Model:
    """A demo model, in float32 where that is faster and `may_convert` allows it."""
    # One core that has to emulate bfloat16 computes a prompt of 4,000 tokens in 10 s, and in 3.9 s as float32 (the
    # small model with random weights).
    dtype = "float32" if on_cpu and may_convert and not computes_bfloat16(_CPUINFO.read_text()) else None
    return Model(
        directory=made.directory,
        key=f"models/{made.directory.name}",
        served_name=served_name or DEMO_NAME,
        fingerprint=fingerprint(made.directory, f"{dtype or ''}{served_as}"),
        demo=made.kind,
        dtype=dtype,
        about=made.about,
        warning=made.warning,
    )


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


def _link(data_dir: Path, directory: Path, name: str) -> str:
    link = data_dir / "models" / name.replace("@", "-")
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink() or link.readlink() != directory:
        link.unlink(missing_ok=True)
        link.symlink_to(directory)
    return f"models/{link.name}"
