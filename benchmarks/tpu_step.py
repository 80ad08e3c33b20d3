"""A whole QLoRA step of an 8B Llama, as shapes: for `tpu_static.py --step`."""

import jax
import jax.numpy as jnp
import optax

import qlora_jax as ql
from qlora_jax.models.config import DecoderConfig, LayerKind, Rope
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.products import einsum_f32

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
# Whether the kernel multiplies or XLA decodes, and which modules are not sliced.
ROWS = {
    "XLA decodes": (False, ()),
    "kernel, slices of the stack": (True, ()),
    "kernel, stack and layer index": (True, Decoder.scanned),
}
CHUNK = 256  # tokens whose logits are held at once


def cross_entropy(hidden, head, targets):
    """Mean loss; logits of `CHUNK` tokens at a time, made again for the gradient."""

    @jax.checkpoint
    def of_chunk(total, chunk):
        hidden, targets = chunk
        logits = einsum_f32("td,dv->tv", hidden, head)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return total + losses.sum(), None

    chunks = hidden.reshape(-1, CHUNK, hidden.shape[-1]), targets.reshape(-1, CHUNK)
    return jax.lax.scan(of_chunk, jnp.float32(0), chunks)[0] / targets.size


def abstract_trees(model, tokens):
    """Shapes of the base and lora trees of a bfloat16 model."""

    def make(key):
        params = model.init(key, tokens)["params"]
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        return ql.linen.init(key, model, params, CONFIG, tokens)

    return jax.eval_shape(make, jax.random.key(0))


def step_call(row, chip, sequence, offload=False, config=LLAMA_3_8B):
    """Returns a training step, shapes of its arguments, and which are donated.

    With `offload`, the optimizer's state is in host memory.
    """
    model = Decoder(config, dtype=jnp.bfloat16, remat=True)
    tokens = jax.ShapeDtypeStruct((1, sequence), jnp.int32)
    base, lora = abstract_trees(model, jnp.zeros((1, 8), jnp.int32))
    by_kernel, scanned = ROWS[row]
    backend = f"pallas_tpu_{chip}" if by_kernel else "reference"
    wrapped = ql.linen.wrap(model, scanned=scanned, backend=backend)
    optimizer = optax.adamw(1e-4)
    if offload:
        optimizer = ql.optim.offload(optimizer, layerwise=True)

    def loss_fn(lora, base, tokens, targets):
        variables = {"params": base, "lora": lora}
        hidden = wrapped.apply(variables, tokens, return_hidden=True)
        return cross_entropy(hidden[0], base["lm_head"]["kernel"], targets[0])

    def step(lora, opt_state, base, tokens, targets):
        loss, grads = jax.value_and_grad(loss_fn)(lora, base, tokens, targets)
        updates, opt_state = optimizer.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, loss

    opt_state = jax.eval_shape(optimizer.init, lora)
    return step, [lora, opt_state, base, tokens, tokens], (0, 1)
