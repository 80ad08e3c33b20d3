"""NNX models with leaves that are trained in full are split like other models."""

import jax
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import qlora_jax as ql

SPLIT = PartitionSpec("fsdp", None)


class Model(nnx.Module):
    def __init__(self, rngs, metadata):
        self.embed = nnx.Embed(64, 64, rngs=rngs, embedding_metadata=metadata)
        self.out = nnx.Linear(64, 64, rngs=rngs)


@pytest.mark.parametrize("source", ["rules", "metadata"])
def test_both_arrays_of_a_leaf_that_is_trained_in_full_are_split(source):
    has_rules = source == "rules"
    metadata = {} if has_rules else {"out_sharding": tuple(SPLIT)}
    with nnx.use_eager_sharding(False):
        model = Model(nnx.Rngs(0), metadata)
    config = ql.QLoRAConfig(trainable="embed/embedding", targets="out/kernel")
    model = ql.nnx.wrap(model, config, rngs=nnx.Rngs(1))
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
    rules = {"embed/embedding": SPLIT} if has_rules else None
    model = ql.nnx.place(model, mesh, rules, rows=["fsdp"])
    base, lora = ql.nnx.split(model)
    assert base["embed"]["embedding"].sharding.spec == SPLIT
    assert lora["embed"]["embedding"].value.sharding.spec == SPLIT
    assert base["out"]["bias"].sharding.is_fully_replicated
