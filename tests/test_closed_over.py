"""Functions that look at values, in a trace that closes over the arrays.

Such arrays have values, but operations on them are traced, so a check that computes
with them in JAX would fail. Invalid values must raise there too.
"""

import ast
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import make_mesh, normal, randomized, trees_of
from jax.sharding import PartitionSpec as P
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.losses import chunked_cross_entropy
from qlora_jax.quant.geometry import Geometry

LOOKS_AT_VALUES = {"is_concrete", "known_values", "checked_integers", "all_below"}
LOOKS_AT_VALUES |= {"_is_deletable"}
# Functions that read values of arrays, each with the case below that runs it.
CHECKED = {
    "_jax/arguments.py checked_integers": "select",
    "_jax/memory.py _is_deletable": "init, donated",
    "_jax/memory.py check_donated": "init, donated",
    "_jax/memory.py delete": "init, donated",
    "linen/init_model.py _with_arrays": "linen.init",
    "nnx/rules.py registration_misfit": "nnx.wrap",
    "product/matmul.py layer_of": "matmul",
    "product/matmul.py offsets_of": "ragged_dot",
    "quant/pack.py check_values": "quantize",
    "quant/schemes.py is_finite": "quantize large weights",
    "quant/qtensor.py _check_parts": "from_parts",
    "trees/bank.py __getitem__": "a place of a bank",
    "trees/bank.py _checked_index": "with_adapter",
    "trees/bank.py select": "select",
    "trees/merge.py is_finite": "merge_adapters",
    "trees/merge.py merge_leaf": "merge",
    "trees/merge.py _is_finite_number": "merge_adapters",
    "trees/sharding.py _put": "place",
}


def test_every_function_that_looks_at_values_is_in_the_table():
    package, functions = pathlib.Path(ql.__file__).parent, set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and LOOKS_AT_VALUES & {
                name.id for name in ast.walk(node) if isinstance(name, ast.Name)
            }:
                functions.add((path.relative_to(package).as_posix(), node))

    def inner(node):
        return {n for n in ast.walk(node) if n is not node}

    outer = [
        (path, n)
        for path, n in functions
        if any((path, m) in functions for m in inner(n))
    ]
    names = {f"{path} {node.name}" for path, node in functions - {*outer}}
    assert names == CHECKED.keys()
    assert {*CHECKED.values()} <= cases().keys()


class Registered(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(normal(5, (64, 8)))

    def __call__(self, x):
        return x @ self.w


ql.nnx.register(Registered, kernel="w", einsum="bk,kn->bn")


@functools.cache
def cases():
    """Returns functions of a traced number that close over all other arguments."""
    params = {"kernel": normal(0, (64, 8)), "embedding": normal(1, (64, 16))}
    settings = {"rank": 2, "block_size": 16, "targets": "kernel"}
    base, lora = trees_of(params, **settings)
    config = ql.QLoRAConfig(**settings)
    large = jnp.full((128, 8), 4.5e5)
    bank = ql.bank([lora, randomized(lora, 7)], capacity=3)
    stack = ql.quantize(normal(2, (2, 64, 8)), block_size=16, double_quant=False)
    trained = ql.Trained(normal(4, (64, 8)))
    rows = ql.TrainedRows(normal(6, (1, 16)), (1,))
    layers = trees_of({"kernel": normal(3, (2, 64, 8))}, rank=2, block_size=16)
    rules = {".*": P(None, "a", "b")}
    split_layers = ql.sharding.place(*layers, make_mesh("Auto"), rules)[1]
    ids, index, sizes = jnp.array([1, 0]), jnp.array(1), jnp.array([1, 1])
    x, mesh = jnp.ones((2, 64)), make_mesh("Auto")
    parts = {name: getattr(stack, name) for name in ("codes", "scales")}
    facts = {"shape": stack.shape, "fmt": "nf4", "block_size": 16, "dtype": "float32"}
    layer, registered = nn.Dense(8), Registered()
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]

    def init(**options):
        return ql.init(jax.random.key(0), params, config, **options)

    offloaded = ql.optim.offload(optax.adam(1e-3))

    def apply(lora, x):
        return ql.apply(base["kernel"], lora["kernel"], x)

    return {
        "select": lambda y: apply(ql.select(bank, ids), x * y),
        "select, NumPy": lambda y: apply(ql.select(bank, np.array([1, 0])), x * y),
        "select, number": lambda y: apply(ql.select(bank, 1), x * y),
        "with_adapter": lambda y: bank.with_adapter(index, lora).lora,
        "with_adapter, number": lambda y: bank.with_adapter(1, lora).lora,
        "a place of a bank": lambda y: apply(bank[index], x * y),
        "bank": lambda y: ql.bank([lora, lora]).lora,
        "matmul": lambda y: ql.matmul(x * y, stack, layer=index),
        "ragged_dot": lambda y: ql.ragged_dot(x * y, stack, sizes),
        "lookup": lambda y: ql.lookup(base["embedding"], rows, ids) * y,
        "quantize": lambda y: ql.quantize(params["kernel"]),
        "quantize large weights": lambda y: ql.quantize(large, "int4_f16"),
        "quantize a tree": lambda y: ql.quantize(params, config),
        "init": lambda y: init(),
        "init, donated": lambda y: init(donate=True),
        "init, DoRA": lambda y: ql.init(
            jax.random.key(0), params, ql.QLoRAConfig(**settings, use_dora=True)
        ),
        "from_parts": lambda y: ql.QTensor.from_parts(**parts, **facts).dequantize(),
        "merge": lambda y: ql.merge(
            {"kernel": base["kernel"]}, {"kernel": trained}, requantize=True
        ),
        "merge of a LoRA": lambda y: ql.merge(base, lora, requantize=True),
        "merge_adapters": lambda y: ql.merge_adapters([lora, lora], [0.5, y]),
        "place": lambda y: ql.sharding.place(base, lora, mesh, {".*": P("b", "a")}),
        "offload": lambda y: offloaded.init(layers[1]),
        "offload, NumPy": lambda y: offloaded.init(jax.tree.map(np.asarray, layers[1])),
        "offload, on a mesh": lambda y: offloaded.init(split_layers),
        "nnx.wrap": lambda y: ql.nnx.split(
            ql.nnx.wrap(registered, ql.QLoRAConfig(targets="w"), rngs=nnx.Rngs(0))
        ),
        "linen.init": lambda y: ql.linen.init(
            jax.random.key(0), layer, shapes, ql.QLoRAConfig(), x
        ),
        "chunked_cross_entropy": lambda y: chunked_cross_entropy(
            x * y, params["kernel"].T, ids
        ),
    }


TRACES = {
    "jit": jax.jit,
    "scan": lambda run: lambda y: jax.lax.scan(lambda c, y: (c, run(y)), 0.0, y[None]),
    "vmap": lambda run: lambda y: jax.vmap(run)(y[None]),
    "remat": jax.checkpoint,
}


@pytest.mark.parametrize("trace", TRACES)
def test_a_trace_closes_over_arrays(trace):
    failed = {}
    for name, run in cases().items():
        try:
            jax.eval_shape(TRACES[trace](run), jnp.ones(()))
        except Exception as error:  # noqa: BLE001
            failed[name] = repr(error)
    assert not failed


@pytest.mark.parametrize("name", ["select", "with_adapter", "a place of a bank"])
def test_what_a_trace_knows_is_what_a_call_returns(name):
    run = cases()[name]
    assert_close(jax.jit(run)(1.0), run(1.0))


def test_values_that_a_trace_knows_are_refused_if_wrong():
    x = jnp.ones((2, 64))
    factors = jnp.ones((64, 2)), jnp.ones((2, 8))
    lora = {"kernel": ql.LoRA(*factors, 1.0, 0.0, Geometry())}
    bank = ql.bank([lora, lora])
    stack = ql.quantize(normal(2, (2, 64, 8)))
    calls = {
        "`ids` must be from -1 to 1": lambda i: ql.select(bank, i),
        "the bank has places 0 to 1": lambda i: bank.with_adapter(i, lora),
        "has places 0 to 1": lambda i: bank[i],
        "`layer` must be from 0 to 1": lambda i: ql.matmul(x, stack, layer=i),
        "`group_sizes` must sum to at most the 2 rows": lambda i: ql.ragged_dot(
            x, stack, np.array([0, 7])
        ),
    }
    for words, call in calls.items():
        for value in (7, np.array(7), jnp.array(7)):

            def run(_, call=call, value=value):
                return call(value)

            with pytest.raises((ValueError, IndexError), match=words):
                jax.eval_shape(run, 0.0)
