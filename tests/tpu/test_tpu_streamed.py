"""Compiles steps on a base in host memory by the real TPU compiler."""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tpu_helpers import (
    INNER,
    LAYERS,
    WIDTH,
    chips_of,
    lower_step,
    needs_libtpu,
    run_script,
)

pytestmark = pytest.mark.newest

STACK = LAYERS * WIDTH * INNER // 2  # bytes of the codes of one kind of MLP kernel
OPTIONS = {"remat": {"remat": True}, "tiles": {"remat": True, "mlp_tile": 128}}
CHIPS = ["v5e", "v6e"]


def lower_loop(mesh, shape):
    """Lowers a loop over a stack of codes in host memory, stored in this shape."""
    place = NamedSharding(mesh, PartitionSpec(), memory_kind="pinned_host")
    codes = jax.ShapeDtypeStruct((LAYERS, *shape), jnp.uint8, sharding=place)

    def sum_layers(codes):
        def add(i, x):
            layer = jax.lax.dynamic_index_in_dim(codes, i, keepdims=False)
            layer = jax.device_put(layer, jax.memory.Space.Device)
            return jnp.tanh(x @ layer.reshape(-1, INNER).astype(jnp.float32).T)

        return jax.lax.fori_loop(0, LAYERS, add, jnp.ones((8, INNER)))

    return jax.jit(sum_layers).lower(codes)


def compile_steps(chip):
    """Compiles the steps; yields what the tests look at."""
    mesh = Mesh(chips_of(chip)[:1], ("x",))
    lower = functools.partial(lower_step, chip, 512)
    lowered = {
        "rows": lower_loop(mesh, (INNER, INNER)),
        "tiles of rows": lower_loop(mesh, (INNER // 8, 8, INNER)),
        "resident": lower(**OPTIONS["remat"]),
        **{name: lower("host", **options) for name, options in OPTIONS.items()},
    }
    for name, step in lowered.items():
        compiled = step.compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert memory is not None
        stacks = rf"u8\[{LAYERS},\d+,8,\d+\]{{[^}}]*}}"
        sizes = {
            "host temporaries": memory.host_temp_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "arguments": memory.argument_size_in_bytes,
            "stacks": sorted({*re.findall(stacks, text)}),
            "moves": len(re.findall(r" dynamic-slice-start\(", text)),
        }
        yield [name, sizes]


@functools.cache
def steps(chip):
    return dict(run_script(__file__, chip))


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_a_slice_is_copied_as_it_is(chip):
    """A stack stored in the shape of the codes would be copied to another layout."""
    sizes_of, size = steps(chip), LAYERS * INNER * INNER
    assert sizes_of["rows"]["host temporaries"] >= size
    assert sizes_of["rows"]["temporaries"] >= size
    assert sizes_of["tiles of rows"]["host temporaries"] == 0
    assert sizes_of["tiles of rows"]["temporaries"] < size / 2


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", OPTIONS)
def test_stacks_of_codes_stay_and_a_layer_is_moved_once_in_each_direction(chip, name):
    sizes = steps(chip)[name]
    assert sizes["host temporaries"] == 0
    assert sizes["stacks"] and all("S(5)" in layout for layout in sizes["stacks"])
    saved = steps(chip)["resident"]["arguments"] - sizes["arguments"]
    assert saved >= 3 * STACK  # the stacks of the MLP are not on the device
    assert (sizes["moves"], steps(chip)["resident"]["moves"]) == (2 * 7, 0)


if __name__ == "__main__":
    for result in compile_steps(sys.argv[1]):
        print(json.dumps(result), flush=True)
