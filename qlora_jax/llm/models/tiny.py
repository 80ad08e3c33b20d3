"""Writes a small random checkpoint, for tests and examples without a download."""

import pathlib
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.tree_util import KeyPath

import qlora_jax as ql

from ..gguf.pre_tokenizers import make_pre_tokenizer
from .checkpoint import abstract_params
from .config import DecoderConfig
from .decoder_names import decoder_names
from .families import config_from_hf

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (  # ChatML
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny(folder: str | pathlib.Path, *, seed: int = 0, **changes: Any) -> str:
    """Returns the path of a new folder with a random Llama in Hugging Face's format.

    The model has a byte-level tokenizer and a chat template.

    Args:
        folder: A new or empty folder.
        seed: Seed of the weights.
        **changes: Values of `config.json` to change.

    Raises:
        ValueError: If the decoder does not support the config, or the folder is not
            empty.

    Example:
        >>> import tempfile
        >>> folder = save_tiny(tempfile.mkdtemp(), num_hidden_layers=3)
        >>> from qlora_jax.llm.models.checkpoint import read_config
        >>> read_config(folder).num_layers
        3
    """
    tokenizer = byte_tokenizer()
    raw = {
        **CONFIG,
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_token_id": tokenizer.token_to_id(SPECIAL_TOKENS[1]),
        **changes,
    }
    config = config_from_hf(raw)
    params, names = random_params(config, seed), decoder_names(config)
    ql.io.save_merged(folder, params, {}, names, raw, progress=False)
    path = pathlib.Path(folder)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    return str(folder)


def random_params(config: DecoderConfig, seed: int = 0) -> dict[str, Any]:
    """Returns float32 parameters: ones as norm scales, normally distributed weights."""
    rng = np.random.default_rng(seed)

    def draw_leaf(path: KeyPath, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if getattr(path[-1], "key", None) == "scale":
            return np.ones(leaf.shape, np.float32)
        return rng.normal(0, leaf.shape[-1] ** -0.5, leaf.shape).astype(np.float32)

    return jax.tree.map_with_path(draw_leaf, abstract_params(config))


def byte_tokenizer() -> "Tokenizer":
    """Returns a tokenizer with tokens for bytes, "in" and ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: index for index, text in enumerate([*letters, "in"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("i", "n")]))
    tokenizer.pre_tokenizer = make_pre_tokenizer("smollm")
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL_TOKENS])
    return tokenizer
