"""A new kind of adapter needs no change outside the file that defines it.

The kind is VeRA (Kopiczko et al. 2024): A and B are random, frozen and shared by all
kernels, and only two vectors are trained: `y = x W + ((x A) * d) B * b`.
"""

import dataclasses
from dataclasses import dataclass

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from helpers import assert_same, make_mesh, normal, relative_error, rounding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

import qlora_jax as ql
from qlora_jax.adapters.base import Adapter, on_matrix, register_adapter
from qlora_jax.quant.geometry import Geometry

K, N, RANK, SEED = 64, 48, 8, 5


@dataclass(frozen=True, eq=False)
class VeRA(Adapter):
    """Trains how much of each direction of a frozen A and B is added to a kernel."""

    d: Array  # [*batch, r]
    b: Array  # [*batch, N], zero at first
    seed: tuple[int, ...]  # A and B are drawn from it, so files do not have them
    geometry: Geometry

    roles = {"d": "r", "b": "n"}
    settings = ("seed", "geometry")
    label = "vera"
    can_be_in_bank = True
    dropout = 0.0

    def change(self, x, kernel, call):
        def over_rows(vector, y):
            axes = range(vector.ndim - 1, y.ndim - 1)
            return jnp.expand_dims(vector.astype(y.dtype), tuple(axes))

        a, b = (w.astype(x.dtype) for w in frozen_factors(kernel.matrix_shape, self))
        h = jnp.einsum("...k,kr->...r", x, a)
        change = jnp.einsum("...r,rn->...n", h * over_rows(self.d, h), b)
        return change * over_rows(self.b, change)

    def merged(self, kernel):
        frozen_a, frozen_b = frozen_factors(kernel.matrix_shape, self)

        def add_change(w, d, b):
            factors = frozen_a, d, frozen_b, b
            return w + jnp.einsum("kr,...r,rn,...n->...kn", *factors)

        return on_matrix(kernel, add_change, self.d, self.b)


assert ql.linen  # imported before the kind is registered
register_adapter(VeRA)


def frozen_factors(matrix_shape, lora):
    key_a, key_b = jax.random.split(jax.random.key(lora.seed[0]))
    *_, k, n = matrix_shape
    a = jax.random.normal(key_a, (k, lora.rank)) / np.sqrt(k)
    return a, jax.random.normal(key_b, (lora.rank, n)) / np.sqrt(lora.rank)


def make(seed=0, batch=()):
    """A packed base and its adapter, as if it had been trained."""
    params = {"kernel": normal(0, (*batch, K, N))}
    config = ql.QLoRAConfig(rank=1, block_size=16)
    base, _ = ql.init(jax.random.key(0), params, config)
    d, b = normal(seed + 1, (*batch, RANK)), normal(seed + 2, (*batch, N))
    return base, {"kernel": VeRA(d, b, (SEED,), base["kernel"].geometry)}


def adapted_weights(base, lora):
    w, lora = np.asarray(ql.dequantize(base)["kernel"], np.float64), lora["kernel"]
    a, b = (np.asarray(x, np.float64) for x in frozen_factors(w.shape, lora))
    d, scale = (np.asarray(x, np.float64)[..., None, :] for x in (lora.d, lora.b))
    return w + (a * d) @ b * scale


@pytest.mark.parametrize("batch", [(), (3,)], ids=["kernel", "stack"])
def test_it_multiplies_and_merges_by_its_formula(batch):
    base, lora = make(batch=batch)
    x, want = normal(3, (*batch, 5, K)), adapted_weights(base, lora)
    bound = rounding(2 * K + RANK)
    y = jax.jit(ql.apply)(base, lora, x)
    assert relative_error(y, np.float64(x) @ want) < bound
    assert relative_error(ql.merge(base, lora)["kernel"], want) < bound
    row = ql.summary(base, lora).lora[0]
    assert (row.fmt, row.params) == ("vera", lora["kernel"].size)


def test_it_trains_its_two_vectors_alone():
    base, target = make()
    lora = jax.tree.map(jnp.zeros_like, target)
    lora["kernel"] = dataclasses.replace(lora["kernel"], d=jnp.full(RANK, 0.1))
    x = normal(4, (32, K))
    want, optimizer = ql.apply(base, target, x), optax.adamw(0.05)

    def loss(lora):
        return jnp.mean((ql.apply(base, lora, x) - want) ** 2)

    @jax.jit
    def step(lora, state):
        value, grads = jax.value_and_grad(loss)(lora)
        updates, state = optimizer.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, value

    state, losses = optimizer.init(lora), []
    for _ in range(60):
        lora, state, value = step(lora, state)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]
    assert len(jax.tree.leaves(lora)) == 2
    assert lora["kernel"].seed == (SEED,)


def test_flax_modules_compute_with_it():
    base, lora = make()
    x, want = normal(5, (2, K)), ql.apply(*make(), normal(5, (2, K)))
    model = ql.linen.wrap(nn.Dense(N, use_bias=False))
    y = model.apply({"params": base, "lora": lora}, x)
    np.testing.assert_array_equal(y, want)
    layer = nnx.Linear(K, N, use_bias=False, rngs=nnx.Rngs(0))
    wrapped = ql.nnx.wrap(layer, ql.QLoRAConfig(rank=1), rngs=nnx.Rngs(1))
    joined = ql.nnx.join(wrapped, base, lora)
    np.testing.assert_array_equal(joined(x), want)
    assert_same(ql.nnx.split(joined)[1], lora)


def test_it_is_placed_on_a_mesh():
    base, lora = make()
    mesh = make_mesh("Auto", axes=("fsdp", "tensor"))
    x, rules = normal(6, (8, K)), {"kernel": P("fsdp", "tensor")}
    want = ql.apply(base, lora, x)
    base, lora = ql.sharding.place(base, lora, mesh, rules)
    # Split over the mesh axes of N, then of K, as B of a LoRA is.
    assert lora["kernel"].b.sharding.spec == P(("tensor", "fsdp"))
    with jax.set_mesh(mesh):
        assert relative_error(jax.jit(ql.apply)(base, lora, x), want) < rounding(K)


def test_rows_of_a_batch_choose_it_from_a_bank():
    base, first = make()
    _, second = make(seed=7)
    bank, x = ql.bank([first, second]), normal(8, (3, 5, K))
    y = jax.jit(ql.apply)(base, ql.select(bank, np.array([1, -1, 0])), x)
    for row, lora in enumerate((second, {}, first)):
        want = ql.apply(base, lora, x[row])
        assert relative_error(y[row], want) < rounding(2 * K)
    assert_same(bank[1], second)
    other = {"kernel": dataclasses.replace(second["kernel"], seed=(SEED + 1,))}
    with pytest.raises(ValueError, match=r"and seed \(5,\). Got"):
        ql.bank([first, other])


def test_flax_makes_states_of_it():
    _, lora = make(batch=(2,))
    state = serialization.to_state_dict(lora)
    zeros = jax.tree.map(jnp.zeros_like, lora)
    chex.assert_trees_all_equal(serialization.from_state_dict(zeros, state), lora)


def test_its_files_have_its_arrays_and_settings(tmp_path):
    _, lora = make(batch=(3,))
    ql.io.save(tmp_path / "lora", lora)
    assert_same(ql.io.restore(tmp_path / "lora").tree, lora)
