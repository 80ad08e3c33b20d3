"""A tiny Llama of transformers, and the table of its names in our decoder."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import qlora_jax as ql
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder

TOKENS = np.random.default_rng(7).integers(0, 96, (2, 12))
LINEAR = [f"self_attn/{x}_proj" for x in "qkvo"]
LINEAR += [f"mlp/{x}_proj" for x in ("gate", "up", "down")]
NAMES = ql.io.Names(
    {
        "embed_tokens/embedding": "model.embed_tokens.weight",
        "norm/scale": "model.norm.weight",
        "lm_head/kernel": "lm_head.weight",
        **{
            f"layers/{x}/scale": f"model.layers.{{layer}}.{x}.weight"
            for x in ("input_layernorm", "post_attention_layernorm")
        },
        **{
            f"layers/{x}/kernel": f"model.layers.{{layer}}.{x.replace('/', '.')}.weight"
            for x in LINEAR
        },
    }
)
TIED = ql.io.Names(
    {path: x for path, x in NAMES.entries.items() if path != "lm_head/kernel"}
)


def save_float(folder: pathlib.Path, seed=0, dtype=torch.float32, **changes):
    """Saves a random model, and returns its config."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    config = LlamaConfig(**{**settings, **changes})
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return config


def save_4bit(folder: pathlib.Path, source: pathlib.Path, fmt="nf4", nested=True):
    """Packs a saved model with bitsandbytes and saves it, before any forward pass."""
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=fmt,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=how, dtype=torch.float32
    )
    model.save_pretrained(folder)


def their_model(folder: pathlib.Path):
    """Loads a model for float32.

    In training mode, without dropout: in evaluation bitsandbytes computes in bfloat16
    on CPUs that have AVX512-BF16, and packs the weights anew.
    """
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


def logits_of(model, tokens=TOKENS):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def their_logits(folder: pathlib.Path, tokens=TOKENS):
    return logits_of(their_model(folder), tokens)


def decoder(config) -> Decoder:
    """Our decoder of the same shape."""
    c = config
    return Decoder(
        DecoderConfig(
            c.vocab_size,
            c.hidden_size,
            c.intermediate_size,
            c.num_hidden_layers,
            num_heads=c.num_attention_heads,
            num_kv_heads=c.num_key_value_heads,
            rms_norm_eps=c.rms_norm_eps,
            tie_embeddings=c.tie_word_embeddings,
        )
    )


def shapes(config):
    """The shapes of our decoder's parameters."""
    model, tokens = decoder(config), jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def our_logits(config, base, lora=None, tokens=TOKENS):
    variables = {"params": base} if lora is None else {"params": base, "lora": lora}
    return np.asarray(apply(decoder(config), variables, jnp.asarray(tokens)))


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, tokens):
    """The model's output, by one program for all variables of one structure."""
    return ql.linen.wrap(model).apply(variables, tokens)
