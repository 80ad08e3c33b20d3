"""Reads and writes PEFT adapters without PEFT. tests/interop compares with PEFT."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same_bits, randomized, write_peft
from stored import tensors_of
from tolerances import assert_close

import qlora_jax as ql

LAYERS, K, N = 3, 64, 48
NAMES = ql.io.Names(
    {
        "embed/embedding": "model.embed_tokens.weight",
        "layers/q_proj/kernel": "model.layers.{layer}.attn.q_proj.weight",
        "layers/q_proj/bias": "model.layers.{layer}.attn.q_proj.bias",
        "layers/kv/w": ql.io.Entry(
            tuple(f"model.layers.{{layer}}.attn.{n}_proj.weight" for n in "kv"), "bnkn"
        ),
        "norm/scale": "model.norm.weight",
    }
)
Q, V = "model.layers.{}.attn.q_proj", "model.layers.{}.attn.v_proj"


def draw(*shape, seed=0, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


@pytest.fixture(scope="module")
def base() -> Any:
    """Packed stacks: q [L, K, N], and k and v in one [L, 2, heads, K, N / heads]."""
    params = {
        "embed": {"embedding": draw(8, K)},
        "layers": {
            "q_proj": {"kernel": draw(LAYERS, K, N), "bias": draw(LAYERS, N)},
            "kv": {"w": draw(LAYERS, 2, 4, K, N // 4)},
        },
        "norm": {"scale": draw(K)},
    }
    config = ql.QLoRAConfig(
        targets=r"layers/.*/(kernel|w)", contract={"layers/kv/w": "bnkn"}
    )
    return ql.quantize(jax.tree.map(jnp.asarray, params), config)


def write(folder, settings=None, tensors=None):
    """Writes an adapter of q in all layers and of v in layer 1."""
    config = {"target_modules": ["q_proj", "layers.1.attn.v_proj"]}
    config |= {"rank_pattern": {"layers.0.attn.q_proj": 2}, **(settings or {})}
    ranks = {Q.format(0): 2, Q.format(1): 4, Q.format(2): 4, V.format(1): 4}
    factors = {}
    for seed, (module, rank) in enumerate(ranks.items()):
        factors[module] = draw(rank, K, seed=seed), draw(N, rank, seed=seed)
    return write_peft(folder, factors, tensors, **config)


def test_each_weight_gets_its_own_adapter(base, tmp_path):
    factors = write(tmp_path, {"alpha_pattern": {"0.attn.q_proj": 3}})
    _, lora, config = ql.io.load_peft(tmp_path, base, NAMES)
    assert [config.rank_of(Q.format(i)) for i in (0, 1)] == [2, 4]

    def merged_delta(module, scaling):
        parts = (f"base_model.model.{module}.lora_{x}.weight" for x in "AB")
        a, b = (factors[part].T.astype(np.float64) for part in parts)
        return scaling * a @ b

    def subtract(x, y):
        return np.asarray(x) - np.asarray(y, np.float64)

    change = jax.tree.map(subtract, ql.merge(base, lora), ql.dequantize(base))
    q = np.stack(
        [merged_delta(Q.format(layer), s) for layer, s in enumerate((1.5, 2, 2))]
    )
    kv = np.zeros((LAYERS, 2, K, N))
    kv[1, 1] = merged_delta(V.format(1), 2)
    kv = kv.reshape(LAYERS, 2, K, 4, N // 4).swapaxes(2, 3)
    assert_close(change["layers"]["q_proj"]["kernel"], q)
    assert_close(change["layers"]["kv"]["w"], kv)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_exact(base, tmp_path, dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    factors = {k: x.astype(dtype) for k, x in write(tmp_path).items()}
    settings = {"rank_pattern": {"layers.0.attn.q_proj": 2}, "lora_dropout": 0.25}
    alphas = {"2.attn.q_proj": 64, "0.attn.q_proj": 2}  # ratios are powers of two
    settings |= {"alpha_pattern": alphas, "task_type": "CAUSAL_LM"}
    write(tmp_path, settings, factors)
    new, lora, config = ql.io.load_peft(tmp_path, base, NAMES)
    # One scaling for the stack needs another B, in at least float32.
    q, kv = lora["layers"]["q_proj"]["kernel"], lora["layers"]["kv"]["w"]
    assert (q.scaling, q.a.dtype, q.b.dtype) == (16, "float32", "float32")
    assert kv.a.dtype == dtype
    ql.io.save(tmp_path / "own", lora)
    lora, _ = ql.io.restore(tmp_path / "own")
    ql.io.save_peft(tmp_path / "again", new, lora, NAMES, config)
    widened = {k: x.astype("f4") if "q_proj" in k else x for k, x in factors.items()}
    assert_same_bits(tensors_of(tmp_path / "again"), widened)
    raw = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert raw.items() >= settings.items()


def test_a_file_has_the_scalings_of_its_config(base, tmp_path):
    write(tmp_path)
    new, lora, config = ql.io.load_peft(tmp_path, base, NAMES)
    doubled = jax.tree.map(lambda x: x, lora)
    q = lora["layers"]["q_proj"]["kernel"]
    doubled["layers"]["q_proj"]["kernel"] = dataclasses.replace(
        q, scaling=2 * q.scaling
    )
    trees = {"one": lora, "two": doubled}
    one, two = (
        ql.io.save_peft(tmp_path / name, new, tree, NAMES, config)
        or tensors_of(tmp_path / name)
        for name, tree in trees.items()
    )
    key = f"base_model.model.{Q.format(1)}.lora_B.weight"
    np.testing.assert_array_equal(two[key], 2 * one[key])


def test_padding_stays_zero_in_training(base, tmp_path):
    write(tmp_path)
    _, lora, _ = ql.io.load_peft(tmp_path, base, NAMES)
    x = jnp.asarray(draw(LAYERS, 5, K))

    def loss(lora):
        return jnp.sum(jnp.sin(ql.apply(base["layers"]["q_proj"], lora, x)))

    grads = jax.grad(loss)(lora["layers"]["q_proj"])["kernel"]
    assert len(jax.tree.leaves(grads)) == 2  # scalings are not trained
    assert not grads.a[0, :, 2:].any() and not grads.b[0, 2:].any()
    assert np.asarray(grads.a[1:]).any(axis=1).all()


TWICE = {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}
UNSUPPORTED = [
    ({"use_dora": 1}, "`use_dora` must be true or false. Got 1"),
    ({"target_parameters": ["x"]}, "'x' matches no parameter of experts"),
    ({"target_parameters": "x"}, "`target_parameters` must be a list of names"),
    ({"target_parameters": ["x"], "use_dora": True}, "`use_dora` false with"),
    ({"lora_bias": True}, "`lora_bias` is not supported"),
    ({"peft_type": "LOHA"}, "`peft_type` must be \"LORA\". Got 'LOHA'"),
    ({"init_lora_weights": "pissa"}, "others change the base weights"),
    ({"use_something_new": 3}, "`use_something_new` is not known. Got 3"),
    ({"r": 0}, "`r` must be a positive integer. Got 0"),
    ({"lora_alpha": "8"}, "`lora_alpha` must be a positive number"),
    ({"lora_alpha": 1e9}, "`lora_alpha` must be a positive number below 1e9. Got 1"),
    ({"bias": "some"}, "`bias` must be"),
    ({"lora_dropout": 1.0}, r"`lora_dropout` must be in \[0, 1\)"),
    ({"target_modules": "("}, "`target_modules` must be a regular expression"),
    ({"exclude_modules": "(" * 3000}, "`exclude_modules` must be a regular expr"),
    ({"layers_pattern": "[a"}, "`layers_pattern` must be a regular expression"),
    ({"rank_pattern": {"(?x)q": 4}}, "`rank_pattern` must be a regular expression"),
    ({"alpha_pattern": {"q)": 4}}, "`alpha_pattern` must be a regular expression"),
    ({"target_modules": ".*", "layers_to_transform": [1]}, "must be left out"),
    ({"target_modules": ["q_proj", "o_proj"]}, "'o_proj' matches no module"),
    ({"target_modules": None}, "must name at least one"),
    ({"layers_to_transform": [0, 1, 7]}, "no module in layer 7"),
    ({"rank_pattern": {"up": 2}}, "`rank_pattern`: 'up' matches no"),
    ({"modules_to_save": ["score"]}, "'score' matches no module"),
    ({"exclude_modules": ["x_proj"]}, "`exclude_modules`: 'x_proj'"),
    ({"target_modules": ["embed_tokens"]}, r"\['model.embed_tokens'\] must be linear"),
    ({"target_modules": ["norm"]}, r"adapters of norms .* \['model.norm'\]"),
    ({"trainable_token_indices": [1, 1]}, "distinct token ids"),
    ({"trainable_token_indices": [99]}, "'embed_tokens' has 8 rows. Got row 99"),
    ({"trainable_token_indices": {"norm": [1]}}, "'norm' must match one embedding"),
    (TWICE, "'embed_tokens' is also adapted or saved"),
]


@pytest.mark.parametrize("settings, message", UNSUPPORTED)
def test_settings_are_refused_by_name(base, tmp_path, settings, message):
    write(tmp_path, settings)
    with pytest.raises(ql.io.CheckpointError, match=message):
        ql.io.load_peft(tmp_path, base, NAMES)


def test_one_error_lists_every_wrong_tensor(base, tmp_path):
    key = "base_model.model.model.layers.{}.attn.q_proj.lora_{}.weight"
    write(
        tmp_path,
        {"modules_to_save": ["norm"], "bias": "lora_only"},
        {
            key.format(0, "A"): None,
            key.format(1, "A"): draw(4, K + 1),
            key.format(1, "B"): np.zeros((N, 4), np.int32),
            key.format(2, "magnitude_vector"): draw(N),
            "base_model.model.model.layers.0.attn.q_proj.base_layer.bias": draw(N),
        },
    )
    with pytest.raises(ql.io.CheckpointError) as error:
        ql.io.load_peft(tmp_path, base, NAMES)
    listed = str(error.value).splitlines()[1:]
    names = [line.strip().removeprefix("base_model.model.model.") for line in listed]
    assert names == [
        "layers.0.attn.q_proj.lora_A.weight: missing",
        "layers.1.attn.q_proj.base_layer.bias: missing",
        "layers.1.attn.q_proj.lora_A.weight: shape must be (4, 64). Got (4, 65)",
        "layers.1.attn.q_proj.lora_B.weight: dtype must be one of ('bfloat16', "
        "'float16', 'float32'). Got int32",
        "layers.2.attn.q_proj.base_layer.bias: missing",
        "layers.2.attn.q_proj.lora_magnitude_vector.weight: unexpected",
        "norm.weight: missing",
    ]


def test_tensors_must_be_finite(base, tmp_path):
    key = "base_model.model.model.layers.1.attn.q_proj.lora_A.weight"
    write(tmp_path, tensors={key: np.full((4, K), np.nan, np.float32)})
    with pytest.raises(ql.io.CheckpointError, match=f"must be finite:\n  {key}$"):
        ql.io.load_peft(tmp_path, base, NAMES)


def test_files_must_be_there(base, tmp_path):
    with pytest.raises(ql.io.CheckpointError, match="has no adapter_config.json"):
        ql.io.load_peft(tmp_path, base, NAMES)
    write(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(ql.io.CheckpointError, match="safetensors file"):
        ql.io.load_peft(tmp_path, base, NAMES)
    outside = tmp_path.parent / f"{tmp_path.name}.safetensors"
    outside.write_bytes(data)
    file.unlink()
    file.symlink_to(outside)
    with pytest.raises(ql.io.CheckpointError, match="must be in its folder"):
        ql.io.load_peft(tmp_path, base, NAMES)
    file.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ql.io.CheckpointError, match="a pickle, which can run code"):
        ql.io.load_peft(tmp_path, base, NAMES)


def test_save_refuses_what_the_settings_do_not_say(base, tmp_path):
    write(tmp_path)
    new, lora, config = ql.io.load_peft(tmp_path, base, NAMES)
    ones = jax.tree.map(jnp.ones_like, lora)
    for bad_adapters, message in [
        (ones, r"\(model.layers.0.attn.q_proj\): A and B must be zero beyond rank 2"),
        ({"layers": {"kv": lora["layers"]["kv"]}}, "q_proj/kernel: it has no adapter"),
    ]:
        with pytest.raises(ValueError, match=message):
            ql.io.save_peft(tmp_path / "new", new, bad_adapters, NAMES, config)
        assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="must be new or empty"):
        ql.io.save_peft(tmp_path, new, lora, NAMES, config)


EXPERTS = {
    f"{name}/kernel": ql.io.Entry(
        f"experts.{{expert}}.{name}.weight", parameter=f"experts.{fused}"
    )
    for name, fused in (("gate", "gate_up"), ("up", "gate_up"), ("down", "down"))
}


@pytest.mark.parametrize(
    "targets, is_fused",
    [("(gate|up|down)", False), ("(gate|up)", True), ("gate", True), ("down", True)],
)
def test_experts_are_one_parameter_unless_all_kernels_are_adapted(targets, is_fused):
    """PEFT would ignore separate modules for gate and up without an error."""
    params = {name: {"kernel": jnp.ones((2, 8, 8))} for name in ("gate", "up", "down")}
    settings = ql.QLoRAConfig(rank=2, fmt=None, targets=f"{targets}/kernel")
    base, lora = ql.init(jax.random.key(0), params, settings)
    config = ql.io.peft_config(base, lora, ql.io.Names(EXPERTS))
    parameter = "experts.down" if targets == "down" else "experts.gate_up"
    assert config.target_parameters == ((parameter,) if is_fused else ())
    assert bool(config.target_modules) != is_fused


def test_a_half_of_a_parameter_without_adapter_has_zeros(tmp_path):
    params = {name: {"kernel": jnp.ones((2, 8, 8))} for name in ("gate", "up", "down")}
    names = ql.io.Names(EXPERTS)
    settings = ql.QLoRAConfig(rank=2, fmt=None, targets="up/kernel")
    base, lora = ql.init(jax.random.key(0), params, settings)
    lora = randomized(lora)
    ql.io.save_peft(tmp_path, base, lora, names)
    b = ql.io.open_safetensors(tmp_path)["base_model.model.experts.lora_B.weight"][...]
    assert b.shape == (16, 4) and not b[:8].any() and b[8:].all()
    _, again, _ = ql.io.load_peft(tmp_path, base, names)
    merged, expected = (ql.merge(base, x) for x in (again, lora))
    assert_same_bits(merged, expected)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"extra_settings": {"r": 4}}, "`extra_settings` must not have `r`"),
        ({"extra_settings": {"lora_bias": True}}, "must not have `lora_bias`"),
        ({"extra_settings": None}, "`extra_settings` must be a dict .* Got None"),
        ({"extra_settings": {1: 2}}, "`extra_settings` must be a dict .* Got {1: 2}"),
        ({"extra_settings": {"init_lora_weights": "pissa"}}, "change the base weights"),
        ({"saved_base_weights": "x"}, "`saved_base_weights` must be a list of names"),
    ],
)
def test_settings_in_the_wrong_place_are_refused(settings, message):
    with pytest.raises(ql.io.CheckpointError, match=message):
        ql.io.PeftConfig(target_modules=("q_proj",), **settings)


def test_an_empty_list_of_layers_is_all_layers():
    """As in PEFT, whose `check_target_module_exists` ignores an empty list."""
    config = ql.io.PeftConfig(target_modules=".*q_proj", layers_to_transform=[])
    assert config.layers is None and config.to_json()["layers_to_transform"] is None


@pytest.mark.parametrize(
    "module, shape, message",
    [
        ("model.layers.2.up", (4, 4), "`num_layers` must be greater than 2,.* Got 2"),
        ("model.layers.1.up", (4,), "matrices `a` and `b` of these modules:\n  model"),
    ],
)
def test_adapters_that_mlx_would_ignore_are_refused(module, shape, message, tmp_path):
    adapter = ql.io.PlainLoRA(8, {module: dict.fromkeys("ab", np.ones(shape))})
    with pytest.raises(ValueError, match=message):
        ql.io.save_mlx(tmp_path, adapter, 2)


def test_a_string_of_modules_to_save_is_refused(base):
    with pytest.raises(ValueError, match="must be a list of names. Got 'lm_head'"):
        ql.io.peft_config(base, {}, NAMES, modules_to_save="lm_head")


def test_experts_that_have_no_form_in_one_parameter_are_refused(tmp_path):
    params = {name: {"kernel": jnp.ones((2, 8, 8))} for name in ("gate", "up", "down")}
    names = ql.io.Names(EXPERTS)

    def save(lora, config=None):
        config = config or ql.io.peft_config(params, lora, names, fused=True)
        ql.io.save_peft(tmp_path / "new", params, lora, names, config)

    def make_adapters(**options):
        return randomized(
            ql.init(
                jax.random.key(0), params, ql.QLoRAConfig(rank=2, fmt=None, **options)
            )[1]
        )

    for options, message in [
        (
            {"rank_pattern": {"up/.*": 1}},
            "gate_up: .* its rank must be at least 2. Got 1",
        ),
        ({"dropout": 0.5}, "`lora_dropout` must be 0 .* Got 0.5"),
        ({"use_dora": True}, "`use_dora` false with"),
    ]:
        with pytest.raises(ValueError, match=message):
            save(make_adapters(**options))
    # Both share one A, as in PEFT, until they are trained here.
    shared = ql.io.PeftConfig(r=2, target_parameters=("gate_up",), lora_alpha=2)
    lora = make_adapters(targets="(gate|up)/.*")
    with pytest.raises(
        ValueError, match="gate_up: .*different A matrices. A and B must be zero beyond"
    ):
        save(lora, shared)
    with pytest.raises(ValueError, match="experts.gate_up: it has no adapter"):
        save(make_adapters(targets="down/.*"), shared)
    both = shared.__class__(**vars(shared) | {"target_modules": ("up",)})
    with pytest.raises(ValueError, match="experts.gate_up is adapted or saved twice"):
        save(lora, both)
    assert not (tmp_path / "new").exists()
    alone = ql.io.Entry("experts.down.{expert}", parameter="experts.down")
    names = ql.io.Names(EXPERTS | {"down/kernel": alone})
    with pytest.raises(
        ValueError, match=r"must hold adapters of modules.*experts.down"
    ):
        ql.io.PlainLoRA.of(params, make_adapters(targets="down/.*"), names)


@pytest.mark.parametrize("fused", [False, True])
def test_adapters_of_experts_are_read_back_and_merged(fused, tmp_path):
    names, kinds = ql.io.Names(EXPERTS), ("gate", "up", "down")
    params = {name: {"kernel": jnp.ones((3, 8, 8))} for name in kinds}
    config = ql.QLoRAConfig(rank=2, alpha=4, fmt=None, targets=".*")
    _, lora = ql.init(jax.random.key(0), params, config)

    def give_b(x):
        return dataclasses.replace(x, b=x.a.swapaxes(-1, -2))

    def is_lora(x):
        return isinstance(x, ql.LoRA)

    lora = jax.tree.map(give_b, lora, is_leaf=is_lora)
    config = ql.io.peft_config(params, lora, names, fused=fused)
    ql.io.save_peft(tmp_path / "new", params, lora, names, config)
    _, loaded, _ = ql.io.load_peft(tmp_path / "new", params, names)
    assert type(loaded["gate"]["kernel"]) is ql.LoRA
    for name in kinds:
        a = np.asarray(lora[name]["kernel"].a)
        want = 1 + 2 * a @ a.swapaxes(1, 2)
        for tree in (lora, loaded):
            kernel = ql.merge(params, tree)[name]["kernel"]
            assert_close(kernel, want, terms=64)
    if fused:
        return
    folders, options = (tmp_path / "base", tmp_path / "merged"), {"progress": False}
    ql.io.save_merged(folders[0], params, {}, names, {"model_type": "x"}, **options)
    ql.io.save_merged(folders[1], folders[0], lora, names, **options)
    for name in kinds:
        stack = np.asarray(ql.merge(params, lora)[name]["kernel"])
        for i, kernel in enumerate(stack):
            x = ql.io.open_safetensors(folders[1])[f"experts.{i}.{name}.weight"][...]
            assert_close(x.T, kernel, terms=64)


def test_kernels_must_have_the_axes_of_the_names(base):
    config = ql.QLoRAConfig(targets="layers/kv/w")
    params = {"layers": {"kv": {"w": jnp.ones((LAYERS, 2, 4, K, 12))}}}
    packed = ql.quantize(params, config)
    message = "axes 'bbbkn' .* need 'bbnkn'. Set `contract`"
    with pytest.raises(ValueError, match=message):
        ql.io.peft_config(packed, {}, NAMES)
    with pytest.raises(ValueError, match="`path` must be one of .* Got 'other'"):
        ql.io.peft_config({"other": jnp.ones(3)}, {}, NAMES)


def test_biases_of_several_axes_are_vectors_there(tmp_path):
    entries = {"q/kernel": ("q.weight", "knn"), "q/bias": ("q.bias", "nn")}
    names = ql.io.Names({path: ql.io.Entry(*x) for path, x in entries.items()})
    base = {"q": {"kernel": jnp.zeros((8, 2, 3)), "bias": jnp.zeros((2, 3))}}
    a, b, bias = draw(4, 8), draw(6, 4), draw(6)
    biases = {"base_model.model.q.base_layer.bias": bias}
    write_peft(tmp_path, {"q": (a, b)}, biases, target_modules=["q"], bias="all")
    new, lora, _ = ql.io.load_peft(tmp_path, base, names)
    assert new["q"]["bias"] is base["q"]["bias"]
    np.testing.assert_array_equal(lora["q"]["bias"].value, bias.reshape(2, 3))
    np.testing.assert_array_equal(lora["q"]["kernel"].b, b.T)


def test_base_weights_that_the_model_lacks_are_refused(base, tmp_path):
    _, lora = ql.init(
        jax.random.key(0), base, ql.QLoRAConfig(targets="layers/q_proj/kernel")
    )
    config = ql.io.peft_config(base, lora, NAMES)
    config = dataclasses.replace(config, saved_base_weights=("lm_head.weight",))
    with pytest.raises(ValueError, match="Got others:\n  lm_head.weight"):
        ql.io.save_peft(tmp_path / "adapter", base, lora, NAMES, config)
    assert not (tmp_path / "adapter").exists()


def test_saved_base_weights_are_not_decoded_from_4_bits(tmp_path):
    head = draw(N, K)  # of the base; PEFT stores it where the adapter changes it
    params = {"lm_head": {"kernel": jnp.asarray(head.T)}}
    base = ql.quantize(params, ql.QLoRAConfig(targets=".*", fmt="nf4"))
    names = ql.io.Names({"lm_head/kernel": "lm_head.weight"})
    key = "base_model.model.lm_head.base_layer.weight"
    factors = {"lm_head": (draw(4, K), draw(N, 4))}
    write_peft(tmp_path, factors, {key: head}, target_modules=["lm_head"])
    loaded, lora, config = ql.io.load_peft(tmp_path, base, names)
    with pytest.raises(ValueError, match="`base` .* in float(.|\n)*lm_head.weight"):
        ql.io.save_peft(tmp_path / "packed", base, lora, names, config)
    ql.io.save_peft(tmp_path / "new", loaded, lora, names, config)
    assert_same_bits(tensors_of(tmp_path / "new"), tensors_of(tmp_path))
