"""A packed base through safetensors and Orbax, to the bit, its settings with it.

Leaves are arrays of dtypes that every format knows; the settings are in the tree's
structure, which `jax.eval_shape` makes again from the config without any weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql

CONFIGS = {
    "nf4": ql.QLoRAConfig(rank=2),
    "int4": ql.QLoRAConfig(rank=2, fmt="int4", block_size=32, double_quant=False),
    "fp4": ql.QLoRAConfig(rank=2, fmt="fp4", block_size=128),
    "int8": ql.QLoRAConfig(rank=2, fmt="int8", double_quant=False),
}


def make(config):
    """A base with a stack, a short last block, a bias and bfloat16, and adapters."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {
        "stack": {"kernel": normal(2, 128, 24), "bias": normal(2, 24)},
        "odd": {"kernel": normal(67, 5).astype(jnp.bfloat16)},
        "norm": normal(24).astype(jnp.bfloat16),
    }
    return ql.init(jax.random.key(0), params, config)


def by_path(tree):
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name(path): np.asarray(leaf) for path, leaf in leaves}


def through_safetensors(tree, like, folder):
    from safetensors.numpy import load_file, save_file

    save_file(by_path(tree), folder / "file")
    found = load_file(folder / "file")
    names = [*by_path(jax.tree.map(lambda x: np.zeros(x.shape), like))]
    assert sorted(names) == sorted(found)
    return jax.tree.unflatten(jax.tree.structure(like), [found[n] for n in names])


def through_orbax(tree, like, folder):
    import orbax.checkpoint as ocp

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", jax.tree.map(place, like))


@pytest.mark.parametrize("through", [through_safetensors, through_orbax])
@pytest.mark.parametrize("name", CONFIGS)
def test_base_and_adapters_come_back(name, through, tmp_path):
    config = CONFIGS[name]
    tree = make(config)
    like = jax.eval_shape(lambda: make(config))
    found = through(tree, like, tmp_path)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    want, got = by_path(tree), by_path(found)
    for path, leaf in want.items():
        assert got[path].dtype == leaf.dtype
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)
    for q, original in (
        (found[0]["stack"]["kernel"], tree[0]["stack"]["kernel"]),
        (found[0]["odd"]["kernel"], tree[0]["odd"]["kernel"]),
    ):
        assert isinstance(q, ql.QTensor)
        settings = q.fmt, q.block_size, q.double_quant
        assert settings == (config.fmt, config.block_size, config.double_quant)
        assert (q.shape, q.dtype) == (original.shape, original.dtype)
        np.testing.assert_array_equal(ql.dequantize(q), ql.dequantize(original))


def test_another_format_is_told_apart():
    """The format is in the structure, which JAX compares; a file has leaves alone."""
    shapes = lambda name: jax.eval_shape(lambda: make(CONFIGS[name]))
    nf4, fp4 = map(jax.tree.structure, map(shapes, ("nf4", "fp4")))
    assert nf4 != fp4
