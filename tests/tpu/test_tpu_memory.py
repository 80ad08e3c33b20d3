"""Steps of the decoder with its choices for memory, by the real TPU compiler.

A separate process compiles them (this file, run as a script), as in test_tpu_aot.py.
"""

import functools
import json
import re

import pytest
from test_tpu_aot import needs_libtpu, run_script

pytestmark = pytest.mark.slow

LAYERS, WIDTH, INNER, RANK, TILE = 6, 256, 2048, 16, 512
SHORT, LONG = 2048, 8192
SPLASH = {"attention": "splash", "remat": True}
OFFLOAD = SPLASH | {"remat": "offload"}
TILED = OFFLOAD | {"mlp_tile": TILE}
# name: the decoder's arguments, its layers' windows, tokens
STEPS = {
    "splash": (SPLASH, (None,), SHORT),
    "windows": (SPLASH, (None, 600), SHORT),
    "offload": (OFFLOAD, (None,), SHORT),
    "offload, long": (OFFLOAD, (None,), LONG),
    "tiled": (TILED, (None,), SHORT),
    "tiled, long": (TILED, (None,), LONG),
}


def lower_step(options, windows, tokens, place):
    """Lowers the gradient of a decoder's loss."""
    import jax
    import jax.numpy as jnp

    import qlora_jax as ql
    from qlora_jax.models.config import DecoderConfig, LayerKind
    from qlora_jax.models.decoder import Decoder

    config = DecoderConfig(
        512,
        WIDTH,
        INNER,
        LAYERS,
        num_heads=4,
        num_kv_heads=2,
        layers=tuple(LayerKind(window=w) for w in windows) * (LAYERS // len(windows)),
    )
    model = Decoder(config, jnp.bfloat16, stream_dtype=jnp.bfloat16, **options)
    targets = ql.QLoRAConfig(rank=RANK, targets="layers/.*_proj/kernel")
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def make(key):
        params = Decoder(config).init(key, jnp.zeros((1, 8), jnp.int32))["params"]
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        return ql.init(key, params, targets)

    base, lora = jax.eval_shape(make, jax.random.key(0))
    wrapped = ql.linen.wrap(model, scanned=model.scanned, backend="pallas_tpu_v5e")

    def loss(lora, base, ids, segments):
        hidden = wrapped.apply(
            {"params": base, "lora": lora},
            ids,
            segment_ids=segments,
            return_hidden=True,
        )
        return jnp.mean(jnp.square(hidden.astype(jnp.float32)))

    put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    args = jax.tree.map(put, (lora, base, ids, ids))
    return jax.jit(jax.grad(loss)).lower(*args)


def compile_steps():
    """Compiles the steps; yields what the tests look at."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    place = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    for name, (options, windows, tokens) in STEPS.items():
        compiled = lower_step(options, windows, tokens, place).compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert memory is not None
        inputs = re.escape(f"bf16[{LAYERS},1,{tokens},{WIDTH}]") + r"{[^}]*}"
        factors = rf"bf16\[{LAYERS},(?:{RANK},\d+|\d+,{RANK})\]"
        found = {
            "kernels": sorted({*re.findall(r"splash_mha_(fwd|dq|dkv)", text)}),
            "layer inputs": sorted({*re.findall(inputs, text)}),
            "factors": re.findall(factors, text),
            "device": memory.temp_size_in_bytes,
            "host": memory.host_temp_size_in_bytes,
        }
        yield [name, found]


@functools.cache
def steps():
    return dict(run_script(__file__))


@needs_libtpu
@pytest.mark.parametrize("name", STEPS)
def test_splash_is_in_both_passes(name):
    assert steps()[name]["kernels"] == ["dkv", "dq", "fwd"]


@needs_libtpu
@pytest.mark.parametrize("name", STEPS)
def test_no_stack_of_adapters_is_cast(name):
    assert steps()[name]["factors"] == []


@needs_libtpu
@pytest.mark.parametrize("name", STEPS)
def test_layer_inputs_are_in_host_memory_if_asked(name):
    _, _, tokens = STEPS[name]
    found = steps()[name]
    is_on_host = ["S(5)" in layout for layout in found["layer inputs"]]
    offloads = STEPS[name][0]["remat"] == "offload"
    assert is_on_host and {*is_on_host} == {offloads}
    assert found["host"] == (2 * LAYERS * tokens * WIDTH if offloads else 0)


@needs_libtpu
def test_tiles_hold_one_tile_of_the_mlp():
    device = {name: found["device"] for name, found in steps().items()}
    grown = device["offload, long"] - device["offload"]
    in_tiles = device["tiled, long"] - device["tiled"]
    assert grown - in_tiles > 2 * (LONG - SHORT) * INNER  # an array of the MLP's width


if __name__ == "__main__":
    for result in compile_steps():
        print(json.dumps(result), flush=True)
