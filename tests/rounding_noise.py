"""Rounding noise: simulates the different rounding of products on other processors.

`pytest --rounding-noise SEED` changes each entry of a product of floats, and of a sum
over devices, by up to two units in its last place. A bound that holds by luck on one
processor then fails on this one. The noise is a hash of the entry's bits and of the
seed: the same bits get the same noise, so a program that runs twice gives the same bits
twice, and results that differ in one bit get noise that is independent.

Noise does not change results whose last bits are all zero, such as whole numbers and
sums of products of these, since another order of addition would not change them either.
It does not change zeros, infinities and NaNs, programs for platforms other than CPUs
(such as those that tests compile for TPUs), and processes that tests start. Only the
lowering rule of a primitive is replaced: jaxprs, gradients and transformations have no
noise. Tests that read a compiled program or its memory are marked `without_noise`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import mlir

# Products, and sums over devices by `psum` and `psum_scatter`, each with its variant
# for arrays whose types track how they vary over devices. `ragged_dot` lowers to
# products.
PRIMITIVES = {
    *("dot_general", "conv_general_dilated"),
    *("psum", "psum_invariant", "unreduced_psum"),
    *("reduce_scatter", "unreduced_reduce_scatter"),
}
UNITS = 2
# A result counts as exact if this many of its last bits are zero, by its width. In
# float32 these are whole numbers up to 2**16, divided by powers of two.
ZERO_BITS = {16: 2, 32: 8, 64: 16}

rules = {}  # JAX's own rules by primitive


def add_noise(x, seed):
    """Returns the floats, each changed by up to `UNITS` in its last place."""
    if x.dtype == jnp.bfloat16 or x.dtype == jnp.float16:
        kind = jnp.uint16
    else:
        kind = {4: jnp.uint32, 8: jnp.uint64}[x.dtype.itemsize]
    bits = lax.bitcast_convert_type(x, kind)
    width = 8 * x.dtype.itemsize
    # The finalizer of MurmurHash3, on 32 bits.
    mixed = bits if width <= 32 else bits ^ (bits >> 32)
    mixed = mixed.astype(jnp.uint32) ^ jnp.uint32((seed * 0x9E3779B9) % 2**32)
    for shift, factor in (16, 0x85EBCA6B), (13, 0xC2B2AE35):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    units = (mixed >> 16) % jnp.uint32(2 * UNITS + 1)
    noisy_bits = bits + units.astype(kind) - jnp.asarray(UNITS, kind)
    noisy = lax.bitcast_convert_type(noisy_bits, x.dtype)
    is_exact = bits & jnp.asarray(2 ** ZERO_BITS[width] - 1, kind) == 0
    # Near zero and infinity, changed bits could give a subnormal or infinite number.
    is_normal = (jnp.abs(x) >= 4 * jnp.finfo(x.dtype).tiny) & jnp.isfinite(noisy)
    return jnp.where(is_exact | ~is_normal, x, noisy)


def noisy_rule(rule, seed):
    """Returns the lowering rule with noise on its floating-point results."""

    def lower(context, *operands, **settings):
        results = rule(context, *operands, **settings)
        return [
            result if not is_noisy(aval) else add(context, result, aval)
            for result, aval in zip(results, context.avals_out, strict=True)
        ]

    def is_noisy(aval):
        return jnp.issubdtype(aval.dtype, jnp.floating) and aval.dtype.itemsize > 1

    def add(context, result, aval):
        # Drop the sharding, which XLA infers by itself.
        plain = jax.core.ShapedArray(aval.shape, aval.dtype)
        context = context.replace(avals_in=[plain], avals_out=[plain])
        noise = jax.jit(lambda x: add_noise(x, seed))
        return mlir.lower_fun(noise, multiple_results=False)(context, result)[0]

    return lower


def start(seed):
    """Compiles all following CPU programs with the noise of this seed."""
    common, on_cpus = mlir._lowerings, mlir._platform_specific_lowerings["cpu"]
    for primitive in {*common, *on_cpus}:
        if primitive.name in PRIMITIVES:
            entry = on_cpus.get(primitive)
            rules[primitive] = entry
            rule = (entry or common[primitive]).rule
            mlir.register_lowering(primitive, noisy_rule(rule, seed), platform="cpu")
    jax.clear_caches()


def stop():
    """Compiles all following programs without noise."""
    on_cpus = mlir._platform_specific_lowerings["cpu"]
    for primitive, entry in rules.items():
        if entry is None:
            del on_cpus[primitive]
        else:
            on_cpus[primitive] = entry
    rules.clear()
    jax.clear_caches()


def pytest_addoption(parser):
    parser.addoption(
        "--rounding-noise",
        type=int,
        metavar="SEED",
        help="change products of floats by up to two units in the last place",
    )


def pytest_configure(config):
    text = "without_noise: reads compiled programs, their memory or exact bits"
    config.addinivalue_line("markers", text)
    seed = config.getoption("rounding_noise")
    if seed is not None:
        start(seed)


def pytest_runtest_setup(item):
    if rules and item.get_closest_marker("without_noise"):
        stop()


def pytest_runtest_teardown(item):
    seed = item.config.getoption("rounding_noise")
    if seed is not None and not rules:
        start(seed)
