"""The types that type checkers infer. pyright checks this file (.ci/run)."""

# pyright: reportAttributeAccessIssue=true, reportUnnecessaryTypeIgnoreComment=true

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import pytest

import qlora_jax as ql

CONFIG = ql.QLoRAConfig(rank=2, fmt="int4")


def test_arrays_give_kernels_and_trees_give_trees():
    w = jnp.ones((64, 8))
    q = assert_type(ql.quantize(w, "int4"), ql.QTensor)
    assert_type(ql.quantize(w), ql.QTensor)
    assert_type(ql.quantize({"kernel": w}, CONFIG), Any)
    assert_type(ql.dequantize(q), jax.Array)
    assert_type(ql.dequantize({"kernel": q}), Any)
    adapter: ql.LoRA = ql.init(jax.random.key(0), {"kernel": q}, CONFIG)[1]["kernel"]
    assert_type(ql.merge(q, adapter), jax.Array)
    assert_type(ql.merge(w, adapter), jax.Array)
    with pytest.warns(UserWarning, match="requantizing"):
        assert_type(ql.merge(q, adapter, requantize=True), ql.QTensor)
    tree: Any = {"kernel": q}
    assert_type(ql.merge(tree, {}), Any)


def test_a_wrong_attribute_is_seen():
    q = ql.quantize(jnp.ones((64, 8)))
    with pytest.raises(AttributeError, match="has no attribute 'code'"):
        _ = q.code  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError, match="is not an array"):
        _ = q.T  # pyright: ignore[reportAttributeAccessIssue]
