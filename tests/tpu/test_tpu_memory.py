"""Compiles decoder steps with memory-saving options by the real TPU compiler."""

import functools
import json
import re

import jax.numpy as jnp
import pytest
from tpu_helpers import (
    ALL_ALIKE,
    INNER,
    LAYERS,
    RANK,
    WIDTH,
    lower_step,
    needs_libtpu,
    run_script,
)

from qlora_jax.llm.models.config import LayerKind

pytestmark = pytest.mark.newest

SHORT, LONG = 2048, 8192
SPLASH = {"attention": "splash", "remat": True}
OFFLOAD = SPLASH | {"remat": "offload"}
TILED = OFFLOAD | {"mlp_tile": 512}
# name: the decoder's arguments, a period of its layers, tokens
STEPS = {
    "splash": (SPLASH, ALL_ALIKE, SHORT),
    "windows": (SPLASH, (*ALL_ALIKE, LayerKind(window=600)), SHORT),
    "offload": (OFFLOAD, ALL_ALIKE, SHORT),
    "offload, long": (OFFLOAD, ALL_ALIKE, LONG),
    "tiled": (TILED, ALL_ALIKE, SHORT),
    "tiled, long": (TILED, ALL_ALIKE, LONG),
}
# Layers of different structure are separate stacks.
THREE_STACKS = (
    *ALL_ALIKE,
    LayerKind(mlp_width=INNER - 128),
    LayerKind(mlp_width=INNER - 256),
)


def compile_steps():
    """Compiles the steps; yields what the tests look at."""
    steps = STEPS | {"three stacks": (SPLASH, THREE_STACKS, LONG)}
    steps |= {"one stack": (SPLASH, ALL_ALIKE, LONG)}
    for name, (options, kinds, tokens) in steps.items():
        step = {"kinds": kinds, "stream_dtype": jnp.bfloat16, **options}
        compiled = lower_step("v5e", tokens, **step).compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert memory is not None
        inputs = re.escape(f"bf16[{LAYERS},1,{tokens},{WIDTH}]") + r"{[^}]*}"
        factors = rf"bf16\[{LAYERS},(?:{RANK},\d+|\d+,{RANK})\]"
        sizes = {
            "kernels": sorted({*re.findall(r"splash_mha_(fwd|dq|dkv)", text)}),
            "layer inputs": sorted({*re.findall(inputs, text)}),
            "factors": re.findall(factors, text),
            "device": memory.temp_size_in_bytes,
            "host": memory.host_temp_size_in_bytes,
        }
        yield [name, sizes]


@functools.cache
def steps():
    return dict(run_script(__file__))


@needs_libtpu
@pytest.mark.parametrize("name", STEPS)
def test_splash_is_in_both_passes_and_no_stack_of_adapters_is_cast(name):
    assert steps()[name]["kernels"] == ["dkv", "dq", "fwd"]
    assert steps()[name]["factors"] == []


@needs_libtpu
@pytest.mark.parametrize("name", STEPS)
def test_layer_inputs_are_in_host_memory_if_asked(name):
    _, _, tokens = STEPS[name]
    sizes = steps()[name]
    is_on_host = ["S(5)" in layout for layout in sizes["layer inputs"]]
    offloads = STEPS[name][0]["remat"] == "offload"
    assert is_on_host and {*is_on_host} == {offloads}
    assert sizes["host"] == (2 * LAYERS * tokens * WIDTH if offloads else 0)


@needs_libtpu
def test_tiles_hold_one_tile_of_the_mlp():
    device = {name: sizes["device"] for name, sizes in steps().items()}
    growth = device["offload, long"] - device["offload"]
    in_tiles = device["tiled, long"] - device["tiled"]
    assert growth - in_tiles > 2 * (LONG - SHORT) * INNER  # an array of the MLP's width


@needs_libtpu
def test_the_backward_pass_recomputes_one_layer_of_a_period_at_a_time():
    device = {name: steps()[name]["device"] for name in ("one stack", "three stacks")}
    of_mlp = 2 * LONG * INNER  # bytes of an array of the MLP's width
    assert device["three stacks"] < device["one stack"] + of_mlp


if __name__ == "__main__":
    for result in compile_steps():
        print(json.dumps(result), flush=True)
