"""The demo model with random weights (`--demo random`): a real Llama checkpoint, made on this machine in seconds.

It writes nothing sensible, but to vLLM and LMCache it is a model like any other, and it needs no download. Everything
in it follows from this file and the two data files next to it, so every machine gets the same tokens.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from gateway.stack import demo_weights
from gateway.stack.demo_weights import HEAD_DIM, KV_HEADS, Shape, TokenBiases
from gateway.stack.model_dir import MARKER, write_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

Size = Literal["small", "large"]

RECIPE = 2
"""Raise it when the files would change: a model of an older recipe is rebuilt."""
CONTEXT = 32_768
END, START, BEGIN = "<|im_end|>", "<|im_start|>", "<|endoftext|>"
THINK, THOUGHT = "<think>", "</think>"
"""Around its reasoning, if a request asks for that: the names that vLLM's reasoning parsers look for."""
_HERE = Path(__file__).parent


SHAPES: dict[Size, Shape] = {"small": Shape(8, 512, 1024), "large": Shape(16, 1024, 2816)}


def build(directory: Path, size: Size) -> None:
    """Write the model into `directory`, whole or not at all; a complete one is left as it is."""
    write_model(directory, recipe(size), lambda unfinished: _write(unfinished, SHAPES[size], recipe(size)))


def recipe(size: Size) -> str:
    """What a model of this size is marked with."""
    return f"{size}-{RECIPE}"


def _write(directory: Path, shape: Shape, marker: str) -> None:
    from transformers import LlamaConfig  # noqa: PLC0415 - takes seconds to import

    tokenizer = _tokenizer()
    tokenizer.save_pretrained(directory)
    special: dict[str, Any] = {
        "bos_token_id": _token_id(tokenizer, BEGIN),
        "eos_token_id": _token_id(tokenizer, END),
        "pad_token_id": _token_id(tokenizer, BEGIN),
    }
    marked: dict[str, Any] = {MARKER: marker}
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // HEAD_DIM,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        dtype="bfloat16",
        **special,
        **marked,
    )
    weights = directory / "model.safetensors"
    rare = [_token_id(tokenizer, text) for text in (THINK, THOUGHT)]
    biases = TokenBiases(special["eos_token_id"], _unprintable(tokenizer), rare)
    demo_weights.save(weights, shape, len(tokenizer), biases)
    (directory / "generation_config.json").write_text(json.dumps(special), encoding="utf-8")
    config.save_pretrained(directory)


def _token_id(tokenizer: "PreTrainedTokenizerFast", text: str) -> int:
    token = tokenizer.convert_tokens_to_ids(text)
    assert isinstance(token, int), "one text, one token"  # noqa: S101 - for the type checker
    return token


def _tokenizer() -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    return PreTrainedTokenizerFast(
        tokenizer_object=_train(),
        bos_token=BEGIN,
        eos_token=END,
        pad_token=BEGIN,
        additional_special_tokens=[START],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=(_HERE / "demo_template.jinja").read_text(encoding="utf-8"),
    )


def _unprintable(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Tokens that are no text of their own: special ones, halves of a character, controls that garble a terminal."""
    special = set(tokenizer.all_special_ids)
    texts = [str(tokenizer.decode([token])) for token in range(len(tokenizer))]
    return [token for token, text in enumerate(texts) if token in special or not _is_plain(text)]


def _is_plain(text: str) -> bool:
    return text == "\n" or (text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text)


def _train() -> "Tokenizer":
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415

    tokenizer = Tokenizer(models.BPE())
    # A line break is always a token of its own, so whatever the template puts around a message never merges with it:
    # the tokens of a conversation are an exact prefix of the tokens of the longer one.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2_048,
        min_frequency=2,
        special_tokens=[BEGIN, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([(_HERE / "demo_corpus.txt").read_text(encoding="utf-8")], trainer)
    # Not special: a special token is no part of the text in which a reasoning parser looks for them.
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (THINK, THOUGHT)])
    return tokenizer


def main() -> None:
    """`python -m gateway.stack.demo_model DIR --size small|large`, for measurements without the whole stack."""
    parser = argparse.ArgumentParser(prog="python -m gateway.stack.demo_model", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=get_args(Size), default="small")
    options = parser.parse_args()
    build(options.directory, options.size)


if __name__ == "__main__":
    main()
