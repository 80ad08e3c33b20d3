"""Merge-aware adapters, compiled by the real TPU compiler."""

import json
import math
import re

import jax
import jax.numpy as jnp
import pytest
from tpu_helpers import needs_libtpu, on_one, run_script

import qlora_jax as ql

pytestmark = pytest.mark.newest

TOKENS, EXPERTS, K, N = 64, 4, 1024, 2048


def compile_gradients():
    """Compiles gradients for a v5e; yields kernels and the largest float array."""
    put = on_one("v5e")
    x = put(jax.ShapeDtypeStruct((TOKENS, K), jnp.bfloat16))
    sizes = put(jax.ShapeDtypeStruct((EXPERTS,), jnp.int32))

    def loss(lora, x, base, sizes):
        kernel, adapter = base["kernel"], lora["kernel"]
        backend = "pallas_tpu_v5e"
        if kernel.ndim == 3:
            y = ql.ragged_dot(x, kernel, sizes, adapter, backend=backend)
        else:
            y = ql.apply(kernel, adapter, x, backend=backend)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    for name, batch in {"dense": (), "experts": (EXPERTS,)}.items():
        config = ql.QLoRAConfig(
            rank=16, merge_aware=True, contract="bkn" if batch else "kn"
        )
        kernel = jax.ShapeDtypeStruct((*batch, K, N), jnp.bfloat16)
        base, lora = put(
            jax.eval_shape(
                lambda w, config=config: ql.init(
                    jax.random.key(0), {"kernel": w}, config
                ),
                kernel,
            )
        )
        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(lora, x, base, sizes)
        text = lowered.compile().as_text()
        shapes = re.findall(r"(?:f32|bf16)\[([\d,]+)\]", text)
        largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
        yield [name, text.count('custom_call_target="tpu_custom_call"'), largest]


@needs_libtpu
def test_the_kernel_multiplies_by_packed_tiles():
    for name, num_kernels, largest in run_script(__file__):
        # One kernel multiplies x, and one the gradient of y, by packed weights.
        assert num_kernels == 2, name
        # No float array is as large as one kernel.
        assert largest < K * N, name


if __name__ == "__main__":
    for result in compile_gradients():
        print(json.dumps(result))
