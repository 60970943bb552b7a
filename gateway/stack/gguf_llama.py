"""Read a Llama checkpoint from a GGUF file: weights as transformers names and orders them, and the tokenizer's parts.

vLLM 0.32 loads GGUF only through a plugin, and transformers 5 keeps its weights packed and cannot save them. So the
weights are dequantised here once (the package `gguf` knows the formats) and written as bfloat16.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch

_SPECIAL = 3  # gguf.TokenType.CONTROL
_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)


class Vocabulary(NamedTuple):
    """A byte-level BPE tokenizer: the texts of its tokens by id, its merges in order, and its special tokens."""

    tokens: list[str]
    merges: list[tuple[str, str]]
    special: list[str]


class GgufLlama:
    """A GGUF file with a Llama in it. Raises KeyError where a field is missing, ValueError for an unknown tensor."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader  # noqa: PLC0415 - only the machine that converts a model needs it

        self._reader: Any = GGUFReader(path)

    def config(self) -> dict[str, Any]:
        """The fields of a `LlamaConfig` that describe its shape."""
        return {
            "vocab_size": len(self._field("tokenizer.ggml.tokens")),
            "hidden_size": self._field("llama.embedding_length"),
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_hidden_layers": self._field("llama.block_count"),
            "num_attention_heads": self._field("llama.attention.head_count"),
            "num_key_value_heads": self._field("llama.attention.head_count_kv"),
            "head_dim": self._field("llama.rope.dimension_count"),
            "max_position_embeddings": self._field("llama.context_length"),
            "rms_norm_eps": round(self._field("llama.attention.layer_norm_rms_epsilon"), 9),  # stored as float32
            "rope_parameters": {"rope_type": "default", "rope_theta": self._field("llama.rope.freq_base")},
            "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in self._reader.tensors),
        }

    def vocabulary(self) -> Vocabulary:
        """Its tokenizer."""
        tokens = self._field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        kinds = self._field("tokenizer.ggml.token_type")
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL]
        return Vocabulary(tokens, merges, special)

    def tensors(self) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Every weight in bfloat16, under the name that transformers gives it."""
        import torch  # noqa: PLC0415
        from gguf import dequantize  # noqa: PLC0415

        heads = {
            "q_proj": self._field("llama.attention.head_count"),
            "k_proj": self._field("llama.attention.head_count_kv"),
        }
        for tensor in self._reader.tensors:
            name = checkpoint_name(tensor.name)
            weight = dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
            if count := heads.get(name.split(".")[-2]):
                weight = unpermute(weight, count)
            yield name, torch.tensor(weight, dtype=torch.bfloat16)

    def _field(self, name: str) -> Any:
        return self._reader.fields[name].contents()


def checkpoint_name(name: str) -> str:
    """The name that transformers has for a tensor of llama.cpp. Raises ValueError where it has none."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if match is None or match[2] not in _NAMES:
        raise ValueError(f"a Llama has no tensor {name!r}")
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{_NAMES[match[2]]}.weight"


def unpermute(weight: "np.ndarray[Any, Any]", heads: int) -> "np.ndarray[Any, Any]":
    """Undo llama.cpp's order of the rows of Q and K, which has the two halves of a rotation next to each other."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
