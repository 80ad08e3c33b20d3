"""Models that others wrote: what they return, read, capture and change."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax.core import FrozenDict, freeze
from helpers import fast_and_slow, normal, randomized
from integration_models import INIT, LinenMLP, LinenTwoKernels
from linen_helpers import CONFIG, assert_as_merged, merged, variables_of
from tolerances import assert_close

import qlora_jax as ql

KEY = jax.random.key(0)
IDS = jnp.array([[1, 5, 3]])


class ReturnsText(nn.Module):
    @nn.compact
    def __call__(self, x):
        return {"mode": "a", "y": nn.Dense(8)(x)}


def test_a_model_may_return_what_is_no_array(x):
    variables = variables_of_text(x)
    got = ql.linen.wrap(ReturnsText()).apply(variables, x)
    assert got["mode"] == "a"
    assert_close(got["y"], ReturnsText().apply(merged(variables), x)["y"])


def variables_of_text(x):
    params = nn.Dense(8).init(KEY, x)
    base, lora = ql.linen.init(
        KEY, ReturnsText(), {"Dense_0": params["params"]}, CONFIG, x
    )
    return {"params": base, "lora": randomized(lora)}


class Captured(nn.Module):
    """Runs a packed product, and a module on float weights."""

    @nn.compact
    def __call__(self, x):
        return LinenTwoKernels(name="own")(nn.Dense(64, name="dense")(x))


def every_call(module, method):
    return method == "__call__" and module.name != "dense"


@pytest.mark.parametrize("capture", fast_and_slow([True], [every_call]))
def test_intermediates_are_captured_once(capture, x):
    config = ql.QLoRAConfig(rank=4, targets=".*(kernel|gate|up)")
    variables = variables_of(Captured(), x, config)
    options = {"capture_intermediates": capture, "mutable": ["intermediates"]}
    got = ql.linen.wrap(Captured()).apply(variables, x, **options)
    assert_close(got, Captured().apply(merged(variables), x, **options))


class TiedHead(nn.Module):
    """Reads the table of its embedding in a way that Flax does not unbox."""

    read: str

    def setup(self):
        self.e = nn.Embed(64, 32)

    def __call__(self, ids):
        x = self.e(ids)
        if self.read == "T":
            return x @ self.e.variables["params"]["embedding"].T
        table = self.e.get_variable("params", "embedding")
        if self.read == "einsum":
            return jnp.einsum("btd,vd->btv", x, table)
        return x @ jnp.swapaxes(2 * table[:16] + table[16:32], 0, 1)


class ReadsVariable(nn.Module):
    """A module that reads its own kernel by `get_variable`."""

    @nn.compact
    def __call__(self, x):
        self.param("w", INIT, (64, 32))
        w = self.get_variable("params", "w")
        return x @ w, w.shape, w.dtype == jnp.float32


@pytest.mark.parametrize("read", fast_and_slow(["T"], ["einsum", "operators"]))
def test_variables_of_other_modules_are_read_as_float_arrays(read):
    model = TiedHead(read)
    params = model.init(KEY, IDS)["params"]
    config = ql.QLoRAConfig(targets=(), trainable_rows={"e/embedding": [3, 60]})
    base, lora = ql.linen.init(KEY, model, params, config, IDS)
    variables = {"params": base, "lora": randomized(lora)}
    got = ql.linen.wrap(model).apply(variables, IDS)
    assert_close(got, model.apply(merged(variables), IDS))


@pytest.mark.slow
def test_a_module_may_read_its_kernel_by_get_variable(x):
    params = ReadsVariable().init(KEY, x)["params"]
    config = ql.QLoRAConfig(rank=4, targets="w", block_size=16)
    base, lora = ql.linen.init(KEY, ReadsVariable(), params, config, x)
    variables = {"params": base, "lora": randomized(lora)}
    y, *rest = ql.linen.wrap(ReadsVariable()).apply(variables, x)
    assert_close(y, ReadsVariable().apply(merged(variables), x)[0])
    assert rest == [(64, 32), True]


class ReadsOther(nn.Module):
    @nn.compact
    def __call__(self, x):
        inner = nn.Dense(64, name="inner")
        return inner(x) @ inner.variables["params"]["kernel"].T


@pytest.mark.slow
def test_dropout_is_refused_by_name_where_another_module_reads_the_kernel(x):
    params = ReadsOther().init(KEY, x)["params"]
    config = ql.QLoRAConfig(rank=4, dropout=0.1)
    match = 'inner/kernel: .*reads it itself.*exclude=r".*inner/kernel"'
    with pytest.raises(ValueError, match=match):
        ql.linen.init(KEY, ReadsOther(), params, config, x)
    base, lora = ql.init(KEY, params, config)
    variables = {"params": base, "lora": lora}
    with pytest.raises(ValueError, match=match):
        ql.linen.wrap(ReadsOther()).apply(variables, x, rngs={"dropout": KEY})
    got = ql.linen.wrap(ReadsOther()).apply(variables, x)
    assert_close(got, ReadsOther().apply(merged(variables), x))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))


def test_init_traces_models_that_change_variables(x):
    variables = Normed().init(KEY, x)
    stats = {"batch_stats": variables["batch_stats"]}
    base, lora = ql.linen.init(
        KEY, Normed(), variables["params"], CONFIG, x, other_variables=stats
    )
    variables = {"params": base, "lora": randomized(lora), **stats}
    options = {"mutable": ["batch_stats"]}
    got = ql.linen.wrap(Normed()).apply(variables, x, **options)
    assert_close(got, Normed().apply(merged(variables), x, **options))


@pytest.mark.parametrize("equation", fast_and_slow(["btd,df->bf"], ["btd,df->f"]))
def test_equations_that_also_sum_over_the_input_run_on_float_weights(equation, x):
    model = nn.Einsum((64, 8), equation)
    variables = variables_of(model, x)
    assert variables["lora"]["kernel"].a.shape == (64, 4)
    assert_as_merged(model, x, variables)


@pytest.mark.slow
def test_frozen_parameters_give_frozen_adapters(x):
    params = freeze(LinenMLP().init(KEY, x)["params"])
    base, lora = ql.linen.init(KEY, LinenMLP(), params, CONFIG, x)
    assert isinstance(base, FrozenDict) and isinstance(lora, FrozenDict)
    variables = {"params": base, "lora": lora}
    got = ql.linen.wrap(LinenMLP()).apply(variables, x)
    assert_close(got, LinenMLP().apply(merged(variables), x))


class Patches(nn.Module):
    """As in vision_transformer."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(64, (4, 4), strides=(4, 4), name="embedding")(images)
        return nn.Dense(8, name="head")(x)


class OwnConv(nn.Module):
    """As flaxdiff's WeightStandardizedConv."""

    @nn.compact
    def __call__(self, images):
        w = self.param("kernel", INIT, (3, 3, 32, 16))
        w = w - w.mean((0, 1, 2), keepdims=True)
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            images, w, (1, 1), "SAME", dimension_numbers=numbers
        )


class TwoOwn(nn.Module):
    @nn.compact
    def __call__(self, x):
        return LinenTwoKernels(name="two")(x)


class SingleOwn(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(x @ self.param("kernel", INIT, (64, 64)))


def refusal(model, x):
    params = model.init(KEY, x)["params"]
    config = ql.QLoRAConfig(rank=4, dropout=0.1, targets=".*(kernel|gate|up)")
    with pytest.raises(ValueError, match="no dropout can act") as error:
        ql.linen.init(KEY, model, params, config, x)
    return str(error.value)


def test_dropout_with_a_convolution_says_what_to_exclude():
    """`register` takes an einsum, so it is no way out."""
    images = normal(0, (2, 16, 16, 3))
    text = refusal(Patches(), images)
    assert 'exclude=r".*embedding/kernel"' in text and "register" not in text
    config = ql.QLoRAConfig(rank=4, dropout=0.1, exclude=r".*embedding/kernel")
    params = Patches().init(KEY, images)["params"]
    _, lora = ql.linen.init(KEY, Patches(), params, config, images)
    assert set(lora) == {"head"}


@pytest.mark.parametrize(
    ("model", "can_register"),
    [(TwoOwn(), False), (SingleOwn(), True), (nn.WeightNorm(nn.Dense(8)), False),
     (nn.Dense(8, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k)), False)],
)  # fmt: skip
def test_register_is_advised_only_where_it_may_help(model, can_register, x):
    assert ("ql.linen.register" in refusal(model, x)) == can_register


@pytest.mark.slow
def test_guessed_axes_of_a_convolution_are_said():
    images = normal(0, (1, 4, 4, 32))
    params = OwnConv().init(KEY, images)["params"]
    config = ql.QLoRAConfig(rank=4, block_size=32)
    match = r"'kernel': \(3, 3, 32, 16\).*contract=\"kkkn\""
    with pytest.warns(UserWarning, match=match) as caught:
        _, lora = ql.linen.init(KEY, OwnConv(), params, config, images)
    assert caught[0].filename == __file__
    assert lora["kernel"].nbytes == 4 * 4 * 9 * (32 + 16)  # one adapter for each tap
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = ql.QLoRAConfig(rank=4, contract="kkkn", block_size=32)
        base, lora = ql.linen.init(KEY, OwnConv(), params, config, images)
    assert lora["kernel"].nbytes == 4 * 4 * (9 * 32 + 16)
    variables = {"params": base, "lora": randomized(lora)}
    got = ql.linen.wrap(OwnConv()).apply(variables, images)
    assert_close(got, OwnConv().apply(merged(variables), images))
