"""docs/coming_from: the run of tunix.md, and the settings of qwix and MaxText."""

import dataclasses
import importlib.util
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coming_from import assert_settings_exist, code_blocks
from flax import nnx
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.trees.paths import leaves_by_path

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 4


@pytest.fixture(scope="module")
def tunix():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("tunix")
        import tunix_finetune as example
    return example


def wrap(code, model):
    """Runs the page's block that adds adapters to a model, with a float base."""
    code = code.replace('weight_qtype="nf4",\n    tile_size=64,', "")
    code = code.replace('fmt="nf4",\n    block_size=64,', "fmt=None,")
    names = {"model": model}
    exec(compile(code, "tunix.md", "exec"), names)
    return names["model"]


def test_the_same_run_in_tunix(tunix):
    from tunix.sft import peft_trainer

    qwix_code, our_code, train_code, *_ = code_blocks("tunix", "py")
    theirs = wrap(qwix_code, tunix.make_model(dim=64, depth=2))
    ours = wrap(our_code, tunix.make_model(dim=64, depth=2))
    # Start from the adapter of qwix, whose A and B have the axes of the kernel.
    state = nnx.to_flat_state(nnx.state(theirs, nnx.LoRAParam))
    arrays = {"/".join(map(str, path)): x.get_value() for path, x in state}
    base, lora = ql.nnx.split(ours)
    copies = []
    for path, leaf in leaves_by_path(lora).items():
        a, b = (arrays.pop(f"{path}_lora_{name}") for name in "ab")
        a, b = a.reshape(leaf.a.shape), b.reshape(leaf.b.shape)
        copies.append(dataclasses.replace(leaf, a=a, b=b))
    assert not arrays and len(copies) == 2 * 7
    structure = jax.tree.structure(lora, is_leaf=lambda x: isinstance(x, ql.LoRA))
    ours = ql.nnx.join(ours, base, jax.tree.unflatten(structure, copies))

    batches = list(tunix.batches(STEPS, seed=0))

    def train(model):
        """Returns the losses of all batches before and after training."""
        names = {"model": model, "model_inputs": tunix.model_inputs, "batches": batches}
        code, loss = train_code.replace("1e-4", "1e-2"), peft_trainer._default_loss_fn
        before = [loss(model, **tunix.model_inputs(batch)) for batch in batches]
        exec(compile(code, "tunix.md", "exec"), names)
        after = [loss(model, **tunix.model_inputs(batch)) for batch in batches]
        return np.array(before), np.array(after)

    (before, after), expected = train(ours), train(theirs)
    assert np.all(after < before)
    assert_close((before, after), expected)


def test_the_check_of_rotary_positions(tunix):
    (code,) = (block for block in code_blocks("tunix", "py") if "apply_rope" in block)
    batch = next(iter(tunix.batches(1, seed=0)))
    inputs = tunix.model_inputs(batch)
    tokens = inputs["input_tokens"], inputs["positions"], None, inputs["attention_mask"]

    def logits_and_warnings(theta):
        config = tunix.make_model(dim=64, depth=2).config
        config = dataclasses.replace(config, rope_theta=theta)
        model = tunix.llama3.Llama3(config, rngs=nnx.Rngs(0))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exec(compile(code, "tunix.md", "exec"), {"model": model})
        return model(*tokens)[0], [str(x.message) for x in caught]

    with_default, messages = logits_and_warnings(1_000_000)
    assert not messages
    with_other, messages = logits_and_warnings(10_000)
    assert any("1000000 instead of 10000" in message for message in messages)
    np.testing.assert_array_equal(with_default, with_other)  # Tunix ignores the setting


def test_the_same_weights_in_nf4(tunix):
    import qwix

    x = jnp.asarray(np.random.default_rng(0).normal(size=(128, 24)), jnp.float32)
    settings = {"qtype": "nf4", "channelwise_axes": [1], "tiled_axes": {0: 64}}
    expected = qwix.dequantize(qwix.quantize(x, **settings))
    decoded = ql.dequantize(ql.quantize(x, "nf4", block_size=64, double_quant=False))
    assert_close(decoded, expected)


def test_initial_a_of_qwix_is_larger_by_the_root_of_6(tunix):
    from qwix._src.providers.lora import LoraRule

    theirs = LoraRule.lora_a_initializer(jax.random.key(0), (4096, 16), jnp.float32)
    params = {"kernel": jnp.zeros((4096, 16))}
    _, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(fmt=None))
    ratio = float(jnp.std(theirs) / jnp.std(lora["kernel"].a))
    assert abs(ratio - np.sqrt(6)) < 0.05


def test_settings_of_qwix(tunix):
    from qwix._src.providers.lora import LoraRule

    fields = {x.name: x.default for x in dataclasses.fields(LoraRule)}
    assert_settings_exist(
        "tunix", "qwix", fields | {"lora_a_initializer": "he_uniform()"}
    )


def test_settings_of_maxtext():
    spec = importlib.util.find_spec("maxtext")
    if spec is None or spec.origin is None:
        pytest.skip("needs maxtext")
    yaml = pytest.importorskip("yaml")
    folder = pathlib.Path(spec.origin).parent / "configs"
    defaults: dict = {}
    for name in ("base.yml", "post_train/sft.yml"):
        text = (folder / name).read_text("utf-8")
        # PyYAML reads numbers such as "1.e-5" as texts.
        defaults |= yaml.safe_load(re.sub(r"(\d)\.e", r"\1.0e", text))
    defaults |= {f"lora.{name}": x for name, x in defaults["lora"].items()}
    assert_settings_exist("maxtext", "MaxText", defaults)
