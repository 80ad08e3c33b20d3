"""Compiles the TPU kernel with the real TPU compiler, in one process per chip."""

import functools
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tpu_schedules
from hlo_text import collectives
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tpu_helpers import TOPOLOGIES, chips_of, needs_libtpu, on_one, run_script

import qlora_jax as ql
from qlora_jax.product.backends.pallas_tpu import fused
from qlora_jax.product.backends.pallas_tpu.tiling import Chip
from qlora_jax.product.spec import ProductSpec

pytestmark = pytest.mark.newest

FORMS = {"v5e": "sublane", "v5p": "sublane", "v6e": "shuffle", "tpu7x": "shuffle"}

# name: rows of x, weight rows, weight columns, format, block size, dtype, form (None
# for the chip's default), leading axes of the weight, whether a layer is picked
CASES = {
    "few rows": (16, 4096, 8192, "nf4", 64, "bfloat16", None, (), False),
    "many rows": (300, 1024, 1536, "nf4", 64, "bfloat16", None, (), False),
    "float32": (40, 512, 640, "nf4", 64, "float32", None, (), False),
    "blocks of 16": (16, 640, 384, "nvfp4", 16, "bfloat16", None, (), False),
    "blocks of 32": (16, 640, 384, "mxfp4", 32, "bfloat16", None, (), False),
    "blocks of 128": (16, 1152, 640, "nf4", 128, "bfloat16", None, (), False),
    "blocks of 256": (70, 2304, 384, "int4", 256, "bfloat16", None, (), False),
    "int8": (70, 512, 384, "int8", 64, "bfloat16", None, (), False),
    "select": (16, 512, 384, "nf4", 64, "bfloat16", "select", (), False),
    "odd sizes": (5, 320, 200, "nf4", 64, "bfloat16", None, (), False),
    "large blocks": (2048, 8064, 1024, "nf4", 64, "bfloat16", None, (), False),
    "small": (3, 96, 72, "nf4", 32, "float32", None, (), False),
    "layer of a stack": (16, 512, 384, "nf4", 64, "bfloat16", None, (4,), True),
    "experts": (16, 512, 384, "nf4", 64, "bfloat16", None, (3,), False),
    "stacked experts": (70, 512, 384, "nf4", 64, "bfloat16", None, (2, 3), True),
}
# Other chips use the forms of these two. They compile each case in one direction.
BOTH = ("v5e", "v6e")


def directions(chip, number):
    """Returns the directions to compile on a chip: both, or one of them."""
    return (False, True) if chip in BOTH else ((number + (chip == "v5p")) % 2 == 1,)


# If the contracted axis is not a multiple of 128, x and scales are padded.
PADDED = {("odd sizes", False), ("odd sizes", True), ("small", False), ("small", True)}


def compile_cases(chip):
    """Compiles every case for one chip; yields its name and temporary bytes."""
    put = on_one(chip)

    def shape_struct(*dims, dtype):
        return put(jax.ShapeDtypeStruct(dims, dtype))

    for number, (name, case) in enumerate(CASES.items()):
        m, rows, cols, fmt, block_size, dtype, form, lead, pick = case
        dtype = jnp.dtype(dtype)
        batch = lead[1:] if pick else lead
        codes_rows = rows if fmt == "int8" else rows // 2
        chip_spec = Chip(form or FORMS[chip], 48)
        for transpose in directions(chip, number):
            lowered = jax.jit(functools.partial(fused.product, chip=chip_spec)).lower(
                ProductSpec(
                    fmt, block_size, dtype, rows, len(batch), dtype, transpose=transpose
                ),
                shape_struct(*batch, m, cols if transpose else rows, dtype=dtype),
                shape_struct(*lead, codes_rows, cols, dtype=jnp.uint8),
                shape_struct(*batch, rows // block_size, cols, dtype=jnp.float32),
                shape_struct(dtype=jnp.int32) if pick else None,
            )
            memory = lowered.compile().memory_analysis()
            yield [name, transpose, memory.temp_size_in_bytes]


# K and N of weights with 8-bit scales.
NARROW = {"nf4": (4096, 14336), "mxfp4": (1024, 2048), "nvfp4": (1024, 2048)}


def compile_narrow(chip):
    """Compiles `ql.matmul` with 8-bit scales; yields temporary bytes, and a bound."""
    put, backend = on_one(chip), f"pallas_tpu_{chip}"

    def product(x, q):
        return ql.matmul(x, q, backend=backend)

    def input_gradient(x, q, g):
        return jax.vjp(lambda x: product(x, q), x)[1](g)[0]

    for fmt, (k, n) in NARROW.items():
        w = jax.ShapeDtypeStruct((k, n), jnp.bfloat16)
        q = put(jax.eval_shape(lambda w, fmt=fmt: ql.quantize(w, fmt), w))
        x, g = (put(jax.ShapeDtypeStruct((16, size), jnp.bfloat16)) for size in (k, n))
        scales = 4 * k // q.block_size * n
        for run, args in ((product, (x, q)), (input_gradient, (x, q, g))):
            memory = jax.jit(run).lower(*args).compile().memory_analysis()
            yield [fmt, len(args) == 3, memory.temp_size_in_bytes, scales]


# How W [K, N], x and y are split over a 4 or a 2 x 2 mesh of chips, and what the
# forward and the backward pass move.
# A sum is rounded between its two halves.
REDUCE, GATHER = ["all-gather bf16", "reduce-scatter f32"], ["all-gather u8"]
LAYOUTS = {
    "column": ((None, "a"), (), (None, "a"), [], REDUCE),
    "row": (("a",), (None, "a"), (), REDUCE, []),
    "data": ((), ("a",), ("a",), [], []),
    "fsdp": (("a",), ("a",), ("a",), GATHER, GATHER),
    "fsdp and column": (("b", "c"), ("b",), ("b", "c"), GATHER, GATHER + REDUCE),
    "fsdp and row": (("c", "b"), ("b", "c"), ("b",), GATHER + REDUCE, GATHER),
}
# tests/product/test_collectives.py has every layout in both modes, on CPUs.
SHARDED = [("Auto", name) for name in LAYOUTS]
SHARDED += [("Explicit", name) for name in ("column", "row", "fsdp and row")]


def compile_sharded(chip):
    """Compiles `ql.matmul` for four chips; yields its collectives and kernels."""
    packed = jax.eval_shape(ql.quantize, jax.ShapeDtypeStruct((2048, 1024), "bfloat16"))

    def forward(x, q):
        return ql.matmul(x, q, backend=f"pallas_tpu_{chip}")

    def backward(x, q, g):
        return jax.vjp(lambda x: forward(x, q), x)[1](g)[0]

    for mode, name in SHARDED:
        w_spec, x_spec, y_spec, *_ = LAYOUTS[name]
        sizes = {"b": 2, "c": 2} if " and " in name else {"a": 4}
        types = (getattr(AxisType, mode),) * len(sizes)
        chips = chips_of(chip).reshape(*sizes.values())
        mesh = Mesh(chips, tuple(sizes), axis_types=types)

        def sharded_by(spec, mesh=mesh):
            return NamedSharding(mesh, PartitionSpec(*spec))

        def rows_struct(size, spec, sharded_by=sharded_by):
            return jax.ShapeDtypeStruct(
                (64, size), jnp.bfloat16, sharding=sharded_by(spec)
            )

        x, g = rows_struct(2048, x_spec), rows_struct(1024, y_spec)
        rules = {"q": PartitionSpec(*w_spec)}
        tree, _ = ql.sharding.place({"q": packed}, {}, mesh, rules, rows=x_spec[:1])
        for transpose, (run, out, args) in enumerate(
            ((forward, y_spec, (x, tree["q"])), (backward, x_spec, (x, tree["q"], g)))
        ):
            compiled = (
                jax.jit(run, out_shardings=sharded_by(out)).lower(*args).compile()
            )
            kernels = compiled.as_text().count("tpu_custom_call")
            yield [mode, name, transpose, collectives(compiled), kernels]


EXPERTS = 8
# Rows, K, N, dtype, whether transposed, whether a layer is picked.
RAGGED = [
    (16, 1024, 768, "bfloat16", False, False),
    (16, 1024, 768, "bfloat16", True, True),
    (2000, 1024, 768, "bfloat16", False, True),
    (2000, 1024, 768, "float32", True, False),
    # 7.5 and 12.5 times 128: rows and scales are padded, codes are not.
    (16, 960, 1600, "bfloat16", False, True),
    (16, 960, 1600, "bfloat16", True, False),
]


def compile_ragged(chip):
    """Compiles `ql.ragged_dot` or its gradient; yields temporary bytes and kernels."""
    put = on_one(chip)

    def shape_struct(*dims, dtype):
        return put(jax.ShapeDtypeStruct(dims, dtype))

    def quantize(w):
        return ql.quantize(w, double_quant=False)

    for rows, k, n, dtype, transpose, pick in RAGGED:
        w = jax.ShapeDtypeStruct((*(3,) * pick, EXPERTS, k, n), dtype)
        q = put(jax.eval_shape(quantize, w))
        x, g = (shape_struct(rows, size, dtype=dtype) for size in (k, n))
        sizes = shape_struct(EXPERTS, dtype=jnp.int32)

        def run(x, q, sizes, g, transpose=transpose, layer=1 if pick else None):
            backend = f"pallas_tpu_{chip}"

            def dot(x):
                return ql.ragged_dot(x, q, sizes, layer=layer, backend=backend)

            return jax.vjp(dot, x)[1](g)[0] if transpose else dot(x)

        compiled = jax.jit(run).lower(x, q, sizes, g).compile()
        kernels = compiled.as_text().count("tpu_custom_call")
        yield [k * n, compiled.memory_analysis().temp_size_in_bytes, kernels]


@needs_libtpu
@pytest.mark.parametrize("chip", BOTH)
def test_ragged_products_compile_for(chip):
    """No expert is copied in float. The temporaries are numbers of the block visits."""
    results = run_for(chip, "ragged")
    for case, (size, temporary, kernels) in zip(RAGGED, results, strict=True):
        assert (kernels, temporary < size) == (1, True), (case, temporary)


@needs_libtpu
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles_for(chip):
    results = run_for(chip, "cases")
    assert {name for name, *_ in results} == {*CASES}
    assert len(results) == len(CASES) * (2 if chip in BOTH else 1)
    for name, transpose, temporary in results:
        if (name, transpose) not in PADDED:
            assert temporary == 0, f"{name}, {transpose=}"


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_scales_of_8_bits_are_expanded_and_no_more(chip):
    results = run_for(chip, "narrow")
    assert len(results) == 2 * len(NARROW)
    for fmt, transpose, temporary, scales in results:
        assert temporary <= scales, f"{fmt}, {transpose=}"


@needs_libtpu
def test_the_kernel_takes_part_in_sharded_products():
    """One chip is enough: the other forms of the kernel take the same operands."""
    results = run_for("v5e", "sharded")
    assert len(results) == 2 * len(SHARDED)
    for mode, name, transpose, traffic, kernels in results:
        case = f"{mode}, {name}, {transpose=}"
        assert traffic == sorted(LAYOUTS[name][3 + transpose]), case
        assert kernels == 1, case


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "fmt", "most"),
    [("v5e", "nf4", 460), ("v5e", "int4_f16", 375), ("v6e", "nf4", 200)],
)
def test_few_rows_take_few_bundles(chip, fmt, most, monkeypatch):
    """Bounds the bundles per 512 x 512 tile, including the overhead of a grid step."""
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", str(root))
    compiled = tpu_schedules.compile_schedule(chip, 16, fmt)
    assert (compiled.temporary, compiled.loops) == (0, [])
    tiles = tpu_schedules.ROWS * 1024 / 512**2
    # The older compiler schedules the same kernel a little less densely.
    newest = tuple(map(int, version("jax").split(".")[:2])) >= (0, 12)
    assert 0 < compiled.bundles / tiles <= most * (1 if newest else 1.2)
    if chip == "v5e":
        # One operation rounds and packs 64 rows and 128 columns of the table, or 16
        # rows of integer weights.
        packs = re.findall(r"vpack\.i\.(?:f32\.)?bf16", compiled.text)
        rows = 64 if fmt == "nf4" else 16
        assert len(packs) == tiles * 512**2 / (rows * 128)
    else:
        assert 0 < compiled.first < 100  # x is reordered in the first stripe only


@functools.cache
def run_for(chip, task):
    return run_script(__file__, chip, task)


if __name__ == "__main__":
    compilers = {
        "cases": compile_cases,
        "ragged": compile_ragged,
        "sharded": compile_sharded,
        "narrow": compile_narrow,
    }
    for result in compilers[sys.argv[2]](sys.argv[1]):
        print(json.dumps(result), flush=True)
