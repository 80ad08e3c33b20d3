"""Every function called directly, under each transformation, and sharded.

Other tests check what the functions compute. Here a transformed call must equal the
direct call for each member of a stack.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, slow_but_every, spread
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.losses import chunked_cross_entropy

CONFIG = ql.QLoRAConfig(fmt="int4", rank=2, block_size=16, trainable="bias")
MEMBERS = 2  # size of the axis that vmap maps and scan loops over


def params():
    return {"kernel": normal(0, (MEMBERS, 64, 8)), "bias": normal(0, (MEMBERS, 8))}


@functools.cache
def trees(freeze_base=True):
    """Returns stacked base and lora trees, with B not zero."""
    config = dataclasses.replace(CONFIG, freeze_base=freeze_base)
    base, lora = jax.vmap(
        lambda member_params: ql.init(jax.random.key(0), member_params, config)
    )(params())
    return base, jax.tree.map(lambda x: x + 0.1, lora)


def packed(contract=-2):
    shape = (MEMBERS, 64, 8) if contract == -2 else (MEMBERS, 64, 2, 4)
    return ql.quantize(normal(0, shape), "int4", block_size=16, contract=contract)


def tables():
    """Returns stacked adapters of a table."""
    config = ql.QLoRAConfig(targets=(), trainable_rows={"embedding": [63, 2]})

    def init(w):
        return ql.init(jax.random.key(0), {"embedding": w}, config)

    lora = jax.vmap(init)(params()["kernel"])[1]["embedding"]
    return {"rows": jax.tree.map(lambda x: x + 0.1, lora)}


def ids():
    """Returns ids that read both halves of bytes, trained rows, and a negative id."""
    return jnp.array([[0, 3, 63, -1], [2, 2, 31, 1]])


def experts():
    return ql.quantize(normal(0, (MEMBERS, 3, 64, 8)), "int4", block_size=16)


def sizes():
    return jnp.array([[3, 0, 5], [1, 4, 2]])


def targets():
    return jnp.arange(16).reshape(MEMBERS, 8)


def inputs(*shape, dtype="float32"):
    return normal(1, (MEMBERS, *shape), dtype)


def loss(tree, x):
    return jnp.sum(jnp.square(ql.apply(*ql.split(tree), x)))


def labelled(tree):
    """Multiplies arrays by numbers of their labels, since jit cannot return strings."""
    order = ["frozen", "lora", "kernel"]

    def times(x, name):
        return x * jnp.asarray(order.index(name), x.dtype)

    return jax.tree.map(times, tree, ql.lora_labels(tree))


def masked(tree):
    return jax.tree.map(lambda x, m: x if m else x * 0, tree, ql.lora_mask(tree))


class Entry(NamedTuple):
    """A function of arrays, and stacked arguments whose axis 0 is the members."""

    run: Callable
    args: Callable[[], tuple]


def with_gradient(run):
    """Returns the result, and its VJP in the first argument for fixed cotangents.

    Cotangents, since large terms would cancel in a sum over the result.
    """

    def derivative(x, *other_args):
        y, pull = jax.vjp(lambda x: run(x, *other_args), x)
        return y, pull(jax.tree.map(cotangent, y))

    return derivative


def cotangent(y):
    """Returns numbers that differ by entry, with zero where the entry is NaN."""
    factors = jnp.sin(1 + jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    return jnp.where(jnp.isnan(y), 0, factors)


def on_one_tree(base, lora):
    tree = ql.combine(base, lora)
    return tree, ql.split(tree), labelled(tree), masked(tree)


einsum = functools.partial(ql.einsum, "BTD,DNH->BTNH")
narrow_einsum = functools.partial(einsum, backend="reference", precision="highest")


def apply(x, base, lora):
    return ql.apply(base, lora, x)


def dense(params, x):
    return x @ params["kernel"] + params["bias"][None]


def lookup(lora, q, ids):
    return [ql.lookup(q, lora[name], ids) for name in lora]


def layer(x, q):
    return ql.matmul(x, q, layer=1)


def ragged(x, q, sizes, layer=None):
    return ql.ragged_dot(x, q, sizes, layer=layer)


token_losses = functools.partial(chunked_cross_entropy, chunk_size=3)


def divergences(x, head, teacher_x, teacher_head):
    settings = {"chunk_size": 3, "temperature": 2.0}
    return ql.losses.chunked_kl_divergence(x, head, teacher_x, teacher_head, **settings)


def quantize(params):
    return (ql.quantize(params["kernel"]), ql.quantize(params, CONFIG))


def init(i, params):
    return ql.init(jax.random.fold_in(jax.random.key(0), i), params, CONFIG)


def deep(q):
    return jax.tree.map(lambda a: jnp.stack([a[::-1], a], 1), q)


FUNCTIONS = {
    "quantize": Entry(quantize, lambda: (params(),)),
    "dequantize": Entry(ql.dequantize, lambda: ({"q": packed(), **trees()[0]},)),
    "init": Entry(init, lambda: (jnp.arange(MEMBERS), params())),
    "matmul": Entry(with_gradient(ql.matmul), lambda: (inputs(8, 64), packed())),
    "layer": Entry(with_gradient(layer), lambda: (inputs(8, 64), deep(packed()))),
    "einsum": Entry(with_gradient(einsum), lambda: (inputs(8, 3, 64), packed(-3))),
    "einsum in bfloat16": Entry(
        narrow_einsum, lambda: (inputs(8, 3, 64, dtype="bfloat16"), packed(-3))
    ),
    "ragged": Entry(with_gradient(ragged), lambda: (inputs(8, 64), experts(), sizes())),
    "ragged layer": Entry(
        with_gradient(functools.partial(ragged, layer=1)),
        lambda: (inputs(8, 64), deep(experts()), sizes()),
    ),
    "lookup": Entry(with_gradient(lookup), lambda: (tables(), packed(), ids())),
    "chunked_cross_entropy": Entry(
        with_gradient(functools.partial(ql.losses.chunked_cross_entropy, chunk_size=3)),
        lambda: (inputs(4, 8), normal(2, (MEMBERS, 64, 8)), ids() % 64),
    ),
    "chunked_kl_divergence": Entry(
        with_gradient(divergences),
        lambda: (
            inputs(4, 8),
            normal(2, (MEMBERS, 64, 8)),
            inputs(4, 64),
            normal(3, (MEMBERS, 64, 64)),
        ),
    ),
    "apply": Entry(with_gradient(apply), lambda: (inputs(8, 64), *trees())),
    "loss": Entry(
        with_gradient(token_losses),
        lambda: (inputs(8, 64), normal(2, (MEMBERS, 40, 64)), targets()),
    ),
    "loss of a packed head": Entry(
        with_gradient(token_losses), lambda: (inputs(8, 64), packed(), targets() % 8)
    ),
    "merge": Entry(ql.merge, trees),
    "combine and partition": Entry(on_one_tree, trees),
    "value_and_grad": Entry(
        ql.value_and_grad(loss), lambda: (ql.combine(*trees()), inputs(8, 64))
    ),
    "value_and_grad of kernels": Entry(
        ql.value_and_grad(loss),
        lambda: (ql.combine(*trees(False)), inputs(8, 64)),
    ),
}


def modes(run):
    """Returns a single program that runs all transformations on stacked arguments."""

    def step(_, args):
        return (None, jax.checkpoint(run)(*args))

    def run_function(*args):
        return {
            "vmap": jax.vmap(run)(*args),
            "scan and remat": jax.lax.scan(step, None, args)[1],
        }

    # Compiling takes most of the time, so LLVM does not optimize.
    return jax.jit(run_function, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def expected(name):
    """Computes the expected results member by member, by direct calls."""
    run, args = FUNCTIONS[name]
    results = [run(*jax.tree.map(lambda a, i=i: a[i], args())) for i in range(MEMBERS)]
    return jax.tree.map(lambda *members: np.stack(members), *results)


def compare(name, args):
    want = expected(name)
    results = modes(FUNCTIONS[name].run)(*args)
    for got in results.values():
        chex.assert_trees_all_equal_dtypes(got, want)
        assert_close(got, want)


@pytest.mark.parametrize("name", slow_but_every(3, FUNCTIONS))
def test_transformed_as_plain(name):
    compare(name, FUNCTIONS[name].args())
    run, args = FUNCTIONS[name]
    member = jax.jit(run)(*jax.tree.map(lambda a: a[1], args()))
    assert_close(member, jax.tree.map(lambda a: a[1], expected(name)))


# The einsum in bfloat16 is sharded in the same way as the one in float32.
# tests/product/test_ragged_sharding.py has ragged products, test_losses.py the loss.
LEFT_OUT = {"einsum in bfloat16", "ragged", "ragged layer", "chunked_cross_entropy"}
SHARDED = FUNCTIONS.keys() - LEFT_OUT


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SHARDED))
def test_sharded_as_plain(name, mesh):
    """Rows of x are split over one mesh axis, outputs of kernels over the other."""

    def place(path, leaf):
        name = jax.tree_util.keystr(path[-1:])
        entries = [None] * leaf.ndim
        if len(path) == 1 and leaf.ndim > 2:  # x
            entries[1] = "a"
        elif leaf.ndim > 1 and name not in (".a", ".scale_scales", ".scale_offset"):
            entries[-1] = "b"
        return spread(leaf, mesh, *entries)

    expected(name)  # cached, so it must be made where no mesh is set
    args = jax.tree_util.tree_map_with_path(place, FUNCTIONS[name].args())
    with jax.set_mesh(mesh):
        compare(name, args)
