"""Steps on a base in host memory, by the real TPU compiler.

A separate process compiles them (this file, run as a script), as in test_tpu_aot.py.
"""

import functools
import json
import re

import pytest
from test_tpu_aot import TOPOLOGIES, needs_libtpu, run_script

pytestmark = [pytest.mark.slow, pytest.mark.newest]

LAYERS, WIDTH, INNER, TOKENS, TILE = 6, 256, 2048, 512, 128
STACK = LAYERS * WIDTH * INNER // 2  # bytes of the codes of one kind of MLP kernel
OPTIONS = {
    "remat": {"remat": True},
    "tiles": {"remat": True, "mlp_tile": TILE},
}
CHIPS = ["v5e", "v6e"]


def lower_step(chip, options, memory, mesh):
    """Lowers the gradient of a decoder's loss."""
    import jax
    import jax.numpy as jnp

    import qlora_jax as ql
    from qlora_jax.models.config import DecoderConfig
    from qlora_jax.models.decoder import Decoder

    config = DecoderConfig(512, WIDTH, INNER, LAYERS, num_heads=4, num_kv_heads=2)
    model = Decoder(config, jnp.bfloat16, **options)
    targets = ql.QLoRAConfig(rank=16, targets="layers/.*_proj/kernel")

    def make(key):
        params = Decoder(config).init(key, jnp.zeros((1, 8), jnp.int32))["params"]
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        return ql.init(key, params, targets)

    shapes = jax.eval_shape(make, jax.random.key(0))
    base, lora = ql.sharding.place(*shapes, mesh, memory=memory)
    model = ql.linen.wrap(model, scanned=model.scanned, backend=f"pallas_tpu_{chip}")

    def loss(lora, base, ids):
        variables = {"params": base, "lora": lora}
        hidden = model.apply(variables, ids, return_hidden=True)
        return jnp.mean(jnp.square(hidden.astype(jnp.float32)))

    ids = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    return jax.jit(jax.grad(loss)).lower(lora, base, ids)


def lower_loop(mesh, shape):
    """Lowers a loop over a stack of codes in host memory that has a shape."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    place = NamedSharding(mesh, PartitionSpec(), memory_kind="pinned_host")
    codes = jax.ShapeDtypeStruct((LAYERS, *shape), jnp.uint8, sharding=place)

    def total(codes):
        def add(i, x):
            layer = jax.lax.dynamic_index_in_dim(codes, i, keepdims=False)
            layer = jax.device_put(layer, jax.memory.Space.Device)
            return jnp.tanh(x @ layer.reshape(-1, INNER).astype(jnp.float32).T)

        return jax.lax.fori_loop(0, LAYERS, add, jnp.ones((8, INNER)))

    return jax.jit(total).lower(codes)


def compile_steps(chip):
    """Compiles the steps; yields what the tests look at."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    devices = topologies.get_topology_desc(TOPOLOGIES[chip][0], "tpu").devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    lower = functools.partial(lower_step, chip, mesh=mesh)
    lowered = {
        "rows": lower_loop(mesh, (INNER, INNER)),
        "tiles of rows": lower_loop(mesh, (INNER // 8, 8, INNER)),
        "resident": lower(OPTIONS["remat"], "device"),
        **{name: lower(options, "host") for name, options in OPTIONS.items()},
    }
    for name, step in lowered.items():
        compiled = step.compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert memory is not None
        stacks = rf"u8\[{LAYERS},\d+,8,\d+\]{{[^}}]*}}"
        found = {
            "host temporaries": memory.host_temp_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "arguments": memory.argument_size_in_bytes,
            "stacks": sorted({*re.findall(stacks, text)}),
            "moves": len(re.findall(r" dynamic-slice-start\(", text)),
        }
        yield [name, found]


@functools.cache
def steps(chip):
    return dict(run_script(__file__, chip))


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_a_slice_is_copied_as_it_is(chip):
    """Where the shape is that of the codes, the whole stack is laid out again."""
    found, size = steps(chip), LAYERS * INNER * INNER
    assert found["rows"]["host temporaries"] >= size
    assert found["rows"]["temporaries"] >= size
    assert found["tiles of rows"]["host temporaries"] == 0
    assert found["tiles of rows"]["temporaries"] < size / 2


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", OPTIONS)
def test_no_stack_of_codes_is_on_the_device(chip, name):
    found = steps(chip)[name]
    assert found["host temporaries"] == 0
    assert found["stacks"] and all("S(5)" in layout for layout in found["stacks"])
    less = steps(chip)["resident"]["arguments"] - found["arguments"]
    assert less >= 3 * STACK  # the MLP's; arguments are those on the device


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_layer_is_moved_once_in_each_direction(chip, name):
    assert steps(chip)[name]["moves"] == 2 * 7
    assert steps(chip)["resident"]["moves"] == 0


if __name__ == "__main__":
    import sys

    for result in compile_steps(sys.argv[1]):
        print(json.dumps(result), flush=True)
