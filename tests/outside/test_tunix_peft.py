"""PEFT adapters for models of google-tunix, compared with Tunix's checkpoint loader.

A model with a loaded adapter must equal the model that Tunix loads from a Hugging Face
checkpoint with the adapter merged into its tensors.
"""

import re
import warnings
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_same_bits
from name_tables import tunix_names
from stored import draw_peft, tensors_of
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.trees.paths import leaves_by_path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("tunix")
    import test_tunix as models
    import tunix_finetune as example
    from tunix.models.gemma import params_safetensors as gemma2_params
    from tunix.models.gemma3 import model as gemma3
    from tunix.models.gemma3 import params_safetensors as gemma3_params
    from tunix.models.llama3 import params as llama3_params
    from tunix.models.qwen3 import params as qwen3_params

pytestmark = pytest.mark.filterwarnings("ignore")


def make_gemma3():
    sizes = {**models.SIZES, "num_kv_heads": 4}  # q, k and v in one kernel
    config = gemma3.ModelConfig(
        num_embed=64, sliding_window_size=4, param_dtype=jnp.float32, **sizes
    )
    return models.fill(gemma3.Gemma3(config, rngs=nnx.Rngs(0)))


CASES: dict[str, tuple[Any, Any, str]] = {
    "llama3": (models.make_llama, llama3_params, "llama3"),
    "qwen3_experts": (models.make_qwen_experts, qwen3_params, "qwen3"),
    "gemma2": (models.make_gemma, gemma2_params, "gemma2"),
    "gemma3": (make_gemma3, gemma3_params, "gemma3"),
}
CONTRACT = {r".*/q?kv_einsum/w": "bnkn"}


def checkpoint(model, names) -> dict[str, np.ndarray]:
    """Random tensors in Hugging Face's names and shapes."""
    rng = np.random.default_rng(5)
    tensors = {}
    for path, leaf in leaves_by_path(ql.nnx.split(model)[0]).items():
        roles = names.roles(path)
        batch = leaf.shape[: names.num_batch_axes(path)]
        shape = leaf.shape[len(batch) :]
        if roles:
            letters = ("b" * (leaf.ndim - len(roles)) + roles)[len(batch) :]
            sizes = [
                np.prod([n for n, c in zip(shape, letters, strict=True) if c == kind])
                for kind in "nk"
            ]
            shape = tuple(map(int, sizes))
        for name in names.of(path, batch).flat:
            tensors[name] = 0.2 * rng.normal(size=shape).astype(np.float32)
    return tensors


def load_there(folder, tensors, model, params):
    folder.mkdir()
    ql.io.write_safetensors(folder / "model.safetensors", tensors)
    config = getattr(model, "config", None) or model.cfg
    return params.create_model_from_safe_tensors(
        str(folder), config, dtype=jnp.float32, mode="original"
    )


@pytest.mark.parametrize("name", CASES)
def test_adapters_of_peft_are_those_of_the_same_weights(name, tmp_path):
    make, params, family = CASES[name]
    names, like = tunix_names(family, qkv_einsum=family == "gemma3"), make()
    tensors = checkpoint(like, names)
    model = load_there(tmp_path / "base", tensors, like, params)
    modules = [n.removesuffix(".weight") for n in tensors if "_proj.weight" in n]
    shapes = {module: tensors[f"{module}.weight"].shape for module in modules}
    folder, merged = tmp_path / "adapter", dict(tensors)
    for module, (a, b) in draw_peft(folder, shapes, target_modules=".*_proj").items():
        merged[f"{module}.weight"] = tensors[f"{module}.weight"] + 2 * b @ a
    expected = load_there(tmp_path / "merged", merged, like, params)
    base, lora, peft_config = ql.io.load_peft(folder, ql.nnx.split(model)[0], names)
    targets = [re.escape(path) for path in leaves_by_path(lora)]
    contract = CONTRACT if "gemma" in name else {}
    config = ql.QLoRAConfig(fmt=None, targets=targets, contract=contract)
    wrapped = ql.nnx.wrap(model, config, rngs=nnx.Rngs(0))
    wrapped = ql.nnx.join(wrapped, base, lora)
    logits = models.logits(expected)
    assert_close(models.logits(wrapped), logits)
    assert np.abs(models.logits(model) - logits).max() > 0.1

    base, lora = ql.nnx.split(wrapped)
    ql.io.save_peft(tmp_path / "again", base, lora, names, peft_config)
    assert_same_bits(tensors_of(tmp_path / "again"), tensors_of(folder))


def test_tunixs_trainer_trains_the_adapters_that_are_exported(tmp_path):
    model, before, after = example.train(dim=64, depth=2, steps=30)
    assert after < before - 0.2
    base, lora = ql.nnx.split(model)
    names = tunix_names("llama3")
    ql.io.save_peft(tmp_path / "adapter", base, lora, names)

    # The untrained model with the saved adapter equals the trained model.
    config = ql.QLoRAConfig(rank=16, targets=example.TARGETS)
    again = ql.nnx.wrap(example.make_model(64, 2), config, rngs=nnx.Rngs(1))
    fresh, _ = ql.nnx.split(again)
    chex.assert_trees_all_equal(fresh, base)
    _, read, settings = ql.io.load_peft(tmp_path / "adapter", fresh, names)
    assert (settings.r, settings.lora_alpha) == (16, 16)
    again = ql.nnx.join(again, fresh, read)
    np.testing.assert_array_equal(models.logits(again), models.logits(model))
