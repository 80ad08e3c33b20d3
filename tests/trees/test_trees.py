"""Trees: which leaves are packed, what is refused, and which functions are inverses."""

import dataclasses
import functools
import gc
import pathlib
import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, dequantize, normal, refusal
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.adapters.base import misfit_reason
from qlora_jax.quant import pack as kernel_module
from qlora_jax.trees import quantize as quantize_module
from qlora_jax.trees.paths import leaves_by_path

KEY = jax.random.key(0)
KERNELS = ["layers/0/q_proj/kernel", "layers/1/q_proj/kernel", "stack/kernel"]
TARGETS = "these leaves cannot be targets"


def params(dtype=jnp.float32):
    return {
        "embed": {"embedding": normal(0, (11, 64), dtype)},
        "layers": [
            {"q_proj": {"kernel": normal(i, (64, 24), dtype), "bias": normal(9, 24)}}
            for i in (1, 2)
        ],
        "stack": {"kernel": normal(3, (3, 64, 32), dtype)},
        "norm": {"scale": normal(4, 64, dtype)},
    }


def init(tree=None, *, donate=False, **settings):
    """Returns both trees, with B = 0."""
    tree = params() if tree is None else tree
    return ql.init(KEY, tree, ql.QLoRAConfig(**settings), donate=donate)


def trees(tree=None, **settings):
    """Returns both trees, with B not zero."""
    base, lora = init(tree, **settings)
    return base, jax.tree.map(lambda x: normal(x.size, x.shape, x.dtype), lora)


def is_deleted(tree):
    return [x.is_deleted() for x in jax.tree.leaves(tree)]


class TestInit:
    def test_packs_and_adapts_the_targets_and_nothing_else(self):
        tree = params()
        base, lora = init(tree, rank=4)
        leaves, adapters = map(leaves_by_path, (base, lora))
        packed = [path for path, x in leaves.items() if isinstance(x, ql.QTensor)]
        assert packed == KERNELS and sorted(adapters) == KERNELS
        assert base["norm"]["scale"] is tree["norm"]["scale"]
        assert adapters["stack/kernel"].a.shape == (3, 64, 4)
        # Every adapter has its own random key.
        first, second = (lora["layers"][i]["q_proj"]["kernel"].a for i in "01")
        assert not np.array_equal(first, second)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"targets": "q_proj"}, "`targets` must match at least one leaf"),
            ({"targets": [".*/kernel", "typo"]}, "must match a leaf. Got ['typo'],"),
            ({"exclude": ["norm/.*", "typo"]}, "must match a leaf. Got ['typo'],"),
            ({"trainable": "typo"}, "must match a leaf. Got ['typo'],"),
            ({"trainable_rows": {"typo": [1]}}, "must match a leaf. Got ['typo'],"),
            ({"trainable_rows": {"embed.*": [3, 11]}}, "must be below 11. Got (3,"),
            ({"trainable_rows": {"norm/scale": [1]}}, "be a table [V, D]. Got float32"),
            ({"rank_pattern": {"typo": 2}}, "must match a target. Got ['typo'],"),
            ({"alpha_pattern": {"norm/.*": 2}}, "match a target. Got ['norm/.*'],"),
            ({"contract": {"typo": -3}}, "must match a target. Got ['typo'],"),
        ],
    )
    def test_each_single_pattern_must_match(self, settings, message):
        config = ql.QLoRAConfig(**settings)
        for function in (ql.quantize, functools.partial(ql.init, KEY)):
            refusal(lambda function=function: function(params(), config), message)

    def test_all_leaves_that_cannot_be_targets_are_named(self):
        tree = params()
        tree["counter"] = {"kernel": jnp.ones((64, 2), jnp.int32)}
        tree["layers"][1]["q_proj"]["kernel"] = jnp.full((64, 24), jnp.nan)
        tree["narrow"] = {"kernel": jnp.ones((64, 2), jnp.float8_e4m3fn)}
        tree["shape"] = {"kernel": jax.ShapeDtypeStruct((64, 2), jnp.float32)}
        tree["both"] = {"kernel": ql.AdaptedKernel(jnp.ones((64, 2)), None)}
        text = refusal(
            lambda: init(tree, targets=".*(kernel|scale)"),
            TARGETS,
            "counter/kernel: weights must be a floating-point array",
            "layers/1/q_proj/kernel: weights must be finite",
            "norm/scale: weights must have at least 2 axes",
            "narrow/kernel: weights must be a floating-point array: one",
            "shape/kernel: weights must be arrays. Got a ShapeDtypeStruct",
            "both/kernel: it is a kernel already. Got AdaptedKernel",
        )
        assert "layers/0" not in text

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"trainable": "eps"}, "must be float arrays. Got:\n  eps: float"),
            (
                {"trainable_rows": {"eps": [1]}},
                "eps: it must be a table [V, D]. Got fl",
            ),
        ],
    )
    def test_numbers_cannot_be_trained(self, settings, message):
        refusal(lambda: init({"eps": 1e-5, **params()}, **settings), message)

    def test_leaves_that_are_trained_in_full(self):
        """They are not targets. They are float32 copies, as a step may donate them."""
        tree = params(jnp.bfloat16)
        kernel = "layers/1/q_proj/kernel"
        base, lora = init(tree, trainable=[kernel, "norm/.*"])
        leaves, trained = map(leaves_by_path, (base, lora))
        assert sorted(trained) == sorted([*KERNELS, "norm/scale"])
        for path in (kernel, "norm/scale"):
            x = trained[path].value
            assert x.dtype == jnp.float32 and leaves[path].dtype == jnp.bfloat16
            np.testing.assert_array_equal(x, leaves[path])
        assert ql.merge(base, lora)["norm"]["scale"].dtype == jnp.bfloat16
        assert set(jax.tree.leaves(ql.lora_labels(lora))) == {"lora"}
        jax.tree.map(lambda x: x.delete(), lora)
        assert not any(is_deleted(tree))
        tree["counter"] = jnp.zeros(3, jnp.int32)
        tree["packed"] = ql.quantize(jnp.ones((64, 2)))
        words = "must be float arrays. Got:", "counter: int32\n  packed: nf4"
        refusal(lambda: init(tree, trainable=["counter", "packed"]), *words)

    def test_nothing_is_donated_when_a_leaf_is_refused(self):
        tree = params()
        tree["stack"]["kernel"] = jnp.full((3, 64, 32), jnp.inf)
        with pytest.raises(ValueError, match="stack/kernel"):
            init(tree, donate=True)
        assert not any(is_deleted(tree))

    @pytest.mark.parametrize("function", ["init", "quantize", "pack what was trained"])
    def test_memory_peaks_at_the_float_tree_and_one_leaf(self, function, monkeypatch):
        """Only kernels are freed, one by one, although the caller holds the tree."""
        config = ql.QLoRAConfig(rank=4)
        tree = params()

        def run():
            return ql.quantize(tree, config, donate=True)

        if function == "init":

            def run():
                return ql.init(KEY, tree, config, donate=True)[0]
        elif function != "quantize":
            tree = ql.quantize(tree, ql.QLoRAConfig(freeze_base=False))
        want = jax.tree.leaves(ql.quantize(tree, config))
        del tree["embed"]  # the remaining leaves are mostly kernels
        leaves = [x for x in jax.tree.leaves(tree) if x.ndim > 1]
        sizes = [x.nbytes for x in leaves]
        smallest = min(sizes)  # adapters are smaller

        def live_float_bytes():
            return sum(x.nbytes for x in jax.live_arrays() if x.nbytes >= smallest)

        gc.collect()  # arrays of earlier tests that are in reference cycles
        observations, started = [], live_float_bytes()
        pack = quantize_module.quantize_unchecked

        def spy(*args, **options):
            observations.append((is_deleted(leaves), started - live_float_bytes()))
            return pack(*args, **options)

        monkeypatch.setattr(quantize_module, "quantize_unchecked", spy)
        got = jax.tree.leaves(run())
        assert len(observations) == len(leaves) == 3
        for turn, (deleted, freed) in enumerate(observations):
            assert deleted == [i < turn for i in range(3)]
            assert freed == sum(sizes[:turn])
        assert is_deleted(tree) == [x.ndim > 1 for x in jax.tree.leaves(tree)]
        assert_same(got, want[1:])

    @pytest.mark.slow
    @pytest.mark.parametrize("alias", [lambda x: x, jax.device_put, jnp.asarray])
    def test_donating_an_array_at_two_paths_is_refused(self, alias):
        config, tree = ql.QLoRAConfig(), params()
        tree["tied"] = {"kernel": alias(tree["stack"]["kernel"])}
        array = tree["layers"][1]["q_proj"]["kernel"]
        tree["spare"] = jax.device_put(array, jax.devices()[0])
        trained = ql.quantize(tree, ql.QLoRAConfig(freeze_base=False))
        for run in (
            lambda: init(tree, donate=True),
            lambda: ql.quantize(tree, config, donate=True),
            lambda: ql.quantize(trained, config, donate=True),
        ):
            both = (
                "['stack/kernel', 'tied/kernel']",
                "['layers/1/q_proj/kernel', 'spare']",
            )
            refusal(run, "where leaves share an array", *both)
            assert not any(is_deleted(tree))
        base, _ = init(tree)
        np.testing.assert_array_equal(
            base["tied"]["kernel"].codes, base["stack"]["kernel"].codes
        )

    def test_what_stays_may_be_shared(self):
        tree = params()
        tree["norm"]["twin"] = tree["norm"]["scale"]
        base = ql.quantize(tree, ql.QLoRAConfig(), donate=True)
        assert base["norm"]["twin"] is tree["norm"]["scale"]

    def test_each_weight_is_checked_once(self, monkeypatch):
        calls: list = []

        def check(w, limit):
            return calls.append(w.shape) or True

        monkeypatch.setattr(kernel_module, "all_below", check)
        init()
        assert calls == [(64, 24), (64, 24), (3, 64, 32)]
        del calls[:]
        trained = ql.quantize(params(), ql.QLoRAConfig(freeze_base=False))
        ql.quantize(trained, ql.QLoRAConfig())
        assert calls == 2 * [(64, 24), (64, 24), (3, 64, 32)]
        ql.quantize(jnp.ones((64, 2)))
        assert calls[6:] == [(64, 2)]

    @pytest.mark.slow
    def test_weights_that_a_trace_closes_over(self):
        """This is the usual way to restore a checkpoint."""
        tree = params()

        def run():
            return init(tree, donate=True, rank=4)

        shapes = jax.eval_shape(run)
        base, lora = jax.jit(run)()
        assert not any(is_deleted(tree))
        q = jax.jit(lambda: ql.quantize(tree["stack"]["kernel"], donate=True))()
        want = init(tree, rank=4)
        assert jax.tree.structure(shapes) == jax.tree.structure(want)
        for got in (base["stack"]["kernel"], q):
            np.testing.assert_array_equal(got.codes, want[0]["stack"]["kernel"].codes)
        # XLA folds constants: the mean of the scales is summed in another order.
        assert_close((base, lora), want)
        tree["stack"]["kernel"] = np.full((3, 64, 32), np.nan, np.float32)
        with pytest.raises(ValueError, match="stack/kernel: weights must be finite"):
            jax.eval_shape(lambda: ql.quantize(tree, ql.QLoRAConfig()))

    @pytest.mark.slow
    def test_a_packed_base_gets_adapters(self):
        want, want_lora = init(rank=4)
        for packed in (ql.quantize(params(), ql.QLoRAConfig()), {**params(), **want}):
            packed["stack"] = want["stack"]
            base, lora = init(packed, rank=4, donate=True)
            assert base["stack"]["kernel"] is want["stack"]["kernel"]
            assert_same((base, lora), (want, want_lora))

    @pytest.mark.parametrize("fmt", ["int4", None])
    def test_packed_kernels_of_any_settings_stay_as_they_are(self, fmt):
        tree = params()
        stack = ql.quantize(tree["stack"]["kernel"], "int8", double_quant=False)
        tree["stack"] = {"kernel": stack}
        config = ql.QLoRAConfig(rank=4, fmt=fmt, block_size=32)
        base, lora = ql.init(KEY, tree, config)
        assert base["stack"]["kernel"] is stack
        assert misfit_reason(lora["stack"]["kernel"], stack) is None
        assert_same(lora, ql.init(KEY, params(), config)[1])
        first = base["layers"][0]["q_proj"]["kernel"]
        assert (first.packing if fmt else None) == config.packing

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"freeze_base": False}, "packed already; `freeze_base` must be True"),
            ({"contract": {"stack/.*": "nk"}}, "with axes 'bkn' (b batch, k cont"),
        ],
    )
    def test_packed_kernels_that_do_not_fit_the_config_are_refused(
        self, settings, message
    ):
        base = ql.quantize(params(), ql.QLoRAConfig())
        words = TARGETS, "stack/kernel: it is packed", message
        refusal(lambda: init(base, **settings), *words)

    def test_paths_that_are_spelled_alike_are_refused(self):
        w = jnp.ones((64, 8))
        tree = {"a/b": {"kernel": w}, "a": {"b": {"kernel": 2 * w}}}
        both = "a/b/kernel: ['a']['b']['kernel'] and ['a/b']['kernel']"
        for run in (
            init,
            lambda tree: ql.quantize(tree, ql.QLoRAConfig()),
            lambda tree: ql.merge(tree, {}),
        ):
            refusal(lambda run=run: run(tree), "paths must differ", both)

    def test_forward_mode_is_refused_by_name(self):
        base, lora = init(rank=4)
        kernel, adapter = base["stack"]["kernel"], lora["stack"]["kernel"]
        x = jnp.ones((3, 2, 64))

        def apply_to_float_kernel(a):
            return ql.apply(jnp.ones(kernel.shape), a, x)

        for run, primal in (
            (lambda a: ql.apply(kernel, a, x), adapter),
            (apply_to_float_kernel, adapter),
            (lambda x: ql.apply(kernel, None, x), x),
            (lambda x: ql.matmul(x, kernel), x),
        ):
            # docs/limits.md documents this.
            with pytest.raises(TypeError, match="forward-mode .* custom_vjp"):
                jax.jvp(run, (primal,), (primal,))

    def test_the_gradient_of_packed_codes_is_what_docs_quote(self):
        quoted = pathlib.Path(__file__).parents[2] / "docs/guides/one_tree.md"
        with pytest.raises(TypeError) as error:
            jax.grad(lambda base: 0.0)(init()[0])
        start = "grad requires real- or complex-valued inputs"
        for text in (str(error.value), quoted.read_text()):
            assert start in text and "but got uint8" in text

    @pytest.mark.parametrize("shape", [(64, 64), (32, 64)])
    @pytest.mark.parametrize("fmt", ["int8", None])
    def test_a_float_weight_needs_its_axes(self, shape, fmt):
        """A square weight would otherwise be transposed silently."""
        tree = {"one": {"weight": jnp.ones(shape)}, "two": {"weight": 1.0}}
        config = ql.QLoRAConfig(rank=2, fmt=fmt, targets="one/weight")
        for function in (ql.quantize, functools.partial(ql.init, KEY)):
            match = r"one/weight: `contract` must say .*\[out, in\].*Got None"
            with pytest.raises(ValueError, match=match):
                function(tree, config)

    def test_packed_weights_state_their_axes_and_those_of_haiku_are_known(self):
        packed = {"weight": ql.quantize(jnp.ones((32, 64)), contract="nk")}
        for tree in (packed, {"w": jnp.ones((64, 32))}):
            (lora,) = init(tree, rank=2, targets="w(eight)?")[1].values()
            assert lora.a.shape == (64, 2)

    @pytest.mark.slow
    @pytest.mark.parametrize("contract", [-1, "nk"])
    def test_kernels_that_are_stored_out_by_in(self, contract):
        w = params()["stack"]["kernel"]
        tree = {"one": {"weight": w[0].T}, "stack": {"weight": w.swapaxes(1, 2)}}
        contracts = {".*/weight": contract}
        base, lora = trees(tree, rank=4, targets=".*weight", contract=contracts)
        want = ql.quantize(w)
        np.testing.assert_array_equal(base["stack"]["weight"].codes, want.codes)
        np.testing.assert_array_equal(base["one"]["weight"].codes, want.codes[0])
        assert base["one"]["weight"].shape == (32, 64)
        assert lora["stack"]["weight"].a.shape == (3, 64, 4)
        assert lora["one"]["weight"].b.shape == (4, 32)
        q = ql.quantize(tree["stack"]["weight"], contract=contract)
        np.testing.assert_array_equal(q.codes, want.codes)
        merged = ql.merge(base, lora)["one"]["weight"]
        assert merged.shape == (32, 64)
        x = normal(0, (2, 64))
        got = ql.apply(base["one"], lora["one"], x)
        assert_close(got, x @ merged.T)

    @pytest.mark.slow
    def test_adapters_larger_than_their_kernels_are_refused(self):
        tree = {"head": {"kernel": jnp.ones((64, 1))}, **params()}
        shape = "head/kernel: shape (64, 1) with axes 'kn' (b batch, k contracted, n ou"

        def refuse():
            return init(tree, donate=True)

        assert "stack" not in refusal(refuse, "larger than their kernels", shape)
        heads = {"o": {"kernel": jnp.ones((8, 16, 64))}}
        match = r"o/kernel: shape .* is \[16, 64\] in matr"
        with pytest.raises(ValueError, match=match):
            init(heads, block_size=16)
        for settings in ({"contract": (-3, -2)}, {"rank_pattern": {"o/.*": 16}}):
            init(heads, block_size=16, **settings)
        _, lora = init(tree, rank=4, rank_pattern={"head/.*": 1})
        assert lora["head"]["kernel"].rank == 1


class TestFunctions:
    def test_quantize_and_dequantize_a_tree(self):
        tree = params()
        base = ql.quantize(tree, ql.QLoRAConfig())
        floats = ql.dequantize(base)
        want = ql.dequantize(ql.quantize(tree["stack"]["kernel"]))
        np.testing.assert_array_equal(floats["stack"]["kernel"], want)
        np.testing.assert_array_equal(floats["norm"]["scale"], tree["norm"]["scale"])
        # The result and its structure are those of merging adapters with B = 0.
        merged = ql.merge(*init(tree))
        chex.assert_trees_all_equal(merged, floats)
        chex.assert_trees_all_equal_structs(merged, floats, tree)
        low = ql.dequantize(base, jnp.bfloat16)["stack"]["kernel"]
        assert low.dtype == jnp.bfloat16

    def test_apply_is_a_dense_layer(self):
        base, lora = trees(rank=4, alpha=8)
        layer, adapter = base["layers"][0]["q_proj"], lora["layers"]["0"]["q_proj"]
        x = normal(3, (2, 5, 64))
        w, a, b, bias, wide = (
            np.asarray(v, np.float64)
            for v in (ql.dequantize(layer["kernel"]), *jax.tree.leaves(adapter),
                      layer["bias"], x)
        )  # fmt: skip
        want = wide @ w + 2.0 * wide @ a @ b + bias
        for run in (ql.apply, jax.jit(ql.apply)):
            assert_close(run(layer, adapter, x), want)
        cached = ql.apply(ql.dequantize(layer), adapter, x)
        assert_close(cached, want)
        assert ql.apply(layer, None, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16

    @pytest.mark.slow
    @pytest.mark.parametrize("rows", [(1,), (3,), (5,), (3, 3)])
    def test_apply_adds_each_kernel_of_a_stack_its_own_bias(self, rows):
        tree = {"kernel": normal(0, (3, 64, 32)), "bias": normal(1, (3, 32))}
        base, lora = trees(tree, rank=2)
        x, bias = normal(2, (3, *rows, 64)), np.asarray(tree["bias"])
        merged = np.asarray(ql.merge(base, lora)["kernel"], np.float64)
        products = [np.asarray(x[i]) @ merged[i] for i in range(3)]
        want = [y + bias[i] for i, y in enumerate(products)]
        assert_close(ql.apply(base, lora, x), want)
        one_bias = {**base, "bias": base["bias"][0]}
        want = [y + bias[0] for y in products]
        assert_close(ql.apply(one_bias, lora, x), want)

    @pytest.mark.slow
    def test_apply_drops_out_only_with_a_key(self):
        base, lora = trees(rank=4, dropout=0.5)
        layer, adapter = base["layers"][0]["q_proj"], lora["layers"]["0"]["q_proj"]

        def run(key):
            return ql.apply(layer, adapter, jnp.ones((3, 64)), dropout_key=key)

        off, on = run(None), run(jax.random.key(0))
        assert not np.allclose(on, off)
        np.testing.assert_array_equal(run(jax.random.PRNGKey(0)), on)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_merge_adds_the_adapters_and_keeps_the_dtype(self, dtype):
        base, lora = trees(params(jnp.dtype(dtype)), rank=4, alpha=8)
        merged = ql.merge(base, lora)
        assert jax.tree.structure(merged) == jax.tree.structure(params())
        q, adapter = base["stack"]["kernel"], lora["stack"]["kernel"]
        arrays = ql.dequantize(q), adapter.a, adapter.b
        w, a, b = (np.asarray(x, np.float64) for x in arrays)
        want = w + 2.0 * a @ b
        kernel = merged["stack"]["kernel"]
        assert kernel.dtype == jnp.dtype(dtype)
        assert_close(kernel, np.asarray(want, np.float64), terms=64)
        np.testing.assert_array_equal(ql.merge(q, adapter), kernel)  # one kernel

    @pytest.mark.slow
    def test_requantizing_packs_again_and_says_what_it_costs(self):
        base, lora = trees(fmt="int4", block_size=32)
        with pytest.warns(UserWarning, match=r"requantizing moved .* up to 9\.\d%"):
            packed = ql.merge(base, lora, requantize=True)
        q = packed["stack"]["kernel"]
        assert (q.fmt, q.block_size, q.double_quant) == ("int4", 32, True)
        merged = ql.merge(base, lora)["stack"]["kernel"]
        want = ql.quantize(merged, "int4", block_size=32)
        np.testing.assert_array_equal(q.codes, want.codes)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            jax.jit(lambda b, l: ql.merge(b, l, requantize=True))(base, lora)

    def test_requantizing_names_all_adapters_that_diverged(self):
        base, lora = init(rank=2)
        lora["layers"] = jax.tree.map(lambda x: x * jnp.nan, lora["layers"])
        words = [f"{path}: weights must be finite" for path in KERNELS[:2]]

        def run():
            return ql.merge(base, lora, requantize=True)

        assert "stack" not in refusal(run, "cannot be packed", *words)

    @pytest.mark.slow
    def test_requantizing_packs_what_was_trained(self):
        base, lora = trees(rank=2, freeze_base=False, fmt="int4")
        del lora["layers"]
        with pytest.warns(UserWarning, match="requantizing moved"):
            packed = ql.merge(base, lora, requantize=True)

        def codes(w):
            return ql.quantize(w, "int4").codes

        merged = ql.merge(base, lora)["stack"]["kernel"]
        np.testing.assert_array_equal(packed["stack"]["kernel"].codes, codes(merged))
        first = params()["layers"][0]["q_proj"]["kernel"]
        want = codes(ql.dequantize(ql.quantize(first, "int4")))
        got = packed["layers"][0]["q_proj"]["kernel"]
        np.testing.assert_array_equal(got.codes, want)

    @pytest.mark.parametrize("fmt", ["nf4", "int4_f16", "mxfp4", "nvfp4"])
    def test_requantizing_keeps_trained_kernels_without_an_adapter(self, fmt):
        """Their decoded weights would be packed to other codes or scales."""
        weights = {"kernel": normal(0, (256, 64))}
        base, _ = init(weights, fmt=fmt, freeze_base=False)
        got = ql.merge(base, {}, requantize=True)["kernel"]
        assert_same(got, ql.quantize(weights["kernel"], fmt))

    @pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e20, 1e38])
    def test_the_changes_by_requantizing_have_any_size(self, size):
        """Neither overflows or underflows in float32."""
        weights = {"kernel": normal(0, (256, 64)) / 8 * size}
        base, lora = init(weights, rank=2, double_quant=False)
        a, b = normal(1, (256, 2)), normal(2, (2, 64), scale=size / 16)
        lora["kernel"] = dataclasses.replace(lora["kernel"], a=a, b=b)
        before, after = (ql.dequantize(base["kernel"]), ql.merge(base, lora)["kernel"])
        with pytest.warns(UserWarning, match="requantizing moved") as record:
            packed = ql.merge(base, lora, requantize=True)["kernel"]
        arrays = before, after, ql.dequantize(packed)
        before, after, rounded = (np.asarray(x, np.float64) for x in arrays)
        changes = [np.linalg.norm(x - after) for x in (rounded, before)]
        percents = re.findall(r"up to (\S+)%", str(record[0].message))
        want = [100 * change / np.linalg.norm(after) for change in changes]
        assert [*map(float, percents)] == pytest.approx(want, rel=0.06)

    @pytest.mark.parametrize("shape", [(0, 4), (64, 0), (2, 0, 4)])
    def test_empty_kernels(self, shape):
        base, lora = trees({"kernel": jnp.zeros(shape)}, rank=2)
        x = jnp.ones((*shape[:-2], 3, shape[-2]))
        want = np.zeros((*x.shape[:-1], shape[-1]))
        np.testing.assert_array_equal(ql.apply(base, lora, x), want)
        assert ql.merge(base, lora)["kernel"].shape == shape


def vmapped(fn, *args):
    return jax.vmap(fn)(*args)


def scanned(fn, *args):
    return jax.lax.scan(lambda _, xs: (None, fn(*xs)), None, args)[1]


BATCH_AXES = [
    ("bkn", (3, 64, 8), {}),
    ("bknn", (3, 64, 2, 4), {"fmt": "nvfp4"}),
    ("bkn", (3, 64, 8), {"fmt": None}),
    ("bkn", (3, 64, 8), {"freeze_base": False}),
    ("bnk", (3, 8, 64), {"use_dora": True}),
    ("kbn", (64, 3, 8), {}),
]


@pytest.mark.parametrize("over", [vmapped, scanned])
def test_shapes_of_slices_of_a_kernel_that_names_its_batch_axis(over):
    base, lora = init({"kernel": jnp.ones((3, 64, 2, 4))}, contract="bknn")
    arguments = base["kernel"], lora["kernel"], jnp.ones((3, 5, 64))
    y = jax.eval_shape(functools.partial(over, ql.apply), *arguments)
    assert y.shape == (3, 5, 2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("over", [vmapped, scanned])
@pytest.mark.parametrize(("contract", "shape", "settings"), BATCH_AXES)
def test_slices_of_a_kernel_that_names_its_batch_axis(over, contract, shape, settings):
    base, lora = trees(
        {"kernel": normal(0, shape)}, rank=2, contract=contract, **settings
    )
    base, lora, x = base["kernel"], lora["kernel"], normal(1, (3, 5, 64))
    merged, decoded = ql.merge(base, lora), ql.dequantize(base)
    assert merged.shape == shape
    axes = {"bnk": (0, 2, 1), "kbn": (1, 0, 2)}.get(contract, (*range(len(shape)),))
    matrices = np.transpose(merged, axes).reshape(3, 64, 8)
    got = over(ql.apply, base, lora, x).reshape(3, 5, 8)
    assert_close(got, x @ matrices, terms=64)
    batch = contract.index("b")  # a slice of the kernel lacks this axis
    for got, want in [
        (over(ql.dequantize, base), decoded),
        (over(ql.merge, base, lora), merged),
    ]:
        assert_close(got, np.moveaxis(want, batch, 0), terms=64)
    if settings.get("fmt", "nf4") is not None:
        packed = over(functools.partial(ql.merge, requantize=True), base, lora)
        with pytest.warns(UserWarning, match="requantizing moved"):
            want = ql.merge(base, lora, requantize=True)
        np.testing.assert_array_equal(packed.codes, want.codes)
    if len(shape) == 3:
        rows = over(lambda q: ql.lookup(q, None, jnp.array([2, 0])), base)
        np.testing.assert_array_equal(rows, np.moveaxis(decoded, batch, 0)[:, [2, 0]])


def square_of_other_axes():
    """Returns a kernel, and an adapter of the same kernel stored transposed."""
    square = {"kernel": jnp.ones((64, 64))}
    _, transposed = init(square, contract="nk")
    return ql.quantize(square, ql.QLoRAConfig()), transposed


def wrong_bias(bias, kernel=(64, 2, 4), contract=-3, x=(3, 64)):
    layer = {"kernel": jnp.ones(kernel), "bias": jnp.ones(bias)}
    ql.apply(layer, None, jnp.ones(x), contract=contract)


STACK_X = jnp.ones((3, 2, 64))
ONE_LAYER_MESSAGE = "`lora` must be one layer's"
REFUSED = [
    (lambda b, l: ql.init(KEY, params(), {"rank": 4}), TypeError,
     "`config` must be a QLoRAConfig. Got dict"),
    (lambda b, l: ql.quantize(params(), {"rank": 4}), TypeError,
     "`fmt` must be a format's name or a QLoRA"),
    (lambda b, l: ql.quantize(b["stack"]["kernel"]), TypeError,
     "a floating-point array: .* Got QTensor"),
    (lambda b, l: ql.quantize(params()), TypeError,
     "a tree must be given with a QLoRAConfig"),
    *(
        (lambda b, l, options=options: ql.quantize(b, ql.QLoRAConfig(), **options),
         ValueError, "must not be given with a config")
        for options in ({"block_size": 32}, {"double_quant": False}, {"contract": -3})
    ),
    (lambda b, l: ql.dequantize(b["stack"]["kernel"], jnp.int8), TypeError,
     "`dtype` must be floating-point. Got int8"),
    (lambda b, l: ql.dequantize(ql.combine(b, l)), TypeError,
     "must not hold adapters: use merge"),
    (lambda b, l: ql.apply({**b["stack"], "gate": jnp.ones(3)}, None, STACK_X),
     ValueError, "must have a 'kernel' .* and at most a 'bias'"),
    (lambda b, l: ql.apply(b["layers"][0]["q_proj"], None, jnp.ones((2, 63))),
     ValueError, r"`x` must end in axes \(64,\). Got"),
    (lambda b, l: ql.apply(b["stack"], None, STACK_X.astype(int)), TypeError,
     "`x` must be floating-point. Got int32"),
    (lambda b, l: ql.apply(b["stack"], l, STACK_X), ValueError,
     ONE_LAYER_MESSAGE),
    (lambda b, l: ql.apply(b["stack"], l["layers"], STACK_X), ValueError,
     ONE_LAYER_MESSAGE),
    (lambda b, l: ql.apply(b["stack"], {"kernels": None}, STACK_X), ValueError,
     ONE_LAYER_MESSAGE),
    (lambda b, l: ql.apply(b["stack"], l["layers"]["0"]["q_proj"], STACK_X),
     ValueError, "`lora` must be the adapter of the ker"),
    (lambda b, l: ql.merge(*square_of_other_axes()), ValueError,
     "has axes 'kn' .* was made for 'nk'"),
    *(
        (lambda b, l, shape=shape: wrong_bias(shape), ValueError,
         r"bias must have shape \(2, 4\)\. Got")
        for shape in [(4, 2), (8,), (1, 2, 4)]
    ),
    (lambda b, l: wrong_bias((3, 8), (5, 64, 8), -2, (5, 3, 64)), ValueError,
     r"\(8,\) or \(5, 8\)\. Got \(3, 8\)"),
    *(
        (lambda b, l, call=call: call(b, {**l, "else": l["stack"]}), ValueError,
         r"without a kernel at \['else/kernel")
        for call in (ql.merge, ql.combine)
    ),
    *(
        (lambda b, l, call=call: call(ql.combine(b, l), l), TypeError,
         f"`split` a combined tree.*{re.escape(str(KERNELS))}")
        for call in (ql.merge, ql.combine)
    ),
    (lambda b, l: ql.summary(ql.combine(b, l), l), TypeError,
     "`base` must not be combined if `lora` is"),
]  # fmt: skip


@pytest.fixture(scope="module")
def both_trees():
    return init()


class TestRefused:
    @pytest.mark.parametrize(("call", "error", "words"), REFUSED)
    def test_bad_arguments(self, call, error, words, both_trees):
        with pytest.raises(error, match=words):
            call(*both_trees)

    @pytest.mark.parametrize("function", [ql.merge, ql.combine])
    def test_adapters_that_do_not_fit(self, function, both_trees):
        base, lora = both_trees
        lora = {**lora, "stack": lora["layers"]["0"]["q_proj"]}
        shapes = "A must be [3, 64, 'r'] and B [3, 'r', 32]. Got [64, 16] and [16, 24]."
        words = "do not fit their kernels", f"stack/kernel: {shapes}"
        refusal(lambda: function(base, lora), *words)

    def test_trees_restored_without_their_structure(self, both_trees):
        base, lora = both_trees
        q, adapter = base["stack"]["kernel"], lora["stack"]["kernel"]
        names = ("codes", "scales", "scale_scales", "scale_offset")
        lost = {"stack": {"kernel": {name: getattr(q, name) for name in names}}}
        lost_lora = {"stack": {"kernel": {"a": adapter.a, "b": adapter.b}}}
        for run in (
            lambda: ql.merge({**base, **lost}, lora),
            lambda: ql.combine({**base, **lost}, lora),
            lambda: ql.dequantize({**base, **lost}),
            lambda: ql.merge(base, {**lora, **lost_lora}),
        ):
            message = "stack/kernel: an array for each of"
            refusal(run, "without its structure", message)


class TestOneTree:
    def test_labels_and_mask_name_every_array(self):
        base, lora = init()
        tree = ql.combine(base, lora)
        labels, mask = ql.lora_labels(tree), ql.lora_mask(tree)
        assert jax.tree.structure(labels) == jax.tree.structure(tree)

        def count(tree, value):
            return sum(x == value for x in jax.tree.leaves(tree))

        assert count(labels, "lora") == len(jax.tree.leaves(lora)) == count(mask, True)
        assert count(labels, "frozen") == len(jax.tree.leaves(base))
        kernel = labels["stack"]["kernel"]
        assert (kernel.base.codes, kernel.lora.a) == ("frozen", "lora")
        assert labels["norm"]["scale"] == "frozen" and not mask["norm"]["scale"]
        assert {*jax.tree.leaves(ql.lora_labels(lora))} == {"lora"}
        assert {*jax.tree.leaves(ql.lora_labels(base))} == {"frozen"}
        tree = ql.combine(*init(freeze_base=False))
        assert count(ql.lora_labels(tree), "kernel") == len(KERNELS)
        assert count(ql.lora_mask(tree), True) == 3 * len(KERNELS)


class TestStraightThrough:
    config = ql.QLoRAConfig(freeze_base=False)

    @pytest.mark.slow
    def test_the_forward_pass_sees_rounded_weights(self):
        """XLA may drop a cast to bfloat16 and back in a compiled program."""
        base = ql.quantize(params(jnp.bfloat16), self.config)["stack"]
        want = dequantize(ql.quantize(base["kernel"])).astype(np.float32)
        eye = jnp.broadcast_to(jnp.eye(64), (3, 64, 64))
        _, lora = init({"kernel": base["kernel"].kernel}, freeze_base=False)
        for run in (
            lambda base: ql.apply(base, None, eye),
            lambda base: ql.dequantize(base, jnp.float32)["kernel"],
            lambda base: ql.merge(base, lora)["kernel"].astype(jnp.float32),
        ):
            np.testing.assert_array_equal(jax.jit(run)(base), want)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_the_gradient_passes_the_quantizer_in_the_kernels_dtype(self, dtype):
        base = ql.quantize(params(dtype), self.config)["stack"]
        x = jnp.broadcast_to(jnp.arange(64.0) / 64, (3, 2, 64))

        def loss(base):
            return jnp.sum(ql.apply(base, None, x))

        got = jax.grad(loss)(base)["kernel"].kernel
        assert got.dtype == dtype
        want = np.broadcast_to(2 * np.arange(64)[:, None] / 64, (3, 64, 32))
        np.testing.assert_array_equal(np.asarray(got, np.float32), want)

    def test_packing_takes_the_settings_they_were_trained_in(self):
        base = ql.quantize(params(), self.config)
        config = ql.QLoRAConfig(fmt="int4", block_size=32, targets=".*q_proj/kernel")
        settings = "Packing(fmt={!r}, block_size={}, double_quant=True)".format
        both = f"{settings('nf4', 64)}; the config has {settings('int4', 32)}"
        words = [f"{path}: it is trained through" for path in KERNELS[:2]]

        def run():
            return ql.quantize(base, config, donate=True)

        assert "stack" not in refusal(run, TARGETS, both, *words)

    @pytest.mark.slow
    @pytest.mark.parametrize("freeze_base", [True, False])
    def test_packing_takes_float_targets_too(self, freeze_base):
        tree = {"new": {"kernel": jnp.ones((64, 4))}}
        tree["old"] = ql.quantize(tree["new"], self.config)
        packed = ql.quantize(tree, ql.QLoRAConfig(freeze_base=freeze_base))
        for name in tree:
            assert isinstance(packed[name]["kernel"], ql.QTensor)

    def test_kernels_that_diverged_are_named_before_any_is_packed(self):
        base = ql.quantize(params(), self.config)
        for layer in base["layers"]:
            layer["q_proj"]["kernel"] = jax.tree.map(
                lambda w: w.at[3, 5].set(jnp.nan), layer["q_proj"]["kernel"]
            )
        words = [f"{path}: weights must be finite" for path in KERNELS[:2]]
        refusal(lambda: ql.quantize(base, self.config, donate=True), TARGETS, *words)
        assert not any(is_deleted(base))

    @pytest.mark.parametrize(
        "settings",
        [{"fmt": "int4"}, {"block_size": 32}, {"double_quant": False},
         {"contract": "nk"}],
    )  # fmt: skip
    def test_one_kernel_needs_the_settings_it_was_trained_in(self, settings):
        kernel = ql.quantize(params(), self.config)["stack"]["kernel"]
        refusal(
            lambda: ql.quantize(kernel, **settings),
            "Packing(fmt='nf4', block_size=64, double_quant=True) and axes 'kn'",
            f"Got {settings}",
        )
        same = ql.quantize(kernel, "nf4", block_size=64, contract=(-2,))
        np.testing.assert_array_equal(same.codes, ql.quantize(kernel).codes)

    def test_one_kernel_packs_by_the_same_function(self):
        kernel = ql.quantize(params(), self.config)["stack"]["kernel"]
        q = ql.quantize(kernel, donate=True)
        want = ql.quantize(params()["stack"]["kernel"])
        np.testing.assert_array_equal(q.codes, want.codes)
        assert kernel.kernel.is_deleted()


class TestSettingsOfJAX:
    """Other settings of JAX must not change results."""

    def results(self, dtype, freeze_base=True):
        base, lora = trees(params(dtype), rank=2, freeze_base=freeze_base)
        layer, adapter = ql.dequantize(base)["stack"], lora["stack"]
        wide = ql.dequantize(base, jnp.float32)["stack"]

        def loss(x, layer):
            return jnp.sum(ql.apply(layer, adapter, x))

        run = jax.value_and_grad(loss)
        outputs = [
            run(jnp.ones((3, 2, 64), x), kind)
            for kind, x in ((wide, jnp.float32), (base["stack"], dtype))
        ]
        return base, lora, layer, wide, outputs, ql.merge(base, lora)

    @pytest.mark.slow
    @pytest.mark.parametrize("freeze_base", [True, False])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_strict_promotion(self, dtype, freeze_base):
        want = self.results(jnp.dtype(dtype), freeze_base)
        with jax.numpy_dtype_promotion("strict"):
            got = self.results(jnp.dtype(dtype), freeze_base)
        assert_same(got, want)

    @pytest.mark.slow
    def test_without_jit(self):
        want = self.results(jnp.float32)
        with jax.disable_jit():
            got = self.results(jnp.float32)
        assert_close(got, want)


def row_of_the_stack(summary):
    line = next(row for row in str(summary).splitlines() if "stack/kernel" in row)
    return line.split()[1:]


class TestSummary:
    def test_totals_are_the_buffers_bytes(self):
        tree = params()
        base, lora = init(tree, rank=4)
        summary = ql.summary(base, lora)

        def bytes_of(tree):
            return sum(x.nbytes for x in jax.tree.leaves(tree))

        assert summary.float_bytes == bytes_of(tree)
        assert summary.base_bytes == bytes_of(base)
        assert summary.lora_bytes == bytes_of(lora)
        assert summary.trainable_params == sum(x.size for x in jax.tree.leaves(lora))
        assert str(ql.summary(ql.combine(base, lora))) == str(summary)
        shapes = jax.eval_shape(lambda: init(rank=4))
        assert str(ql.summary(*shapes)) == str(summary)
        # 3 * (1024 bytes of codes, 32 of scale codes, one scale of scales, one mean)
        want = ["[3,64,32]", "nf4", "4.156", "3,192", "no"]
        assert row_of_the_stack(summary) == want

    def test_leaves_that_are_not_arrays_are_named(self):
        base, lora = init({"eps": 1e-5, **params()}, rank=4)
        with pytest.raises(TypeError, match="Got float at 'eps'"):
            ql.summary(base, lora)

    def test_kernels_that_are_trained_say_so(self):
        summary = ql.summary(*init(rank=4, freeze_base=False))
        want = ["[3,64,32]", "float32", "through", "nf4", "32.000", "24,576", "yes"]
        assert row_of_the_stack(summary) == want
        kernels = 3 * 64 * 32 + 2 * 64 * 24
        adapters = 4 * (3 * (64 + 32) + 2 * (64 + 24))
        assert summary.trainable_params == kernels + adapters
