"""Trees: what is chosen, what is refused, and which functions are inverses."""

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
from helpers import close, dequantize, relative_error

import qlora_jax as ql
from qlora_jax.adapters.base import why_not
from qlora_jax.quant import pack as kernel_module
from qlora_jax.trees import quantize as quantize_module


def params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return {
        "embed": {"embedding": normal(11, 64)},
        "layers": [
            {"q_proj": {"kernel": normal(64, 24), "bias": normal(24)}},
            {"q_proj": {"kernel": normal(64, 24), "bias": normal(24)}},
        ],
        "stack": {"kernel": normal(3, 64, 32)},
        "norm": {"scale": normal(64)},
    }


def trained(lora, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), lora)


KERNELS = ["layers/0/q_proj/kernel", "layers/1/q_proj/kernel", "stack/kernel"]


def paths(tree):
    is_node = lambda x: isinstance(x, ql.QTensor | ql.LoRA | ql.AdaptedKernel)
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_node)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in flat}


class TestInit:
    def test_packs_and_adapts_the_targets_and_nothing_else(self):
        tree = params()
        base, lora = ql.init(jax.random.key(0), tree, ql.QLoRAConfig(rank=4))
        packed = [p for p, x in paths(base).items() if isinstance(x, ql.QTensor)]
        assert packed == KERNELS and sorted(paths(lora)) == KERNELS
        assert base["norm"]["scale"] is tree["norm"]["scale"]
        assert paths(lora)["stack/kernel"].a.shape == (3, 64, 4)

    def test_every_adapter_has_a_key_of_its_own(self):
        _, lora = ql.init(jax.random.key(0), params(), ql.QLoRAConfig(rank=4))
        first, second = (lora["layers"][i]["q_proj"]["kernel"].a for i in "01")
        assert not np.array_equal(first, second)

    def test_patterns_of_targets_ranks_and_alphas(self):
        config = ql.QLoRAConfig(
            targets=["layers/.*kernel", "stack/.*"],
            exclude=r"layers/1/.*",
            rank=4,
            rank_pattern={"stack/.*": 2},
            alpha_pattern={"layers/0/.*": 8},
        )
        _, lora = ql.init(jax.random.key(0), params(), config)
        found = {p: (x.rank, x.scaling) for p, x in paths(lora).items()}
        assert found == {KERNELS[0]: (4, 2.0), KERNELS[2]: (2, 1.0)}

    @pytest.mark.slow
    def test_adapters_of_bfloat16_weights_are_float32(self):
        """qwix 0.1.8 gives them the dtype of the weights."""
        base, lora = ql.init(jax.random.key(0), params(jnp.bfloat16), ql.QLoRAConfig())
        assert {x.dtype for x in jax.tree.leaves(lora)} == {jnp.dtype("float32")}
        config = ql.QLoRAConfig(lora_dtype="bfloat16")
        _, lora = ql.init(jax.random.key(0), params(), config)
        assert {x.dtype for x in jax.tree.leaves(lora)} == {jnp.dtype("bfloat16")}

    def test_a_pattern_that_matches_nothing_is_refused(self):
        with pytest.raises(ValueError, match="`targets` must match at least one leaf"):
            ql.init(jax.random.key(0), params(), ql.QLoRAConfig(targets="q_proj"))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"targets": [".*/kernel", "typo"]}, "must match a leaf. Got ['typo'],"),
            ({"exclude": ["norm/.*", "typo"]}, "must match a leaf. Got ['typo'],"),
            ({"rank_pattern": {"typo": 2}}, "must match a target. Got ['typo'],"),
            (
                {"alpha_pattern": {"norm/.*": 2}},
                "must match a target. Got ['norm/.*'],",
            ),
            ({"contract": {"typo": -3}}, "must match a target. Got ['typo'],"),
        ],
    )
    def test_each_single_pattern_must_match(self, settings, message):
        config = ql.QLoRAConfig(**settings)
        for function in (ql.quantize, functools.partial(ql.init, jax.random.key(0))):
            with pytest.raises(ValueError, match=re.escape(message)):
                function(params(), config)

    def test_all_leaves_that_cannot_be_targets_are_named(self):
        tree = params()
        tree["counter"] = {"kernel": jnp.ones((64, 2), jnp.int32)}
        tree["layers"][1]["q_proj"]["kernel"] = jnp.full((64, 24), jnp.nan)
        tree["narrow"] = {"kernel": jnp.ones((64, 2), jnp.float8_e4m3fn)}
        tree["shape"] = {"kernel": jax.ShapeDtypeStruct((64, 2), jnp.float32)}
        tree["both"] = {"kernel": ql.AdaptedKernel(jnp.ones((64, 2)), None)}
        with pytest.raises(ValueError, match="these leaves cannot be targets") as error:
            ql.init(jax.random.key(0), tree, ql.QLoRAConfig(targets=".*(kernel|scale)"))
        message = str(error.value)
        assert "counter/kernel: weights must be a floating-point array" in message
        assert "layers/1/q_proj/kernel: weights must be finite" in message
        assert "norm/scale: weights must have at least 2 axes" in message
        assert "narrow/kernel: weights must be a floating-point array: one" in message
        assert "shape/kernel: weights must be arrays. Got a ShapeDtypeStruct" in message
        assert "both/kernel: it is a kernel already. Got AdaptedKernel" in message
        assert "layers/0" not in message

    def test_donating_deletes_targets_and_keeps_the_rest(self):
        tree = params()
        want, _ = ql.init(jax.random.key(0), params(), ql.QLoRAConfig())
        base, _ = ql.init(jax.random.key(0), tree, ql.QLoRAConfig(), donate=True)
        deleted = {p: x.is_deleted() for p, x in paths(tree).items()}
        assert [p for p, gone in deleted.items() if gone] == KERNELS
        chex.assert_trees_all_equal(base, want)

    def test_nothing_is_donated_when_a_leaf_is_refused(self):
        tree = params()
        tree["stack"]["kernel"] = jnp.full((3, 64, 32), jnp.inf)
        with pytest.raises(ValueError, match="stack/kernel"):
            ql.init(jax.random.key(0), tree, ql.QLoRAConfig(), donate=True)
        assert not any(x.is_deleted() for x in jax.tree.leaves(tree))

    @pytest.mark.parametrize("function", ["init", "quantize", "pack what was trained"])
    def test_memory_peaks_at_the_float_tree_and_one_leaf(self, function, monkeypatch):
        """Kernels are freed one by one, though the caller holds the tree."""
        config = ql.QLoRAConfig(rank=4)
        tree = params()
        run = lambda: ql.quantize(tree, config, donate=True)
        if function == "init":
            run = lambda: ql.init(jax.random.key(0), tree, config, donate=True)[0]
        elif function != "quantize":
            tree = ql.quantize(tree, ql.QLoRAConfig(freeze_base=False))
        want = jax.tree.leaves(ql.quantize(tree, config))
        del tree["embed"]  # kernels are most of the rest
        leaves = [x for x in jax.tree.leaves(tree) if x.ndim > 1]
        sizes = [x.nbytes for x in leaves]
        smallest = min(sizes)  # adapters are smaller
        floats = lambda: sum(
            x.nbytes for x in jax.live_arrays() if x.nbytes >= smallest
        )
        gc.collect()  # arrays in cycles, of earlier tests
        seen, started = [], floats()
        pack = quantize_module.quantize_checked

        def spy(*args):
            seen.append(([x.is_deleted() for x in leaves], started - floats()))
            return pack(*args)

        monkeypatch.setattr(quantize_module, "quantize_checked", spy)
        got = jax.tree.leaves(run())
        assert len(seen) == len(leaves) == 3
        for turn, (deleted, freed) in enumerate(seen):
            assert deleted == [i < turn for i in range(3)]
            assert freed == sum(sizes[:turn])
        for a, b in zip(got, want[1:], strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.slow
    @pytest.mark.parametrize("alias", [lambda x: x, jax.device_put, jnp.asarray])
    def test_donating_an_array_at_two_paths_is_refused(self, alias):
        config, key = ql.QLoRAConfig(), jax.random.key(0)
        tree = params()
        tree["tied"] = {"kernel": alias(tree["stack"]["kernel"])}
        tree["spare"] = jax.device_put(
            tree["layers"][1]["q_proj"]["kernel"], jax.devices()[0]
        )
        trained = ql.quantize(tree, ql.QLoRAConfig(freeze_base=False))
        for run in (
            lambda: ql.init(key, tree, config, donate=True),
            lambda: ql.quantize(tree, config, donate=True),
            lambda: ql.quantize(trained, config, donate=True),
        ):
            with pytest.raises(
                ValueError, match="where leaves share an array"
            ) as error:
                run()
            assert "['stack/kernel', 'tied/kernel']" in str(error.value)
            assert "['layers/1/q_proj/kernel', 'spare']" in str(error.value)
            assert not any(x.is_deleted() for x in jax.tree.leaves(tree))
        base, _ = ql.init(key, tree, config)
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
        check = lambda w, limit: calls.append(w.shape) or True
        monkeypatch.setattr(kernel_module, "all_below", check)
        ql.init(jax.random.key(0), params(), ql.QLoRAConfig())
        assert calls == [(64, 24), (64, 24), (3, 64, 32)]
        del calls[:]
        trained = ql.quantize(params(), ql.QLoRAConfig(freeze_base=False))
        ql.quantize(trained, ql.QLoRAConfig())
        assert calls == 2 * [(64, 24), (64, 24), (3, 64, 32)]
        ql.quantize(jnp.ones((64, 2)))
        assert calls[6:] == [(64, 2)]

    @pytest.mark.slow
    def test_contracted_axes_by_pattern(self):
        tree = {
            "q": {"kernel": jnp.ones((64, 4, 8))},
            "o": {"kernel": jnp.ones((4, 8, 64))},
        }
        config = ql.QLoRAConfig(contract={"q/.*": -3, "o/.*": (-3, -2)}, block_size=16)
        base, lora = ql.init(jax.random.key(0), tree, config)
        assert base["q"]["kernel"].scales.shape == (4, 32)
        assert base["o"]["kernel"].scales.shape == (2, 64)
        assert lora["o"]["kernel"].a.shape == (32, 16)
        x = jnp.ones((5, 64))
        heads = ql.apply(base["q"], lora["q"], x)
        assert heads.shape == (5, 4, 8)
        assert ql.apply(base["o"], lora["o"], heads).shape == (5, 64)

    @pytest.mark.slow
    @pytest.mark.parametrize("transform", [jax.jit, lambda f: jax.jit(f).lower])
    def test_under_jit_and_eval_shape(self, transform):
        run = lambda key, tree: ql.init(key, tree, ql.QLoRAConfig(rank=4))
        eager = run(jax.random.key(0), params())
        shapes = jax.eval_shape(run, jax.random.key(0), params())
        assert jax.tree.structure(shapes) == jax.tree.structure(eager)
        jitted = jax.jit(run)(jax.random.key(0), params())
        chex.assert_trees_all_equal(eager, jitted)

    @pytest.mark.slow
    def test_weights_that_a_trace_closes_over(self):
        """The idiom for restoring a checkpoint."""
        tree, config = params(), ql.QLoRAConfig(rank=4)
        run = lambda: ql.init(jax.random.key(0), tree, config, donate=True)
        shapes = jax.eval_shape(run)
        base, lora = jax.jit(run)()
        assert not any(x.is_deleted() for x in jax.tree.leaves(tree))
        q = jax.jit(lambda: ql.quantize(tree["stack"]["kernel"], donate=True))()
        want = ql.init(jax.random.key(0), tree, config)
        assert jax.tree.structure(shapes) == jax.tree.structure(want)
        for got in (base["stack"]["kernel"], q):
            np.testing.assert_array_equal(got.codes, want[0]["stack"]["kernel"].codes)
        # XLA folds constants: the mean of the scales is summed in another order.
        pairs = zip(*map(jax.tree.leaves, ((base, lora), want)), strict=True)
        assert all(relative_error(a, b) < 1e-5 for a, b in pairs)
        tree["stack"]["kernel"] = np.full((3, 64, 32), np.nan, np.float32)
        with pytest.raises(ValueError, match="stack/kernel: weights must be finite"):
            jax.eval_shape(lambda: ql.quantize(tree, config))

    @pytest.mark.slow
    def test_a_packed_base_gets_adapters(self):
        config = ql.QLoRAConfig(rank=4)
        want, want_lora = ql.init(jax.random.key(0), params(), config)
        for packed in (ql.quantize(params(), config), {**params(), **want}):
            packed["stack"] = want["stack"]
            base, lora = ql.init(jax.random.key(0), packed, config, donate=True)
            assert base["stack"]["kernel"] is want["stack"]["kernel"]
            jax.tree.map(np.testing.assert_array_equal, (base, lora), (want, want_lora))

    @pytest.mark.parametrize("fmt", ["int4", None])
    def test_packed_kernels_of_any_settings_stay_as_they_are(self, fmt):
        tree = params()
        stack = ql.quantize(tree["stack"]["kernel"], "int8", double_quant=False)
        tree["stack"] = {"kernel": stack}
        config = ql.QLoRAConfig(rank=4, fmt=fmt, block_size=32)
        base, lora = ql.init(jax.random.key(0), tree, config)
        assert base["stack"]["kernel"] is stack
        assert why_not(lora["stack"]["kernel"], stack) is None
        _, want = ql.init(jax.random.key(0), params(), config)
        jax.tree.map(np.testing.assert_array_equal, lora, want)
        first = base["layers"][0]["q_proj"]["kernel"]
        assert (first.packing if fmt else None) == config.packing

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"freeze_base": False}, "packed already; `freeze_base` must be True"),
            (
                {"contract": {"stack/.*": "nk"}},
                "with axes 'bkn' (b batch, k contracted",
            ),
        ],
    )
    def test_packed_kernels_that_do_not_fit_the_config_are_refused(
        self, settings, message
    ):
        base = ql.quantize(params(), ql.QLoRAConfig())
        with pytest.raises(ValueError, match="these leaves cannot be targets") as error:
            ql.init(jax.random.key(0), base, ql.QLoRAConfig(**settings))
        assert "stack/kernel: it is packed" in str(error.value)
        assert message in str(error.value)

    @pytest.mark.parametrize("config", [{"rank": 4}, None, "nf4"])
    def test_what_is_no_config_is_refused(self, config):
        name = type(config).__name__
        message = f"`config` must be a QLoRAConfig. Got {name}"
        with pytest.raises(TypeError, match=message):
            ql.init(jax.random.key(0), params(), config)

    def test_a_dict_as_the_format_is_refused(self):
        with pytest.raises(TypeError, match="`fmt` must be a format's name or a QLoRA"):
            ql.quantize(params(), {"rank": 4})

    def test_paths_that_are_spelled_alike_are_refused(self):
        w = jnp.ones((64, 8))
        tree = {"a/b": {"kernel": w}, "a": {"b": {"kernel": 2 * w}}}
        both = "a/b/kernel: ['a']['b']['kernel'] and ['a/b']['kernel']"
        for run in (
            lambda: ql.init(jax.random.key(0), tree, ql.QLoRAConfig()),
            lambda: ql.quantize(tree, ql.QLoRAConfig()),
            lambda: ql.merge(tree, {}),
        ):
            with pytest.raises(ValueError, match="paths must differ") as error:
                run()
            assert both in str(error.value)

    def test_forward_mode_is_refused_by_name(self):
        base, lora = ql.init(jax.random.key(0), params(), ql.QLoRAConfig(rank=4))
        kernel, adapter = base["stack"]["kernel"], lora["stack"]["kernel"]
        x = jnp.ones((3, 2, 64))
        of_float = lambda a: ql.apply(jnp.ones(kernel.shape), a, x)
        for run, at in (
            (lambda a: ql.apply(kernel, a, x), adapter),
            (of_float, adapter),
            (lambda x: ql.apply(kernel, None, x), x),
            (lambda x: ql.matmul(x, kernel), x),
        ):
            with pytest.raises(TypeError, match="in reverse mode: jax.grad"):
                jax.jvp(run, (at,), (at,))
        # As docs/limits.md says.
        with pytest.raises(TypeError, match="forward-mode .* custom_vjp"):
            jax.jvp(jax.jit(of_float), (adapter,), (adapter,))

    def test_the_gradient_of_packed_codes_is_what_docs_quote(self):
        base, _ = ql.init(jax.random.key(0), params(), ql.QLoRAConfig(rank=4))
        quoted = pathlib.Path(__file__).parents[2] / "docs/guides/one_tree.md"
        with pytest.raises(TypeError) as error:
            jax.grad(lambda base: 0.0)(base)
        start = "grad requires real- or complex-valued inputs"
        assert start in str(error.value) and "but got uint8" in str(error.value)
        assert start in quoted.read_text() and "but got uint8" in quoted.read_text()

    def test_a_float_weight_needs_its_axes(self):
        """Square, it would be transposed without a word."""
        for shape in ((64, 64), (32, 64)):
            tree = {"one": {"weight": jnp.ones(shape)}, "two": {"weight": 1.0}}
            for fmt in ("int8", None):
                config = ql.QLoRAConfig(rank=2, fmt=fmt, targets="one/weight")
                match = r"one/weight: `contract` must say .*\[out, in\].*Got None"
                with pytest.raises(ValueError, match=match):
                    ql.init(jax.random.key(0), tree, config)
                with pytest.raises(ValueError, match=match):
                    ql.quantize(tree, config)
        # A packed one states its axes, and Haiku's `w` is [in, out].
        packed = {"weight": ql.quantize(jnp.ones((32, 64)), contract="nk")}
        config = ql.QLoRAConfig(rank=2, targets="w(eight)?")
        _, lora = ql.init(jax.random.key(0), packed, config)
        assert lora["weight"].a.shape == (64, 2)
        _, lora = ql.init(jax.random.key(0), {"w": jnp.ones((64, 32))}, config)
        assert lora["w"].a.shape == (64, 2)

    @pytest.mark.slow
    @pytest.mark.parametrize("contract", [-1, "nk"])
    def test_kernels_that_are_stored_out_by_in(self, contract):
        w = params()["stack"]["kernel"]
        tree = {"one": {"weight": w[0].T}, "stack": {"weight": w.swapaxes(1, 2)}}
        config = ql.QLoRAConfig(
            rank=4, targets=".*weight", contract={".*/weight": contract}
        )
        base, lora = ql.init(jax.random.key(0), tree, config)
        want = ql.quantize(w)
        np.testing.assert_array_equal(base["stack"]["weight"].codes, want.codes)
        np.testing.assert_array_equal(base["one"]["weight"].codes, want.codes[0])
        assert base["one"]["weight"].shape == (32, 64)
        assert lora["stack"]["weight"].a.shape == (3, 64, 4)
        assert lora["one"]["weight"].b.shape == (4, 32)
        q = ql.quantize(tree["stack"]["weight"], contract=contract)
        np.testing.assert_array_equal(q.codes, want.codes)
        merged = ql.merge(base, trained(lora))["one"]["weight"]
        assert merged.shape == (32, 64)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64)), jnp.float32)
        got = ql.apply(base["one"], trained(lora)["one"], x)
        assert relative_error(got, x @ merged.T) < 1e-5

    @pytest.mark.slow
    def test_adapters_larger_than_their_kernels_are_refused(self):
        tree = {"head": {"kernel": jnp.ones((64, 1))}, **params()}
        with pytest.raises(ValueError, match="larger than their kernels") as error:
            ql.init(jax.random.key(0), tree, ql.QLoRAConfig(), donate=True)
        heads = {"o": {"kernel": jnp.ones((8, 8, 64))}}
        with pytest.raises(
            ValueError, match=r"o/kernel: shape .* is \[8, 64\] in matr"
        ):
            ql.init(jax.random.key(0), heads, ql.QLoRAConfig())
        for settings in ({"contract": (-3, -2)}, {"rank_pattern": {"o/.*": 16}}):
            ql.init(jax.random.key(0), heads, ql.QLoRAConfig(**settings))
        text = "head/kernel: shape (64, 1) with axes 'kn' (b batch, k contracted, n out"
        assert text in str(error.value) and "stack" not in str(error.value)
        config = ql.QLoRAConfig(rank=4, rank_pattern={"head/.*": 1})
        _, lora = ql.init(jax.random.key(0), tree, config)
        assert lora["head"]["kernel"].rank == 1


class TestFunctions:
    def test_quantize_and_dequantize_a_tree(self):
        tree = params()
        base = ql.quantize(tree, ql.QLoRAConfig())
        floats = ql.dequantize(base)
        assert jax.tree.structure(floats) == jax.tree.structure(tree)
        want = ql.dequantize(ql.quantize(tree["stack"]["kernel"]))
        np.testing.assert_array_equal(floats["stack"]["kernel"], want)
        np.testing.assert_array_equal(floats["norm"]["scale"], tree["norm"]["scale"])
        assert (
            ql.dequantize(base, jnp.bfloat16)["stack"]["kernel"].dtype == jnp.bfloat16
        )

    def test_dequantize_refuses_adapters(self):
        tree = ql.combine(*ql.init(jax.random.key(0), params(), ql.QLoRAConfig()))
        with pytest.raises(TypeError, match="must not hold adapters: use merge"):
            ql.dequantize(tree)

    def test_apply_is_a_dense_layer(self):
        base, lora = ql.init(
            jax.random.key(0), params(), ql.QLoRAConfig(rank=4, alpha=8)
        )
        lora = trained(lora)
        layer, adapter = base["layers"][0]["q_proj"], lora["layers"]["0"]["q_proj"]
        x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 5, 64)), jnp.float32)
        w = np.asarray(ql.dequantize(layer["kernel"]), np.float64)
        a, b = np.asarray(adapter["kernel"].a), np.asarray(adapter["kernel"].b)
        want = (
            np.asarray(x) @ w + 2.0 * np.asarray(x) @ a @ b + np.asarray(layer["bias"])
        )
        for run in (ql.apply, jax.jit(ql.apply)):
            assert relative_error(run(layer, adapter, x), want) < 1e-5
        cached = ql.apply(ql.dequantize(layer), adapter, x)
        assert relative_error(cached, want) < 1e-5
        assert ql.apply(layer, None, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16

    @pytest.mark.slow
    @pytest.mark.parametrize("rows", [(1,), (3,), (5,), (3, 3)])
    def test_apply_adds_each_kernel_of_a_stack_its_own_bias(self, rows):
        rng = np.random.default_rng(0)
        kernel, bias = rng.normal(size=(3, 64, 32)), rng.normal(size=(3, 32))
        tree = jax.tree.map(jnp.float32, {"kernel": kernel, "bias": bias})
        base, lora = ql.init(jax.random.key(0), tree, ql.QLoRAConfig(rank=2))
        lora = trained(lora)
        x = rng.normal(size=(3, *rows, 64)).astype(np.float32)
        merged = np.asarray(ql.merge(base, lora)["kernel"], np.float64)
        want = [x[i] @ merged[i] + bias[i] for i in range(3)]
        assert relative_error(ql.apply(base, lora, x), want) < 1e-5
        one_bias = {**base, "bias": base["bias"][0]}
        want = [x[i] @ merged[i] + bias[0] for i in range(3)]
        assert relative_error(ql.apply(one_bias, lora, x), want) < 1e-5

    @pytest.mark.slow
    def test_apply_adds_the_bias_of_heads(self):
        rng = np.random.default_rng(0)
        kernel, bias = rng.normal(size=(64, 4, 8)), rng.normal(size=(4, 8))
        tree = jax.tree.map(jnp.float32, {"kernel": kernel, "bias": bias})
        base = ql.quantize(tree, ql.QLoRAConfig(contract={".*": -3}))
        x = rng.normal(size=(5, 64)).astype(np.float32)
        want = np.tensordot(x, ql.dequantize(base)["kernel"], 1) + bias
        assert relative_error(ql.apply(base, {}, x), want) < 1e-5

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_one_kernel_merges_with_one_adapter(self, dtype):
        base, lora = ql.init(
            jax.random.key(0), params(jnp.dtype(dtype)), ql.QLoRAConfig(rank=2)
        )
        lora = trained(lora)
        merged = ql.merge(base["stack"]["kernel"], lora["stack"]["kernel"])
        np.testing.assert_array_equal(merged, ql.merge(base, lora)["stack"]["kernel"])

    @pytest.mark.slow
    def test_apply_drops_out_only_with_a_key(self):
        config = ql.QLoRAConfig(rank=4, dropout=0.5)
        base, lora = ql.init(jax.random.key(0), params(), config)
        lora = trained(lora)
        layer, adapter = base["layers"][0]["q_proj"], lora["layers"]["0"]["q_proj"]
        x = jnp.ones((3, 64))
        off = ql.apply(layer, adapter, x)
        on = ql.apply(layer, adapter, x, dropout_key=jax.random.key(0))
        assert not np.allclose(on, off)
        keys = jax.random.split(jax.random.key(1), 4000)
        run = lambda key: ql.apply(layer, adapter, x, dropout_key=key)
        mean = jnp.mean(jax.lax.map(run, keys, batch_size=500), axis=0)
        assert relative_error(mean, off) < 0.05  # unbiased
        legacy = ql.apply(layer, adapter, x, dropout_key=jax.random.PRNGKey(0))
        np.testing.assert_array_equal(legacy, on)

    def test_apply_refuses_what_is_not_a_dense_layer(self):
        base, lora = ql.init(jax.random.key(0), params(), ql.QLoRAConfig())
        layer = {**base["layers"][0]["q_proj"], "gate": jnp.ones(3)}
        with pytest.raises(
            ValueError, match="must have a 'kernel' .* and at most a 'bias'"
        ):
            ql.apply(layer, None, jnp.ones((2, 64)))
        with pytest.raises(ValueError, match=r"`x` must end in axes \(64,\). Got"):
            ql.apply(base["layers"][0]["q_proj"], None, jnp.ones((2, 63)))
        for wrong in (lora, lora["layers"], {"kernels": None}):
            with pytest.raises(ValueError, match="`lora` must be one layer's"):
                ql.apply(base["stack"], wrong, jnp.ones((3, 2, 64)))

    def test_apply_refuses_a_bias_of_another_shape(self):
        layer = {"kernel": jnp.ones((64, 2, 4))}
        x = jnp.ones((3, 64))
        for shape in ((4, 2), (8,), (3, 2, 4), (1, 2, 4)):
            with pytest.raises(
                ValueError, match=r"bias must have shape \(2, 4\)\. Got"
            ):
                ql.apply({**layer, "bias": jnp.ones(shape)}, None, x, contract=-3)
        stack = {"kernel": jnp.ones((5, 64, 8)), "bias": jnp.ones((3, 8))}
        with pytest.raises(ValueError, match=r"\(8,\) or \(5, 8\)\. Got \(3, 8\)"):
            ql.apply(stack, None, jnp.ones((5, 3, 64)))

    @pytest.mark.parametrize("kind", ["packed", "float", "trained"])
    def test_apply_refuses_integers(self, kind):
        config = ql.QLoRAConfig(freeze_base=kind != "trained")
        base, lora = ql.init(jax.random.key(0), params(), config)
        base = ql.dequantize(base) if kind == "float" else base
        with pytest.raises(TypeError, match="`x` must be floating-point. Got int32"):
            ql.apply(base["stack"], lora["stack"], jnp.ones((3, 2, 64), jnp.int32))

    def test_what_is_no_array_is_refused(self):
        q = ql.quantize(jnp.ones((64, 2)))
        with pytest.raises(TypeError, match="a floating-point array: .* Got QTensor"):
            ql.quantize(q)
        with pytest.raises(TypeError, match="a tree must be given with a QLoRAConfig"):
            ql.quantize({"kernel": jnp.ones((64, 2))})
        with pytest.raises(TypeError, match="`dtype` must be floating-point. Got int8"):
            ql.dequantize(q, jnp.int8)

    def test_settings_with_a_config_are_refused(self):
        for setting in ({"block_size": 32}, {"double_quant": False}, {"contract": -3}):
            with pytest.raises(ValueError, match="must not be given with a config"):
                ql.quantize(params(), ql.QLoRAConfig(), **setting)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_merge_adds_the_adapters_and_keeps_the_dtype(self, dtype):
        base, lora = ql.init(
            jax.random.key(0), params(jnp.dtype(dtype)), ql.QLoRAConfig(rank=4, alpha=8)
        )
        lora = trained(lora)
        merged = ql.merge(base, lora)
        assert jax.tree.structure(merged) == jax.tree.structure(params())
        kernel = merged["stack"]["kernel"]
        adapter = lora["stack"]["kernel"]
        w = np.asarray(ql.dequantize(base["stack"]["kernel"]), np.float32)
        want = w + 2.0 * np.asarray(adapter.a) @ np.asarray(adapter.b)
        assert kernel.dtype == jnp.dtype(dtype)
        assert relative_error(kernel, want) < (1e-6 if dtype == "float32" else 3e-3)

    def test_merging_untrained_adapters_is_dequantizing(self):
        base, lora = ql.init(jax.random.key(0), params(), ql.QLoRAConfig())
        merged, floats = ql.merge(base, lora), ql.dequantize(base)
        chex.assert_trees_all_equal(merged, floats)

    @pytest.mark.slow
    def test_requantizing_packs_again_and_says_what_it_costs(self):
        config = ql.QLoRAConfig(fmt="int4", block_size=32)
        base, lora = ql.init(jax.random.key(0), params(), config)
        lora = trained(lora)
        with pytest.warns(UserWarning, match=r"requantizing moved .* up to 1\d%"):
            packed = ql.merge(base, lora, requantize=True)
        q = packed["stack"]["kernel"]
        assert (q.fmt, q.block_size, q.double_quant) == ("int4", 32, True)
        want = ql.quantize(
            ql.merge(base, lora)["stack"]["kernel"], "int4", block_size=32
        )
        np.testing.assert_array_equal(q.codes, want.codes)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            jax.jit(lambda b, l: ql.merge(b, l, requantize=True))(base, lora)

    def test_requantizing_names_all_adapters_that_diverged(self):
        base, lora = ql.init(jax.random.key(0), params(), ql.QLoRAConfig(rank=2))
        lora["layers"] = jax.tree.map(lambda x: x * jnp.nan, lora["layers"])
        with pytest.raises(ValueError, match="cannot be packed") as error:
            ql.merge(base, lora, requantize=True)
        for path in KERNELS[:2]:
            assert f"{path}: weights must be finite" in str(error.value)
        assert "stack" not in str(error.value)

    @pytest.mark.slow
    def test_requantizing_packs_what_was_trained(self):
        config = ql.QLoRAConfig(rank=2, freeze_base=False, fmt="int4")
        base, lora = ql.init(jax.random.key(0), params(), config)
        del lora["layers"]
        lora = trained(lora)
        with pytest.warns(UserWarning, match="requantizing moved"):
            packed = ql.merge(base, lora, requantize=True)
        merged = ql.merge(base, lora)["stack"]["kernel"]
        first = params()["layers"][0]["q_proj"]["kernel"]
        for got, w in (
            (packed["stack"]["kernel"], merged),
            (
                packed["layers"][0]["q_proj"]["kernel"],
                ql.dequantize(ql.quantize(first, "int4")),
            ),
        ):
            np.testing.assert_array_equal(got.codes, ql.quantize(w, "int4").codes)

    @pytest.mark.parametrize("shape", [(0, 4), (64, 0), (2, 0, 4)])
    def test_empty_kernels(self, shape):
        tree = {"kernel": jnp.zeros(shape)}
        base, lora = ql.init(jax.random.key(0), tree, ql.QLoRAConfig(rank=2))
        lora = trained(lora)
        x = jnp.ones((*shape[:-2], 3, shape[-2]))
        want = np.zeros((*x.shape[:-1], shape[-1]))
        np.testing.assert_array_equal(ql.apply(base, lora, x), want)
        assert ql.merge(base, lora)["kernel"].shape == shape

    def test_an_adapter_without_a_kernel_is_refused(self):
        base, lora = ql.init(jax.random.key(0), params(), ql.QLoRAConfig())
        lora["elsewhere"] = lora["stack"]
        for function in (ql.merge, ql.combine):
            with pytest.raises(ValueError, match=r"Got others at \['elsewhere/kernel"):
                function(base, lora)

    def test_a_combined_tree_is_refused(self):
        base, lora = ql.init(jax.random.key(0), params(), ql.QLoRAConfig())
        for function in (ql.merge, ql.combine):
            with pytest.raises(TypeError, match="`split` a combined tree") as error:
                function(ql.combine(base, lora), lora)
            assert str(KERNELS) in str(error.value)

    def test_adapters_that_do_not_fit_are_refused(self):
        base, lora = ql.init(jax.random.key(0), params(), ql.QLoRAConfig())
        lora["stack"] = lora["layers"]["0"]["q_proj"]
        run = ql.with_float_kernels(lambda params: params)
        for function in (run, ql.merge, ql.combine):
            with pytest.raises(ValueError, match="do not fit their kernels") as error:
                function(base, lora)
            assert (
                "stack/kernel: A must be [3, 64, 'r'] and B [3, 'r', 32]. Got [64, 16] "
                "and [16, 24]." in str(error.value)
            )
        with pytest.raises(ValueError, match="`lora` must be the adapter of the ker"):
            ql.apply(base["stack"], lora["stack"], jnp.ones((3, 2, 64)))
        square = {"kernel": jnp.ones((64, 64))}
        config = ql.QLoRAConfig(contract="nk")
        _, turned = ql.init(jax.random.key(0), square, config)
        with pytest.raises(ValueError, match="has axes 'kn' .* was made for 'nk'"):
            ql.merge(ql.quantize(square, ql.QLoRAConfig()), turned)

    def test_trees_restored_without_their_structure_are_refused(self):
        base, lora = ql.init(jax.random.key(0), params(), ql.QLoRAConfig())
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
            with pytest.raises(ValueError, match="without its structure") as error:
                run()
            assert "stack/kernel: an array for each of" in str(error.value)


class TestOneTree:
    def test_split_inverts_combine(self):
        base, lora = ql.init(jax.random.key(0), params(), ql.QLoRAConfig())
        again = ql.split(ql.combine(base, lora))
        assert jax.tree.structure(again) == jax.tree.structure((base, lora))
        for a, b in zip(
            jax.tree.leaves(again), jax.tree.leaves((base, lora)), strict=True
        ):
            assert a is b

    def test_labels_and_mask_name_every_array(self):
        base, lora = ql.init(jax.random.key(0), params(), ql.QLoRAConfig())
        tree = ql.combine(base, lora)
        labels, mask = ql.lora_labels(tree), ql.lora_mask(tree)
        assert jax.tree.structure(labels) == jax.tree.structure(tree)
        count = lambda tree, value: sum(x == value for x in jax.tree.leaves(tree))
        assert count(labels, "lora") == len(jax.tree.leaves(lora)) == count(mask, True)
        assert count(labels, "frozen") == len(jax.tree.leaves(base))
        kernel = labels["stack"]["kernel"]
        assert (kernel.base.codes, kernel.lora.a) == ("frozen", "lora")
        assert labels["norm"]["scale"] == "frozen" and not mask["norm"]["scale"]
        assert {*jax.tree.leaves(ql.lora_labels(lora))} == {"lora"}
        assert {*jax.tree.leaves(ql.lora_labels(base))} == {"frozen"}
        config = ql.QLoRAConfig(freeze_base=False)
        tree = ql.combine(*ql.init(jax.random.key(0), params(), config))
        assert count(ql.lora_labels(tree), "kernel") == len(KERNELS)
        assert count(ql.lora_mask(tree), True) == 3 * len(KERNELS)


class TestStraightThrough:
    config = ql.QLoRAConfig(freeze_base=False)

    @pytest.mark.slow
    def test_quantizing_afterwards_gives_what_the_forward_pass_saw(self):
        base, lora = ql.init(jax.random.key(0), params(), self.config)
        x = jnp.ones((3, 64))
        layer, adapter = base["layers"][0]["q_proj"], lora["layers"]["0"]["q_proj"]
        seen = ql.apply(layer, adapter, x)
        packed = ql.quantize(base, self.config)["layers"][0]["q_proj"]
        assert isinstance(packed["kernel"], ql.QTensor)
        np.testing.assert_array_equal(
            ql.dequantize(layer)["kernel"], ql.dequantize(packed)["kernel"]
        )
        assert relative_error(ql.apply(packed, adapter, x), seen) < 1e-6

    @pytest.mark.slow
    def test_the_forward_pass_sees_rounded_weights(self):
        """Compiled, a cast to bfloat16 and back is one that XLA may drop."""
        base = ql.quantize(params(jnp.bfloat16), self.config)["stack"]
        want = dequantize(ql.quantize(base["kernel"])).astype(np.float32)
        eye = jnp.broadcast_to(jnp.eye(64), (3, 64, 64))
        _, lora = ql.init(
            jax.random.key(0), {"kernel": base["kernel"].kernel}, self.config
        )
        for run in (
            lambda base: ql.apply(base, None, eye),
            lambda base: ql.dequantize(base, jnp.float32)["kernel"],
            lambda base: ql.merge(base, lora)["kernel"].astype(jnp.float32),
        ):
            np.testing.assert_array_equal(jax.jit(run)(base), want)

    def test_the_gradient_has_the_kernels_dtype(self):
        base = ql.quantize(params(jnp.bfloat16), self.config)["stack"]
        loss = lambda base: jnp.sum(ql.apply(base, None, jnp.ones((3, 2, 64))))
        grads = jax.grad(loss)(base)["kernel"].kernel
        np.testing.assert_array_equal(grads, jnp.full_like(base["kernel"].kernel, 2))

    def test_packing_takes_the_settings_they_were_trained_in(self):
        base = ql.quantize(params(), self.config)
        config = ql.QLoRAConfig(fmt="int4", block_size=32, targets=".*q_proj/kernel")
        with pytest.raises(ValueError, match="these leaves cannot be targets") as error:
            ql.quantize(base, config, donate=True)
        for path in KERNELS[:2]:
            assert f"{path}: it is trained through" in str(error.value)
        settings = "Packing(fmt={!r}, block_size={}, double_quant=True)".format
        both = f"{settings('nf4', 64)}; the config has {settings('int4', 32)}"
        assert both in str(error.value)
        assert "stack" not in str(error.value)

    @pytest.mark.slow
    @pytest.mark.parametrize("freeze_base", [True, False])
    def test_packing_takes_float_targets_too(self, freeze_base):
        tree = {"new": {"kernel": jnp.ones((64, 4))}}
        tree["old"] = ql.quantize(tree["new"], self.config)
        packed = ql.quantize(tree, ql.QLoRAConfig(freeze_base=freeze_base))
        for name in tree:
            assert isinstance(packed[name]["kernel"], ql.QTensor)

    def test_the_gradient_passes_the_quantizer(self):
        base, lora = ql.init(jax.random.key(0), params(), self.config)
        layer = base["layers"][0]["q_proj"]
        x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)), jnp.float32)
        grads = jax.grad(lambda layer: jnp.sum(ql.apply(layer, None, x)))(layer)
        want = np.broadcast_to(np.asarray(x).sum(0)[:, None], (64, 24))
        assert relative_error(grads["kernel"].kernel, want) < 1e-6

    def test_kernels_that_diverged_are_named_before_any_is_packed(self):
        base, _ = ql.init(jax.random.key(0), params(), self.config)
        tree = jax.tree.map(lambda x: x, base)
        for layer in tree["layers"]:
            layer["q_proj"]["kernel"] = jax.tree.map(
                lambda w: w.at[3, 5].set(jnp.nan), layer["q_proj"]["kernel"]
            )
        with pytest.raises(ValueError, match="these leaves cannot be targets") as error:
            ql.quantize(tree, self.config, donate=True)
        for path in KERNELS[:2]:
            assert f"{path}: weights must be finite" in str(error.value)
        assert not any(x.is_deleted() for x in jax.tree.leaves(tree))

    def test_one_kernel_packs_by_the_same_function(self):
        base, _ = ql.init(jax.random.key(0), params(), self.config)
        q = ql.quantize(base["stack"]["kernel"], donate=True)
        want = ql.quantize(params()["stack"]["kernel"])
        np.testing.assert_array_equal(q.codes, want.codes)
        assert base["stack"]["kernel"].kernel.is_deleted()


class TestSettingsOfJAX:
    """What other settings of JAX must not change."""

    def results(self, dtype, freeze_base=True):
        config = ql.QLoRAConfig(rank=2, freeze_base=freeze_base)
        base, lora = ql.init(jax.random.key(0), params(dtype), config)
        lora = trained(lora)
        layer, adapter = ql.dequantize(base)["stack"], lora["stack"]
        wide = ql.dequantize(base, jnp.float32)["stack"]
        y = ql.apply(wide, adapter, jnp.ones((3, 2, 64)))
        return base, lora, layer, wide, y, ql.merge(base, lora)

    @pytest.mark.slow
    @pytest.mark.parametrize("freeze_base", [True, False])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_strict_promotion(self, dtype, freeze_base):
        want = self.results(jnp.dtype(dtype), freeze_base)
        with jax.numpy_dtype_promotion("strict"):
            got = self.results(jnp.dtype(dtype), freeze_base)
        jax.tree.map(np.testing.assert_array_equal, got, want)

    @pytest.mark.slow
    def test_without_jit(self):
        want = self.results(jnp.float32)
        with jax.disable_jit():
            got = self.results(jnp.float32)
        close(got, want, 1e-5)


class TestSummary:
    def test_totals_are_the_buffers_bytes(self):
        tree = params()
        base, lora = ql.init(jax.random.key(0), tree, ql.QLoRAConfig(rank=4))
        summary = ql.summary(base, lora)
        bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
        assert summary.float_bytes == bytes_of(tree)
        assert summary.base_bytes == bytes_of(base)
        assert summary.lora_bytes == bytes_of(lora)
        assert summary.trainable_params == sum(x.size for x in jax.tree.leaves(lora))
        assert str(ql.summary(ql.combine(base, lora))) == str(summary)
        # 3 * (1024 bytes of codes, 32 of scale codes, one scale of scales, one mean)
        line = next(row for row in str(summary).splitlines() if "stack/kernel" in row)
        assert line.split() == [
            "stack/kernel",
            "[3,64,32]",
            "nf4",
            "4.156",
            "3,192",
            "no",
        ]

    def test_kernels_that_are_trained_say_so(self):
        config = ql.QLoRAConfig(rank=4, freeze_base=False)
        summary = ql.summary(*ql.init(jax.random.key(0), params(), config))
        line = next(row for row in str(summary).splitlines() if "stack/kernel" in row)
        shape, *fmt, bits, size, is_trained = line.split()[1:]
        assert (shape, fmt) == ("[3,64,32]", ["float32", "through", "nf4"])
        assert (bits, size, is_trained) == ("32.000", "24,576", "yes")
        kernels = 3 * 64 * 32 + 2 * 64 * 24
        adapters = 4 * (3 * (64 + 32) + 2 * (64 + 24))
        assert summary.trainable_params == kernels + adapters

    def test_a_combined_base_with_adapters_is_refused(self):
        base, lora = ql.init(jax.random.key(0), params(), ql.QLoRAConfig())
        with pytest.raises(TypeError, match="`base` must not be combined if `lora` is"):
            ql.summary(ql.combine(base, lora), lora)

    def test_shapes_are_enough(self):
        run = lambda key, tree: ql.init(key, tree, ql.QLoRAConfig(rank=4))
        shapes = jax.eval_shape(run, jax.random.key(0), params())
        real = run(jax.random.key(0), params())
        assert str(ql.summary(*shapes)) == str(ql.summary(*real))
