"""`calibrate` returns the mean squares of the inputs that NumPy computes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_mesh, normal, refusal, spread
from jax import lax
from tolerances import assert_close

import qlora_jax as ql

K, N, LAYERS, ROWS = 64, 32, 3, 10


def float_trees(params, **settings):
    config = ql.QLoRAConfig(rank=2, fmt=None, **settings)
    return ql.init(jax.random.key(0), params, config)


@pytest.mark.parametrize("fmt", [None, "nf4"])
@pytest.mark.parametrize("is_jitted", [False, True])
def test_layers_of_a_scan_with_remat(fmt, is_jitted):
    stack = normal(0, (LAYERS, K, K), scale=0.1)
    config = ql.QLoRAConfig(rank=2, fmt=fmt)
    base, lora = ql.init(jax.random.key(0), {"kernel": stack}, config)

    def apply(base, lora, x):
        @jax.checkpoint
        def layer(x, weights):
            return jnp.tanh(ql.apply(*weights, x)), None

        return lax.scan(layer, x, (base, lora))[0]

    batches = [np.asarray(normal(i, (2, ROWS, K))) for i in (1, 2)]

    def calibrate(base, lora, batches):
        return ql.calibrate(apply, base, lora, batches)

    run = jax.jit(calibrate) if is_jitted else calibrate
    w = np.asarray(ql.dequantize(base)["kernel"], np.float64)
    x, want = np.concatenate(batches).astype(np.float64), []
    for kernel in w:
        want.append(np.square(x).mean((0, 1)))
        x = np.tanh(x @ kernel)
    assert_close(run(base, lora, batches)["kernel"], np.float32(want))


def test_experts_of_a_ragged_product():
    base, lora = float_trees({"kernel": normal(0, (3, K, N))}, contract="bkn")
    x, sizes = np.asarray(normal(1, (ROWS, K))), np.array([4, 0, 3])

    def apply(base, lora, batch):
        return ql.ragged_dot(batch, base["kernel"], sizes, lora["kernel"])

    got = ql.calibrate(apply, base, lora, [x])["kernel"]
    square = np.square(np.float64(x))
    want = [square[:4].mean(0), np.zeros(K), square[4:7].mean(0)]
    assert_close(got, np.float32(want))


def test_mapped_rows_and_contracted_axes_of_any_order():
    params = {"out": {"kernel": normal(0, (4, 16, N))}}
    base, lora = float_trees(params, contract=(-3, -2))
    x = np.asarray(normal(1, (ROWS, 5, 4, 16)))

    def apply(base, lora, x):
        layer = base["out"], lora["out"]
        return jax.vmap(lambda x: ql.apply(*layer, x))(x)

    got = ql.calibrate(apply, base, lora, [x])["out"]["kernel"]
    assert_close(got, np.float32(np.square(np.float64(x)).mean((0, 1)).reshape(K)))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_meshes(kind):
    base, lora = float_trees({"kernel": normal(0, (K, N))})
    x = np.asarray(normal(1, (16, K)))
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        split_base = spread(base, mesh, "b", None)
        split_x = spread(x, mesh, "a", None)
        got = ql.calibrate(ql.apply, split_base, lora, [split_x])["kernel"]
    assert_close(np.asarray(got), np.float32(np.square(np.float64(x)).mean(0)))


def test_linen_and_a_weighted_search_that_lowers_the_error_of_outputs():
    model = nn.Dense(N)
    scale = np.exp(np.random.default_rng(0).normal(size=K)).astype(np.float32)
    x = np.asarray(normal(1, (400, K))) * scale
    params = model.init(jax.random.key(0), x)["params"]
    wrapped = ql.linen.wrap(model)
    base, lora = ql.linen.init(
        jax.random.key(0), model, params, ql.QLoRAConfig(fmt=None), x
    )

    def apply(base, lora, x):
        return wrapped.apply({"params": base, "lora": lora}, x)

    importance = ql.calibrate(apply, base, lora, [x])
    assert_close(importance["kernel"], np.float32(np.square(np.float64(x)).mean(0)))
    w, errors = params["kernel"], []
    for weights in (None, importance["kernel"]):
        q = ql.quantize(w, scales="search", importance=weights)
        errors.append(np.linalg.norm(x @ (q.dequantize() - w)))
    assert errors[1] < 0.95 * errors[0]


def test_kernels_without_products_are_refused():
    base, lora = float_trees({"a": {"kernel": normal(0, (K, N))}})
    for output in (jnp.ones(3), 1.0):
        refusal(
            lambda x=output: ql.calibrate(lambda *_: x, base, lora, [jnp.ones(3)]),
            "the outputs of `apply` must depend on products with these kernels",
            "a/kernel",
        )


def test_no_batch_is_refused():
    base, lora = float_trees({"kernel": normal(0, (K, N))})
    with pytest.raises(ValueError, match="`batches` must have at least one batch"):
        ql.calibrate(ql.apply, base, lora, iter([]))
    with pytest.raises(TypeError, match="`batches` must be an iterable .* Got dict"):
        ql.calibrate(ql.apply, base, lora, {"x": jnp.ones((2, K))})
