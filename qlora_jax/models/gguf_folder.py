"""The Hugging Face files that a GGUF file stands for: config and tokenizer."""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from .config import DecoderConfig
from .gguf_in import field, open_gguf, read_gguf
from .gguf_metadata import gguf_architecture
from .tokenizer import load_tokenizer

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


@contextlib.contextmanager
def folder_of_gguf(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a folder with the config and the tokenizer of a GGUF file, for a while.

    Args:
        path: The file.

    Yields:
        A folder with `config.json`, `generation_config.json`, `tokenizer.json` and
        `tokenizer_config.json`, as those of a Hugging Face model; without weights.

    Raises:
        ValueError: If the model or its tokenizer has a part that we do not write.

    Example:
        >>> import tempfile, qlora_jax as ql
        >>> from qlora_jax.models.checkpoint import load
        >>> from qlora_jax.models.gguf_out import save_gguf
        >>> from qlora_jax.models.tiny import save_tiny
        >>> source = save_tiny(tempfile.mkdtemp())
        >>> _, params = load(source, progress=False)
        >>> path = tempfile.mkdtemp() + "/model.gguf"
        >>> save_gguf(path, source, params, tokenizer=False, progress=False)
        >>> with folder_of_gguf(path) as folder:
        ...     ql.io.read_config_json(folder)["model_type"]
        'llama'
    """
    path = pathlib.Path(path)
    config, _ = read_gguf(path)
    reader = open_gguf(path)
    ids = {
        f"{name}_token_id": found
        for name, theirs in _SPECIAL.items()
        if (found := field(reader, f"tokenizer.ggml.{theirs}_token_id")) is not None
    }
    files: dict[str, Any] = {
        "config.json": hf_config(config, _context(reader)) | ids,
        "generation_config.json": ids,
    }
    tokenizer = None
    if field(reader, "tokenizer.ggml.model") is not None:
        tokenizer = load_tokenizer(path)
        files["tokenizer_config.json"] = _tokenizer_config(reader, tokenizer, ids)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        for name, values in files.items():
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
        if tokenizer is not None:
            tokenizer.save(str(folder / "tokenizer.json"))
        yield folder


def hf_config(config: DecoderConfig, context: int) -> dict[str, Any]:
    """Returns the `config.json` of a decoder that a GGUF file can hold.

    Args:
        config: The decoder's config.
        context: How many positions it was trained with.

    Raises:
        ValueError: If it has parts that such a config cannot say.

    Example:
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> hf_config(config, context=128)["num_key_value_heads"]
        2
    """
    c, kind = config, gguf_architecture(config)
    (rope,) = c.ropes
    assert rope is not None
    if rope.divisors:
        raise ValueError(
            "a GGUF model must not have stretched rotary positions to be written as a "
            "Hugging Face folder, whose config says by which rule they are."
        )
    biases = {"llama": (c.qkv_bias, c.mlp_bias), "qwen3": (c.qkv_bias,)}.get(kind, ())
    names = ("attention_bias", "mlp_bias")
    if kind == "llama" and c.qkv_bias != c.o_bias:
        raise ValueError("q, k and v must have biases if the output projection has.")
    return {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": c.activation,
        "max_position_embeddings": context,
        "rms_norm_eps": c.rms_norm_eps,
        # Transformers 5 reads the second, older versions and other programs the first.
        "rope_theta": rope.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope.theta},
        "tie_word_embeddings": c.tie_embeddings,
        **dict(zip(names, biases, strict=False)),
    }


def _context(reader: Any) -> int:
    family = field(reader, "general.architecture")
    found = field(reader, f"{family}.context_length")
    if not found:
        raise ValueError("a GGUF file must say how long the context is.")
    return int(found)


def _tokenizer_config(
    reader: Any, tokenizer: Any, ids: dict[str, int]
) -> dict[str, Any]:
    template = field(reader, "tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{
            name.removesuffix("_id"): tokenizer.id_to_token(index)
            for name, index in ids.items()
        },
        **({} if template is None else {"chat_template": template}),
    }
