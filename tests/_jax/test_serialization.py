"""A packed base keeps its bits and settings when it is saved in other file formats.

Leaves are arrays of dtypes that every format knows; the settings are in the tree's
structure, which `jax.eval_shape` makes again from the config without any weights.
"""

import copy
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, dequantize, normal, trees_of
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax._jax.pytree import Note, static_from_json, static_to_json
from qlora_jax.trees.paths import leaves_by_path

CONFIGS = {
    "nf4": ql.QLoRAConfig(rank=2),
    "int4": ql.QLoRAConfig(rank=2, fmt="int4", block_size=32, double_quant=False),
    "fp4": ql.QLoRAConfig(rank=2, fmt="fp4", block_size=32),
    "rows": ql.QLoRAConfig(trainable="norm", trainable_rows={"odd/kernel": (3, 62)}),
    "int8": ql.QLoRAConfig(rank=2, fmt="int8", double_quant=False),
}


def make(config):
    """A base with a stack, an odd N, a bias and bfloat16, and adapters."""
    params = {
        "stack": {"kernel": normal(0, (2, 128, 24)), "bias": normal(1, (2, 24))},
        "odd": {"kernel": normal(2, (64, 5), jnp.bfloat16)},
        "norm": normal(3, 24, jnp.bfloat16),
    }
    return ql.init(jax.random.key(0), params, config)


def through_safetensors(tree, like, folder):
    from safetensors.numpy import load_file, save_file

    def name_of(path):
        return jax.tree_util.keystr(path, simple=True, separator="/")

    leaves = jax.tree.leaves_with_path(tree)
    save_file({name_of(path): np.asarray(x) for path, x in leaves}, folder / "file")
    tensors = load_file(folder / "file")
    return jax.tree.map_with_path(lambda path, x: tensors[name_of(path)], like)


def through_orbax(tree, like, folder):
    import orbax.checkpoint as ocp

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", jax.tree.map(place, like))


def through_flax(tree, like, folder):
    import flax.serialization

    assert ql.linen  # registers the classes
    data = flax.serialization.to_bytes(tree)
    like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    return flax.serialization.from_bytes(like, data)


def through_pickle(tree, like, folder):
    return pickle.loads(pickle.dumps(tree))


THROUGH = [through_safetensors, through_orbax, through_flax, through_pickle]


@pytest.mark.slow
@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("name", CONFIGS)
def test_base_and_adapters_come_back(name, through, tmp_path):
    tree = make(CONFIGS[name])
    restored = through(tree, jax.eval_shape(lambda: make(CONFIGS[name])), tmp_path)
    assert_same(restored, tree)  # settings too: they are in the structure


def kinds_of_nodes():
    """A tree with every kind of node that a user's tree can contain."""
    params = {"kernel": normal(0, (64, 8))}
    trained, lora = trees_of(params, rank=2, dropout=0.1, freeze_base=False)
    packed = ql.quantize(params, ql.QLoRAConfig(fmt="int4"))
    one_tree = ql.combine(packed, lora)
    rows = make(CONFIGS["rows"])[1]["odd"]
    tree = {"trained": trained, "packed": packed, "lora": lora, "one": one_tree}
    return tree | {"rows": rows}


@pytest.mark.parametrize("through", [through_pickle, lambda t, *_: copy.deepcopy(t)])
def test_every_kind_of_node_is_copied(through):
    tree = kinds_of_nodes()
    assert_same(through(tree, None, None), tree)


def test_configs_are_pickled():
    config = ql.QLoRAConfig(rank=2, rank_pattern={"a": 3}, contract={"b": "nk"})
    unpickled = pickle.loads(pickle.dumps(config))
    assert unpickled == config and hash(unpickled) == hash(config)


@pytest.mark.parametrize("integration", ["linen", "nnx"])
def test_state_dicts_of_flax_hold_every_kind_of_node(integration):
    import flax.serialization

    assert getattr(ql, integration)
    tree = kinds_of_nodes()
    state = flax.serialization.to_state_dict(tree)
    codes = state["one"]["kernel"]["base"]["codes"]
    np.testing.assert_array_equal(codes, tree["packed"]["kernel"].codes)
    assert_same(flax.serialization.from_state_dict(tree, state), tree)


@pytest.mark.newest
def test_nnx_alone_registers_codes_in_host_memory():
    code = """
import flax.serialization, jax, jax.numpy as jnp, numpy as np
import qlora_jax as ql
assert ql.nnx
base = {"kernel": ql.quantize(jnp.arange(1024.0).reshape(2, 64, 8))}
mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
base, _ = ql.sharding.place(base, {}, mesh, memory="host")
assert base["kernel"].memory == "host"
data = flax.serialization.to_bytes(base)
found = flax.serialization.from_bytes(jax.tree.map(np.zeros_like, base), data)
assert jax.tree.structure(found) == jax.tree.structure(base)
jax.tree.map(np.testing.assert_array_equal, found, base)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_flax_refuses_the_state_of_another_format():
    import flax.serialization

    assert ql.linen
    (nf4, _), (fp4, _) = make(CONFIGS["nf4"]), make(CONFIGS["fp4"])
    data = flax.serialization.to_bytes(nf4)
    with pytest.raises(ValueError, match="QTensor must be restored .*fp4.*nf4"):
        flax.serialization.from_bytes(fp4, data)


@pytest.mark.slow
def test_exported_programs_take_packed_trees():
    """`jax.export` stores the tree structure of the arguments with the program."""
    pytest.importorskip("flatbuffers")  # which JAX needs for it
    tree = kinds_of_nodes()
    x = jnp.ones((2, 64))

    @jax.jit
    def run(tree, x):
        merged_kernel = ql.merge(*ql.split(tree["one"]))["kernel"]
        trained = ql.apply(tree["trained"], tree["lora"], x)
        return x @ merged_kernel + trained, tree

    exported = jax.export.export(run)(tree, x)
    again = jax.export.deserialize(exported.serialize())
    assert again.in_tree == exported.in_tree
    y, returned_tree = again.call(tree, x)
    assert_close(y, run(tree, x)[0], terms=64)
    assert jax.tree.structure(returned_tree) == jax.tree.structure(tree)
    packed = ql.quantize({"kernel": jnp.ones((64, 8))}, CONFIGS["nf4"])
    with pytest.raises(ValueError, match="tree"):
        again.call({**tree, "packed": packed}, x)


@pytest.mark.newest
def test_exported_programs_take_any_number_of_rows():
    base, lora = trees_of({"kernel": normal(0, (64, 32))}, rank=2)

    def run(lora, base, x):
        def loss(lora):
            y = ql.apply(base, lora, x)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, has_aux=True)(lora)

    batch = jax.export.symbolic_shape("b, t")
    x = jax.ShapeDtypeStruct((*batch, 64), jnp.float32)
    exported = jax.export.export(jax.jit(run))(lora, base, x)
    a, b = (np.asarray(factor, np.float64) for factor in jax.tree.leaves(lora))
    scaling = lora["kernel"].scaling
    for rows in (1, 1), (2, 3):
        x = np.asarray(normal(1, (*rows, 64)))
        grads, y = exported.call(lora, base, x)
        want = x @ dequantize(base["kernel"]) + scaling * (x @ a) @ b
        assert_close(y, want)
        x, g = x.reshape(-1, 64), scaling * np.cos(want).reshape(-1, 32)
        expected = x.T @ (g @ b.T), (x @ a).T @ g
        for got, want in zip(jax.tree.leaves(grads), expected, strict=True):
            assert_close(got, want)


def test_static_fields_go_through_json():
    nodes = leaves_by_path(kinds_of_nodes()).values()
    nodes = [node for node in nodes if hasattr(node, "tree_fields")]
    assert {type(node).__name__ for node in nodes} >= {"QTensor", "LoRA", "TrainedRows"}
    for node in nodes:
        _, names = node.tree_fields
        values = tuple(getattr(node, name) for name in names)
        text = static_to_json(type(node), values, names)
        assert static_from_json(type(node), text, names) == values
    with pytest.raises(TypeError, match="static fields of QTensor must be plain"):
        static_to_json(ql.QTensor, (object(),), ("fmt",))


def test_notes_are_equal_whatever_their_text():
    a, b = Note("a"), Note("b")
    assert a == b and not a != b and hash(a) == hash(b)
    assert a != "a" and str(a) == "a"
