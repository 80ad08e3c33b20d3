"""A tiny Llama of transformers, in floats and 4 bits; its logits there and here."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import torch
from configs import SIZES, random_model
from peft import PeftModel
from tolerances import measure_rounding
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qlora_jax as ql
from qlora_jax.llm.models.decoder import Decoder

TOKENS = np.random.default_rng(7).integers(0, 96, (2, 12))
LINEAR = [f"self_attn/{x}_proj" for x in "qkvo"]
LINEAR += [f"mlp/{x}_proj" for x in ("gate", "up", "down")]
PACKED = r"layers/.*_proj/kernel"


def save_float(folder: pathlib.Path, **changes):
    """Saves a random model, and returns the folder."""
    settings = dict(vocab_size=96, hidden_size=128, intermediate_size=256)
    settings |= dict(num_hidden_layers=2, tie_word_embeddings=False)
    settings = SIZES | settings | {"initializer_range": 0.1} | changes
    random_model("llama", settings).save_pretrained(folder)
    return folder


def save_4bit(
    folder: pathlib.Path,
    source: pathlib.Path,
    fmt="nf4",
    nested=True,
    storage=torch.uint8,
):
    """Packs a saved model with bitsandbytes and saves it, before any forward pass."""
    packing = dict(load_in_4bit=True, bnb_4bit_quant_type=fmt)
    packing |= dict(bnb_4bit_use_double_quant=nested, bnb_4bit_quant_storage=storage)
    packing |= dict(bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**packing), dtype=torch.float32
    )
    model.save_pretrained(folder)
    return folder


def their_model(folder: pathlib.Path, adapter=None, **options):
    """Loads a model for float32, perhaps with an adapter of PEFT.

    It is in training mode, without dropout: in evaluation mode bitsandbytes packs the
    weights again, and computes in bfloat16 on CPUs with AVX512-BF16.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).train()
    if adapter is None:
        return model
    return PeftModel.from_pretrained(model, adapter, **options)


def gradients_of(model):
    """Returns the gradients of a PEFT model, named as in its files."""
    return {
        name.replace(".default", "").replace("vector.weight", "vector"): x.grad.numpy()
        for name, x in model.named_parameters()
        if x.grad is not None
    }


def logits_of(model, tokens=TOKENS):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def measure_rounding_of(model, run):
    """Returns `run()`, and how far rounding the model's parameters moves its leaves.

    See `tolerances.measure_rounding`. The parameters are unchanged afterwards.
    """
    parameters = dict(model.named_parameters())
    values = {name: x.detach().numpy().copy() for name, x in parameters.items()}

    def run_with(values):
        with torch.no_grad():
            for name, x in parameters.items():
                x.copy_(torch.from_numpy(np.array(values[name])))
        return run()

    result = measure_rounding(run_with, values)
    run_with(values)
    return result


def draw_adapters(model):
    """Adds random numbers to the trainable parameters of a PEFT model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


def our_logits(config, base, lora=None, tokens=TOKENS):
    variables = {"params": base} if lora is None else {"params": base, "lora": lora}
    return apply(Decoder(config), variables, jnp.asarray(tokens))


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, tokens):
    """Returns the output; all variables of one structure share a compiled program."""
    return ql.linen.wrap(model).apply(variables, tokens)
