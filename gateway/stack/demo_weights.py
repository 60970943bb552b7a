"""Random weights for the demo model: the same bytes on every machine, and replies that come to an end.

With the usual initialisation all logits are nearly equal: a reply would be noise up to the context limit and hardly
depend on the prompt. The gains below spread them, so that wrong KV shows in the logprobs at once. Hidden dimension 0 is
kept apart as a constant that gives the end-of-turn token a fixed head start: sampled replies last about 80 tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SEED = 20_260
KV_HEADS = 4
HEAD_DIM = 64
_EMBEDDING_STD = 0.3
_HEAD_START = 7.0
_NEVER_LOGIT = -100.0
_RARE_LOGIT = -40.0
# Standard deviation of a projection's weights, times the square root of its inputs. Measured with 600 random tokens:
# changing the first 64 of them moves the later logprobs by 1.0 on average, and greedy decoding does not loop.
_GAINS = {
    "q_proj": 1.0,
    "k_proj": 1.0,
    "v_proj": 1.0,
    "o_proj": 0.5,
    "gate_proj": 1.0,
    "up_proj": 1.0,
    "down_proj": 0.5,
}
_LM_HEAD_GAIN = 2.0
_WRITES_RESIDUAL = ("o_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Shape:
    """What differs between the sizes. All have four KV heads of 64: 1 KiB of KV per layer and token."""

    layers: int
    hidden: int
    intermediate: int


@dataclass(frozen=True, slots=True)
class TokenBiases:
    """Tokens with a probability of their own.

    `end` ends a reply, `never` is not generated at all, and `rare` only if a request wants it: in all contexts its
    logit is about -20, so that a `logit_bias` of 24 makes it as likely as the end.
    """

    end: int
    never: Sequence[int]
    rare: Sequence[int]


def save(path: Path, shape: Shape, vocabulary: int, biases: TokenBiases) -> None:
    """Write the safetensors file of a Llama of this shape that ends its turns."""
    from safetensors.torch import save_file  # noqa: PLC0415 - imports torch

    draw = _Draw()
    tensors = dict(_body(shape, vocabulary, draw))
    tensors["lm_head.weight"] = _head(shape, vocabulary, biases, draw)
    save_file(tensors, path, metadata={"format": "pt"})


def _body(shape: Shape, vocabulary: int, draw: "_Draw") -> Iterator[tuple[str, "torch.Tensor"]]:
    embedding = draw.uniform((vocabulary, shape.hidden), _EMBEDDING_STD)
    embedding[:, 0] = 2 * _EMBEDDING_STD
    yield "model.embed_tokens.weight", embedding
    for layer in range(shape.layers):
        yield from _layer(f"model.layers.{layer}.", shape, draw)
    yield "model.norm.weight", draw.ones(shape.hidden)


def _head(shape: Shape, vocabulary: int, biases: TokenBiases, draw: "_Draw") -> "torch.Tensor":
    head = draw.uniform((vocabulary, shape.hidden), _LM_HEAD_GAIN / math.sqrt(shape.hidden))
    head[:, 0] = 0
    head[list(biases.never), 0] = _NEVER_LOGIT
    for tokens, start in (([biases.end], _HEAD_START), (biases.rare, _RARE_LOGIT)):
        head[list(tokens)] = 0
        head[list(tokens), 0] = start
    return head


def _layer(prefix: str, shape: Shape, draw: "_Draw") -> Iterator[tuple[str, "torch.Tensor"]]:
    hidden, inner = shape.hidden, shape.intermediate
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, hidden),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for name, size in sizes.items():
        projection = name.rpartition(".")[2]
        weight = draw.uniform(size, _GAINS[projection] / math.sqrt(size[1]))
        if projection in _WRITES_RESIDUAL:
            weight[0] = 0
        yield f"{prefix}{name}.weight", weight
    yield f"{prefix}input_layernorm.weight", draw.ones(hidden)
    yield f"{prefix}post_attention_layernorm.weight", draw.ones(hidden)


class _Draw:
    """Draws from numpy, not torch: torch's normal distribution takes other paths on other CPUs."""

    def __init__(self) -> None:
        import numpy as np  # noqa: PLC0415 - only the machine that builds a model needs it
        import torch  # noqa: PLC0415

        self._torch = torch
        self._float32 = np.float32
        self._random = np.random.default_rng(SEED)

    def uniform(self, shape: tuple[int, int], std: float) -> "torch.Tensor":
        """A bf16 matrix with this standard deviation."""
        drawn = self._random.random(shape, dtype=self._float32)
        spread = self._float32(2 * math.sqrt(3) * std)
        return self._torch.from_numpy((drawn - self._float32(0.5)) * spread).to(self._torch.bfloat16)

    def ones(self, size: int) -> "torch.Tensor":
        """The weight of a norm that only normalises."""
        return self._torch.ones(size, dtype=self._torch.bfloat16)
