"""Layers that have adapters of their own: their start, what they refuse.

What they compute is in the contract of both integrations, as "layer" and "layer stack".
"""

import jax.numpy as jnp
import numpy as np
import pytest
from integration_helpers import INTEGRATIONS, make_x
from integration_pairs import DIM, PAIRS

import qlora_jax as ql

pytestmark = pytest.mark.parametrize(
    "flax", INTEGRATIONS.values(), ids=list(INTEGRATIONS)
)


def kernels(flax, **settings):
    """The packed kernel and the adapter of a layer."""
    pair = PAIRS["layer"]
    wrapped = flax.wrap(flax.make(pair), ql.QLoRAConfig(**settings), make_x(pair))
    return [tree["kernel"] for tree in wrapped.trees(wrapped.lora, wrapped.rest)]


@pytest.mark.parametrize("fmt", ["nf4", "fp4", "int4", "int8"])
def test_its_kernel_starts_as_that_of_the_dense_layer(flax, fmt):
    packing = {"block_size": 16, "double_quant": False}
    w, _ = kernels(flax, fmt=None)
    settings = {"rank_stabilized": True, "lora_dtype": "bfloat16"}
    q, adapter = kernels(flax, fmt=fmt, rank=4, alpha=8, **packing, **settings)
    np.testing.assert_array_equal(q.codes, ql.quantize(w, fmt, **packing).codes)
    assert 0.8 < np.std(w) * DIM**0.5 < 1.2  # LeCun's
    assert (adapter.a.dtype, adapter.scaling) == (jnp.bfloat16, 8 / 4**0.5)


@pytest.mark.parametrize(
    "settings",
    [{"exclude": "kernel"}, {"targets": "w"}, {"rank_pattern": {".*": 2}},
     {"contract": {"kernel": -1}}],
)  # fmt: skip
def test_configs_that_name_other_leaves_are_refused(flax, settings):
    with pytest.raises(ValueError, match="must target 'kernel' and have no settings"):
        kernels(flax, **settings)
