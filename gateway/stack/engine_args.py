"""vLLM's own options, behind the `--` of `cwg up`: those that are refused, and those that change what KV is.

They are known by their names only, read as vLLM reads them (vLLM 0.32, `utils/argparse_utils.py`): with `_` or `-`,
abbreviated, with a value after `=`, with a field of a JSON value after a dot. Their values are vLLM's to check.
"""

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from gateway.stack.errors import StackError

_SET = "`cwg up` sets it, and the gateway relies on it"
_LOCAL = "only the gateway talks to this vLLM; what clients need is set at the gateway (docs/settings.md)"
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "--model": "give --model before the `--`",
        "--served-model-name": "give --served-model-name before the `--`",
        "--port": "give --engine-port before the `--`",
        "--max-model-len": "give --max-model-len before the `--`",
        "--kv-cache-memory-bytes": "give --engine-kv-gb before the `--`",
        "--host": _SET,
        "--kv-transfer-config": _SET,
        "--enable-prefix-caching": _SET,
        "--enable-prompt-tokens-details": _SET,
        "--enable-scale-out": _SET,
        "--config": "write the options out after the `--`",
        "--api-key": _LOCAL,
        "--root-path": _LOCAL,
        "--ssl-certfile": _LOCAL,
        "--ssl-keyfile": _LOCAL,
        "--uds": _LOCAL,
    }
)
_SHORT: Mapping[str, str] = MappingProxyType({"-tp": "--tensor-parallel-size", "-q": "--quantization"})
# With any other option, KV may have other bytes. Tensor parallelism is part of LMCache's keys (gateway/kv/keys.py).
_SAME_KV = frozenset({
    "--async-scheduling", "--chat-template", "--chat-template-content-format", "--collect-detailed-traces",
    "--default-chat-template-kwargs", "--disable-log-stats", "--disable-uvicorn-access-log", "--download-dir",
    "--enable-auto-tool-choice", "--enable-chunked-prefill", "--enable-log-requests", "--generation-config",
    "--gpu-memory-utilization", "--limit-mm-per-prompt", "--log-level", "--max-logprobs", "--max-num-batched-tokens",
    "--max-num-seqs", "--otlp-traces-endpoint", "--override-generation-config", "--reasoning-config",
    "--reasoning-parser", "--reasoning-parser-plugin", "--scheduling-policy", "--structured-outputs-config",
    "--tensor-parallel-size", "--tool-call-parser", "--tool-parser-plugin", "--trust-remote-code",
    "--uvicorn-log-level",
})  # fmt: skip
_NUMBER = re.compile(r"-\.?\d")


def check(arguments: tuple[str, ...]) -> None:
    """Raise `StackError` for an option that the stack sets itself, and for what is not an option."""
    if arguments and not arguments[0].startswith("-"):
        raise StackError(f"unexpected argument {arguments[0]!r}; options of vLLM come after `--` and begin with a dash")
    for name, _ in _options(arguments):
        plain = re.sub("^--no-", "--", name)
        refused = next((own for own in REFUSED if len(plain) > 2 and own.startswith(plain)), None)
        if refused:
            raise StackError(f"option {name} of vLLM cannot be given: {REFUSED[refused]}")


def kv_identity(arguments: tuple[str, ...]) -> str:
    """The options with which KV may have other bytes, in a form that is the same in any order; "" if there are none."""
    return " ".join(sorted(" ".join(option) for option in _options(arguments) if option[0] not in _SAME_KV))


def _options(arguments: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Each option: its name, and all of its values (with a field's name before them)."""
    name, values = "", list[str]()
    for argument in arguments:
        if argument.startswith("-") and not _NUMBER.match(argument):
            if name:
                yield name, " ".join(values)
            text, _, value = argument.partition("=")
            text, _, path = text.partition(".")
            name = text.replace("_", "-") if text.startswith("--") else _SHORT.get(text, text)
            values = [part for part in (path, value) if part]
        else:
            values.append(argument)
    if name:
        yield name, " ".join(values)
