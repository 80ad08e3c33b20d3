"""A whole QLoRA step of a Llama as shapes, for `tpu_static.py --step`."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

import qlora_jax as ql
from qlora_jax.llm.models.config import DecoderConfig, LayerKind, Rope
from qlora_jax.llm.models.decoder import Decoder, head_arguments

LLAMA_3_8B = DecoderConfig(
    128256,
    4096,
    14336,
    32,
    num_heads=32,
    num_kv_heads=8,
    layers=(LayerKind(Rope(500_000.0)),),
    tie_embeddings=False,
)
CONFIG = ql.QLoRAConfig(
    rank=64, targets=r"layers/.*/(q|k|v|o|gate|up|down)_proj/kernel"
)
LLAMA_3_70B = dataclasses.replace(
    LLAMA_3_8B,
    hidden_size=8192,
    intermediate_size=28672,
    num_layers=80,
    num_heads=64,
    layers=LLAMA_3_8B.layers[:1],
)
MODELS = {"8B": LLAMA_3_8B, "70B": LLAMA_3_70B}
# Whether the TPU kernel multiplies or XLA decodes, and which modules are not sliced.
ROWS = {
    "XLA decodes": (False, ()),
    "kernel, slices of the stack": (True, ()),
    "kernel, stack and layer index": (True, Decoder.scanned),
}
CHUNK = 256  # tokens whose logits are held at once
SPLASH = {"attention": "splash"}
LOW = SPLASH | {"stream_dtype": jnp.bfloat16}
TILES = {"mlp_tile": 2048}
OFFLOAD = LOW | TILES | {"remat": "offload"}
# Arguments of the decoder, and whether the optimizer's state and the packed base are in
# host memory.
CHOICES = {
    "": ({}, False, False),
    "state on the host": ({}, True, False),
    "splash": (SPLASH, False, False),
    "and bfloat16 stream": (LOW, False, False),
    "and MLP in tiles": (LOW | TILES, False, False),
    "and layer inputs on the host": (OFFLOAD, False, False),
    "and state on the host": (OFFLOAD, True, False),
    "and base on the host": (OFFLOAD, True, True),
}


def abstract_trees(model, tokens):
    """Shapes of the base and lora trees of a bfloat16 model."""

    def make_trees(key):
        params = model.init(key, tokens)["params"]
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        return ql.linen.init(key, model, params, CONFIG, tokens)

    return jax.eval_shape(make_trees, jax.random.key(0))


def step_call(row, chip, sequence, choice="", config=LLAMA_3_8B):
    """Returns a training step, shapes of its arguments, and which are donated."""
    options, offload, _ = CHOICES[choice]
    model = Decoder(config, jnp.bfloat16, **({"remat": True} | options))
    tokens = jax.ShapeDtypeStruct((1, sequence), jnp.int32)
    base, lora = abstract_trees(model, jnp.zeros((1, 8), jnp.int32))
    by_kernel, scanned = ROWS[row]
    backend = f"pallas_tpu_{chip}" if by_kernel else "reference"
    wrapped = ql.linen.wrap(model, scanned=scanned, backend=backend)
    optimizer = optax.adamw(1e-4)
    if offload:
        optimizer = ql.optim.offload(optimizer)

    def loss_fn(lora, base, tokens, targets):
        variables = {"params": base, "lora": lora}
        hidden = wrapped.apply(variables, tokens, return_hidden=True)
        head = head_arguments(config, base, lora)
        losses = ql.losses.chunked_cross_entropy(
            hidden, labels=targets, chunk_size=CHUNK, **head
        )
        return losses.mean()

    def step(lora, opt_state, base, tokens, targets):
        loss, grads = jax.value_and_grad(loss_fn)(lora, base, tokens, targets)
        updates, opt_state = optimizer.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, loss

    opt_state = jax.eval_shape(optimizer.init, lora)
    return step, [lora, opt_state, base, tokens, tokens], (0, 1)
