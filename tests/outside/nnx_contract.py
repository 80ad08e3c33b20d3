"""The contract that every wrapped nnx model must fulfil."""

import jax.numpy as jnp
from flax import nnx
from helpers import randomized, relative_error
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.trees.paths import leaves_by_path


@nnx.jit(static_argnames=("logits", "wrt"))
def gradient(model, logits, wrt):
    def loss(model):
        return jnp.sum(jnp.square(logits(model)))

    return nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model)


def assert_equals_merged(wrapped, model, logits, names):
    """Checks what is packed, logits, and the gradient of each A."""
    nnx.update(wrapped, randomized(nnx.state(wrapped, nnx.LoRAParam)))
    packed = nnx.to_flat_state(nnx.state(wrapped, ql.nnx.Packed))
    assert {"/".join(map(str, path)) for path, _ in packed} == set(names)
    merged = ql.nnx.merge(wrapped)
    assert nnx.graphdef(merged) == nnx.graphdef(model)
    assert_close(logits(wrapped), logits(merged))
    assert 0.01 < relative_error(logits(wrapped), logits(model)) < 1
    grads = dict(nnx.to_flat_state(gradient(wrapped, logits, nnx.LoRAParam)))
    grad_w = dict(nnx.to_flat_state(gradient(merged, logits, nnx.Param)))
    assert len(grads) == 2 * len(names)
    assert all(jnp.any(g.get_value()) for g in grads.values())
    for path, lora in leaves_by_path(ql.nnx.split(wrapped)[1]).items():
        *parents, name = (int(x) if x.isdigit() else x for x in path.split("/"))
        g = lora.geometry.to_matrix(grad_w[*parents, name].get_value())
        grad_a = grads[*parents, f"{name}_lora", "a"].get_value()
        assert_close(grad_a, 2 * g @ jnp.swapaxes(lora.b, -1, -2))
