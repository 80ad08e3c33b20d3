"""The table of names between our leaves and a Hugging Face model's tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql

NAMES = ql.io.Names(
    {
        "embed/embedding": "model.embed_tokens.weight",
        "layers/q_proj/kernel": "model.layers.{layer}.self_attn.q_proj.weight",
        "layers/kv/w": ql.io.Entry(
            ("model.layers.{layer}.k.weight", "model.layers.{layer}.v.weight"), "bnkn"
        ),
        "layers/experts/up/kernel": "model.layers.{layer}.experts.{expert}.up.weight",
        "layers_{layer}/norm/scale": "model.layers.{layer}.norm.weight",
    },
    ignored=(r".*\.inv_freq",),
)


def test_names_of_a_leaf():
    assert NAMES.of("embed/embedding").item() == "model.embed_tokens.weight"
    assert NAMES.of("layers/kv/w", (2, 2)).tolist() == [
        ["model.layers.0.k.weight", "model.layers.0.v.weight"],
        ["model.layers.1.k.weight", "model.layers.1.v.weight"],
    ]
    experts = NAMES.of("layers/experts/up/kernel", (2, 3))
    assert experts[1, 2] == "model.layers.1.experts.2.up.weight"
    assert NAMES.of("layers_11/norm/scale").item() == "model.layers.11.norm.weight"
    paths = "embed/embedding", "layers/kv/w", "layers/experts/up/kernel"
    assert [*map(NAMES.num_batch_axes, (*paths, "layers_4/norm/scale"))] == [0, 2, 2, 0]
    sizes = [], [None, 2], [None, None]
    assert (*map(NAMES.batch_sizes, paths),) == sizes
    assert NAMES.roles("layers/q_proj/kernel") == "kn"
    assert NAMES.roles("layers/kv/w") == "bnkn"
    assert NAMES.roles("layers_3/norm/scale") == ""


def test_experts_may_be_numbered_by_the_entry():
    entry = ql.io.Entry(
        "model.layers.{layer}.experts.{expert}.up.weight",
        parameter="model.layers.{layer}.experts.up",
        numbers={"layer": (1, 2), "expert": (0, 1)},
    )
    names = ql.io.Names({"experts/up/kernel": entry})
    assert names.parts_of_parameter("model.layers.0.experts.up") == []
    [part] = names.parts_of_parameter("model.layers.2.experts.up")
    assert part == "model.layers.2.experts.{expert}.up.weight"


def test_parameters_without_all_experts_of_a_layer_have_no_parts():
    name = "model.{layer}.experts.{expert}.up.weight"
    for parameter, full_name in [
        ("model.{layer}.experts.{expert}.up", "model.0.experts.1.up"),
        ("model.experts.up", "model.experts.up"),
    ]:
        entry = ql.io.Entry(name, parameter=parameter)
        names = ql.io.Names({"experts/up/kernel": entry})
        assert names.parts_of_parameter(full_name) == []


def test_the_first_of_two_matching_paths_is_used():
    first = ql.io.Entry("first.{expert}.weight", parameter="first")
    layers = "layers.{layer}.{expert}.weight"
    other = ql.io.Entry(layers, parameter="layers.{layer}")
    names = ql.io.Names({"layers_3/w": first, "layers_{layer}/w": other})
    parameters = names.parameters({"layers_1/w": (1,), "layers_3/w": (1,)})
    expected = {"layers.1": {"layers_1/w": [(0,)]}, "first": {"layers_3/w": [(0,)]}}
    assert parameters == expected


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: NAMES.of("nothing"), "`path` must be one of"),
        (lambda: NAMES.of("layers/kv/w", (2, 3)), r"batch axes \['layer', 2\]"),
        (lambda: NAMES.of("embed/embedding", (2,)), r"batch axes \[\]"),
        (lambda: NAMES.of("layers/q_proj/kernel", (2, 64)), "set `roles` in its entry"),
        (lambda: ql.io.Names({"a_{i}": "b.{j}"}), r"Got \['i'\] in 'a_{i}'"),
        (lambda: ql.io.Names({"a": "x.{i}", "b": "x.{j}"}), r"duplicates: \['x.{}'\]"),
        (lambda: ql.io.Entry(("a.{i}", "b")), "must have the same placeholders"),
        (lambda: ql.io.Entry("a", "xy"), "roles"),
        (lambda: ql.io.Entry("a.{Layer}"), "lower-case .* Got 'a.{Layer}'"),
        (lambda: ql.io.Entry("a.{}"), "lower-case .* Got 'a.{}'"),
        (lambda: ql.io.Entry("a.{i"), "lower-case .* Got 'a.{i'"),
        (lambda: ql.io.Entry("a.{i}", parameter="b.{j}"), r"Got \['j'\] in 'b.{j}'"),
        (lambda: ql.io.Entry("a", stack_roles="NK"), "`stack_roles` must be 'kn'"),
        (lambda: ql.io.Entry("a.{i}", numbers={"i": (0, 0)}), "must differ. Got"),
        (lambda: ql.io.Names({"a": "b"}, ignored="b.c"), "`ignored` must be a tuple"),
        (
            lambda: ql.io.Names({}, ignored=("*.x",)),
            r"expressions. Got '\*.x': nothing",
        ),
    ],
)
def test_wrong_tables_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_two_leaves_with_one_tensor_are_refused(tmp_path):
    names = ql.io.Names({"a/kernel": "x.{layer}.weight", "b/kernel": "x.1.weight"})
    params = {"a": {"kernel": jnp.ones((2, 4, 3))}, "b": {"kernel": jnp.ones((4, 3))}}
    base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(fmt=None, rank=1))
    tensors = {f"x.{i}.weight": np.ones((3, 4), np.float32) for i in range(2)}
    settings, out = {"model_type": "mine"}, tmp_path / "out"
    for call in (
        lambda: ql.io.load(tensors, names, params, progress=False),
        lambda: ql.io.save_merged(out, params, {}, names, settings, progress=False),
        lambda: ql.io.save_peft(out, base, lora, names),
    ):
        message = "x.1.weight: it belongs to a/kernel and to b/kernel"
        with pytest.raises(ValueError, match=message):
            call()


def test_models_with_convolutions_are_refused(tmp_path):
    """Convolutions are supported in adapters only."""
    names = ql.io.Names({"k/kernel": ql.io.Entry("k.weight", "wkn")})
    params = {"k": {"kernel": jnp.ones((3, 16, 8))}}
    with pytest.raises(ValueError, match="k/kernel: convolutions cannot be loaded"):
        ql.io.save_merged(tmp_path / "out", params, {}, names, {"model_type": "x"})
    with pytest.raises(ValueError, match=r"k/kernel \(convolutions cannot be loaded"):
        ql.io.load({"k.weight": np.ones((8, 16, 3), np.float32)}, names, params)
