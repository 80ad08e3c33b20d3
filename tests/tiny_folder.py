"""A Hugging Face folder of a tiny random Llama, with a tokenizer of words."""

import json
import pathlib

import jax
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

import qlora_jax as ql
from qlora_jax.models.checkpoint import abstract_params
from qlora_jax.models.families import config_from_hf
from qlora_jax.models.names import decoder_names

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def by_path(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    spell = lambda keys: jax.tree_util.keystr(keys, simple=True, separator="/")
    return {spell(keys): leaf for keys, leaf in found}


def write_folder(folder: pathlib.Path, raw: dict = CONFIG) -> pathlib.Path:
    folder.mkdir(parents=True)
    config = config_from_hf(raw)
    names, rng = decoder_names(config), np.random.default_rng(0)
    tensors = {}
    for path, leaf in by_path(abstract_params(config)).items():
        batch = leaf.shape[: names.num_batch_axes(path)]
        shape = leaf.shape[len(batch) :]
        shape = shape[::-1] if names.roles(path) else shape
        for name in names.of(path, batch).flat:
            x = 0.3 * rng.normal(size=shape)
            tensors[name] = (x if len(shape) > 1 else 1 + x).astype(np.float32)
    ql.io.write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(raw))
    vocab = {f"w{i}": i for i in range(96)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
