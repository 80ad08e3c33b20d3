"""GGUF files that qlora_jax writes, read by the `gguf` package.

In tests/interop, llama.cpp and transformers read them.
"""

import json
import pathlib
import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import trees_of
from safetensors.numpy import load_file
from test_models import DATA
from tokenizer_helpers import save_split_tokenizer, save_tokenizer
from tokenizers import Tokenizer, processors

import qlora_jax as ql
from qlora_jax.llm import app
from qlora_jax.llm.data import open_tokenizer
from qlora_jax.llm.gguf.names import gguf_names
from qlora_jax.llm.gguf.pre_tokenizers import PRE_TOKENIZERS
from qlora_jax.llm.gguf.save import save_gguf
from qlora_jax.llm.gguf.support import check_gguf_config
from qlora_jax.llm.gguf.tokenizer import scores_of
from qlora_jax.llm.models import families
from qlora_jax.llm.models.checkpoint import load, read_config
from qlora_jax.llm.models.config import (
    DecoderConfig,
    Experts,
    Heads,
    LayerKind,
    Rope,
)
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.decoder_names import decoder_names
from qlora_jax.llm.models.families import config_from_hf
from qlora_jax.llm.models.tiny import save_tiny
from qlora_jax.trees.paths import leaves_by_path

QWEN3 = {"model_type": "qwen3", "vocab_size": 320, "hidden_size": 32, "head_dim": 16}
QWEN3 |= {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN3 |= {"num_key_value_heads": 2, "max_position_embeddings": 128}
QWEN3 |= {"tie_word_embeddings": False}
QWEN3 |= {"rms_norm_eps": 2.0**-20}  # exact in the float32 of GGUF
STRETCHED = Rope(divisors=(1.0, 1.0, 2.0, 2.0))
GEMMA = {"unit_offset_norms": True, "post_norms": True, "embedding_scale": 32**0.5}
GEMMA |= {"attention_soft_cap": 50.0, "logit_soft_cap": 30.0}
GEMMA |= {"activation": "gelu_pytorch_tanh"}
GEMMA |= {"layers": (LayerKind(window=16), LayerKind())}
OSS = {"activation": "clamped_swiglu", "sinks": True, "tie_embeddings": False}
OSS |= {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
OSS |= {"experts": Experts(4, 2, **families.GPT_OSS_EXPERTS), "layers": GEMMA["layers"]}
OLMOE = {"experts": Experts(4, 2, normalized=False), "num_kv_heads": 4}
OLMOE |= {"qk_norms": "whole", "tie_embeddings": False}
MIXTRAL = {"experts": Experts(4, 2, **families.MIXTRAL_EXPERTS)}
TOKENS = jnp.zeros((1, 2), jnp.int32)
ALL = dict(targets=r"layers/.*_proj/kernel", block_size=16)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    (folder / "config.json").write_text(json.dumps(QWEN3))
    save_split_tokenizer(folder)
    params = Decoder(read_config(folder)).init(jax.random.key(0), TOKENS)["params"]
    return folder, jax.tree.map(lambda x: x + 0.01, params)


@pytest.fixture
def copied(qwen3, tmp_path):
    return pathlib.Path(shutil.copytree(qwen3[0], tmp_path / "model"))


def in_f16(x):
    return np.asarray(x, np.float16).astype(np.float32)


def stored_tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}


def pair_rows(x, num_heads):
    """Returns rows in llama.cpp's order: i and i + Dh/2 of a head follow each other."""
    return x.reshape(num_heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def read_pairs(path, arch, tensors):
    """Yields a file's tensors, each with the tensor of the folder of the same name."""
    stored = stored_tensors(path)
    names = gguf.get_tensor_name_map(arch, 2)
    for hf_name, want in tensors.items():
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        tensor = stored.pop(name)
        got = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(want.shape)
        if arch == gguf.MODEL_ARCH.LLAMA:
            if heads := {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2]):
                want = pair_rows(want, heads)
        yield tensor, got, want
    assert stored.keys() <= {"rope_freqs.weight"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_tied", "llama_biased_stretched", "qwen2"])
def test_f16_is_exact(tmp_path, name):
    _, params = load(DATA / name, progress=False)
    path = tmp_path / "model.gguf"
    save_gguf(path, DATA / name, params, tokenizer=False, progress=False)
    arch = gguf.MODEL_ARCH[name.partition("_")[0].upper()]
    tensors = load_file(DATA / name / "model.safetensors")
    for tensor, got, want in read_pairs(path, arch, tensors):
        want = in_f16(want) if want.ndim > 1 else want
        np.testing.assert_array_equal(got, want, err_msg=tensor.name)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.slow
def test_q8_0_is_within_half_a_step(tmp_path):
    folder = save_tiny(tmp_path / "model")
    _, params = load(folder, progress=False)
    path = tmp_path / "model.gguf"
    save_gguf(path, folder, params, fmt="Q8_0", tokenizer=False, progress=False)
    tensors = ql.io.open_safetensors(folder)
    tensors = {name: np.asarray(x) for name, x in tensors.items()}
    for tensor, got, want in read_pairs(path, gguf.MODEL_ARCH.LLAMA, tensors):
        if want.ndim == 1:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            np.testing.assert_array_equal(got, want)
            continue
        assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
        got, want = got.reshape(-1, 32), want.reshape(-1, 32)
        step, error = np.abs(want).max(1, keepdims=True) / 127, np.abs(got - want)
        # Half a step, plus the rounding of the scale to 11 bits times a code up to 127.
        assert (error <= step * (0.5 + 127 * 2**-11)).all()


Q4_0 = gguf.GGMLQuantizationType.Q4_0


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["int4_f16", "q4_0"])
def test_q4_0_holds_a_packed_base_to_the_bit(tmp_path, fmt):
    """Llama's rows of q and k are in another order, together with their blocks."""
    folder = save_tiny(tmp_path / "model", intermediate_size=96)
    settings = ql.QLoRAConfig(fmt=fmt, block_size=32, targets=ALL["targets"])
    config, base = load(folder, qlora=settings, progress=False)
    path = tmp_path / "model.gguf"
    save_gguf(path, folder, base, fmt="Q4_0", progress=False)
    stored, names = stored_tensors(path), decoder_names(config)
    ours = {theirs: name for name, theirs in gguf_names(config, "llama").items()}
    kernels = {}
    leaf_paths = [leaf for leaf in names.entries if leaf.endswith("_proj/kernel")]
    for leaf in leaf_paths:
        w = np.asarray(leaves_by_path(base)[leaf].dequantize(jnp.float32))
        named_kernels = zip(names.of(leaf, (2,)), w.swapaxes(-1, -2), strict=True)
        kernels |= dict(named_kernels)
    for name, tensor in stored.items():
        assert (tensor.tensor_type == Q4_0) == (ours[name] in kernels), name
        if tensor.tensor_type != Q4_0:
            continue
        got, want = gguf.dequantize(tensor.data, Q4_0), kernels[ours[name]]
        if heads := {"attn_q": 4, "attn_k": 2}.get(name.split(".")[2]):
            want = pair_rows(want, heads)
        np.testing.assert_array_equal(got, want, err_msg=name)
    # The embedding has values that F16 cannot represent.
    assert stored["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    rounded = jax.tree.map(in_f16, base["embed_tokens"])
    base = {**base, "embed_tokens": rounded}
    save_gguf(tmp_path / "2.gguf", folder, base, fmt="Q4_0", progress=False)
    kind = stored_tensors(tmp_path / "2.gguf")["token_embd.weight"].tensor_type
    assert kind == gguf.GGMLQuantizationType.F16


@pytest.mark.slow
def test_floats_are_packed_in_q4_0_as_by_gguf(tmp_path, qwen3):
    folder, params = qwen3
    path = tmp_path / "model.gguf"
    save_gguf(path, folder, params, fmt="Q4_0", progress=False)
    stored = stored_tensors(path)
    down = np.asarray(params["layers"]["mlp"]["down_proj"]["kernel"][1])
    got = stored["blk.1.ffn_down.weight"].data
    np.testing.assert_array_equal(got, gguf.quantize(down.T, Q4_0))
    assert {t.tensor_type for n, t in stored.items() if "blk" not in n} == {0}
    for fmt, size in (("nf4", 64), ("int4_f16", 64)):
        settings = ql.QLoRAConfig(fmt=fmt, block_size=size, targets="layers/mlp/down.*")
        base = ql.quantize(params, settings)
        wrong = f"down_proj/kernel: {fmt} in blocks of 64"
        with pytest.raises(ValueError, match=wrong):
            save_gguf(tmp_path / "2", folder, base, fmt="Q4_0", progress=False)
    _, lora = trees_of(params, fmt=None, **ALL)
    with pytest.raises(ValueError, match="`lora` must be left out for Q4_0"):
        save_gguf(tmp_path / "2", folder, params, lora, fmt="Q4_0", progress=False)


@pytest.mark.slow
def test_packed_bases_and_adapters_are_merged(tmp_path, qwen3):
    folder, params = qwen3
    base, lora = trees_of(params, rank=2, **ALL)
    merged = ql.merge(base, lora)
    path = tmp_path / "model.gguf"
    save_gguf(path, folder, base, lora, progress=False)
    down = stored_tensors(path)["blk.1.ffn_down.weight"].data
    want = in_f16(merged["layers"]["mlp"]["down_proj"]["kernel"][1].T)
    np.testing.assert_array_equal(np.float32(down), want)


@pytest.mark.slow
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_the_tokenizer_comes_along(tmp_path, qwen3, copied, pre):
    tokenizer = save_split_tokenizer(copied, pre)
    path = tmp_path / "model.gguf"
    save_gguf(path, copied, qwen3[1], progress=False)
    fields = gguf.GGUFReader(str(path)).fields

    def get_field(key):
        return fields[f"tokenizer.{key}"].contents()

    assert get_field("ggml.pre") == pre
    assert get_field("chat_template") == "{{ messages }}"
    tokens, vocab = get_field("ggml.tokens"), tokenizer.get_vocab()
    assert len(tokens) == QWEN3["vocab_size"]
    assert {token: tokens.index(token) for token in vocab} == vocab
    assert get_field("ggml.merges") == ["h e", "l l"]
    assert get_field("ggml.eos_token_id") == tokenizer.token_to_id("<|end|>")


def test_a_tokenizer_of_another_kind_is_refused(tmp_path, qwen3, copied):
    raw = json.loads((copied / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "x"}
    (copied / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="a byte-level BPE that splits text like one"):
        save_gguf(tmp_path / "model.gguf", copied, qwen3[1], progress=False)
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*"))


def change_settings(folder, **changes):
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(settings))


def test_the_tokenizer_is_that_of_training(tmp_path, qwen3, copied):
    """It has the steps that its class adds, and the tokens of other files."""
    save_split_tokenizer(copied, "smollm")
    added = {"100": {"content": "<late>", "special": False, "normalized": False}}
    tokens = {"eos_token": "<end>", "added_tokens_decoder": added}
    change_settings(copied, tokenizer_class="GPT2Tokenizer", **tokens)
    path = tmp_path / "model.gguf"
    save_gguf(path, copied, qwen3[1], progress=False)
    trained = open_tokenizer(copied).inner
    fields = gguf.GGUFReader(str(path)).fields

    def get_field(key):
        return fields[f"tokenizer.ggml.{key}"].contents()

    assert get_field("pre") == "gpt-2"
    assert get_field("eos_token_id") == trained.token_to_id("<end>")
    assert get_field("token_type")[trained.token_to_id("<late>")] == 4  # user-defined


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokenizer_class": "LlamaTokenizer"}, "`tokenizer_class` .* not be Llama"),
        ({"split_special_tokens": True}, "`split_special_tokens` .* be false"),
    ],
)
def test_a_setting_that_llama_cpp_lacks_is_refused(tmp_path, qwen3, changes, message):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((qwen3[0] / "config.json").read_bytes())
    save_tokenizer(folder, sentencepiece=True)
    change_settings(folder, **changes)
    with pytest.raises(ValueError, match=message):
        save_gguf(tmp_path / "model.gguf", folder, qwen3[1], progress=False)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = dict(zip([*BYTES, *"abcd", "ab", "cd", "abcd"], range(263), strict=True))


@pytest.mark.parametrize(
    ("merges", "missing_token", "message"),
    [
        (["a b", "c d", "ab cd"], "", None),
        (["a b", "ab cd", "c d"], "", None),
        (["a b", "c d"], "", "the merges must contain ..'ab', 'cd'"),
        (["a b", "c d", "ab cd", "a b"], "", "make 'ab' must be consecutive"),
        (["a b", "c d", "ab cd"], "<0x0A>", "the tokenizer must have ..<0x0A>"),
    ],
)
def test_scores_give_the_order_of_merges(merges, missing_token, message):
    vocab = {token: i for token, i in LETTERS.items() if token != missing_token}
    raw = {"model": {"vocab": vocab, "merges": merges}}
    if message is None:
        scores = scores_of(raw)
        merged_tokens = [merge.replace(" ", "") for merge in merges]
        assert sorted(scores, key=scores.__getitem__, reverse=True) == merged_tokens
        return
    with pytest.raises(ValueError, match=message):
        scores_of(raw)


def test_the_beginning_of_a_text_is_written_or_refused(tmp_path, qwen3, copied):
    """By default llama.cpp adds a token before each text for tokenizers of Llama 3."""
    save_split_tokenizer(copied, "llama-bpe")
    file = copied / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    begin = processors.TemplateProcessing
    tokenizer.post_processor = begin(single="$A", special_tokens=[])
    tokenizer.save(str(file))
    path = tmp_path / "model.gguf"
    save_gguf(path, copied, qwen3[1], progress=False)
    fields = gguf.GGUFReader(str(path)).fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    he = [("he", tokenizer.token_to_id("he"))]
    tokenizer.post_processor = begin(single="he $A", special_tokens=he)
    tokenizer.save(str(file))
    with pytest.raises(ValueError, match="must add `bos_token` or no token to a text"):
        save_gguf(tmp_path / "two.gguf", copied, qwen3[1], progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit_offset_norms": True}, r'As "gemma" .*`embedding_scale`=1.0'),
        ({"logit_soft_cap": 3.0}, "`logit_soft_cap`=3.0"),
        ({"qk_norms": True, "qkv_bias": True}, '"qwen3" .*`qkv_bias`=True'),
        ({"rotary_dim": 4}, "`rotary_dim`=4"),
        ({"layers": (LayerKind(window=8),)}, "these sliding windows"),
        ({"layers": (LayerKind(STRETCHED),), "qk_norms": True}, "these rotary pos"),
        ({"layers": (LayerKind(Rope(scale=1.5)),)}, "these rotary positions"),
        ({"layers": (LayerKind(), LayerKind(None))}, '"smollm3" .*these rotary'),
        ({"fused": True, "layers": (LayerKind(window=8),)}, "these sliding windows"),
        ({"fused": True, "head_dim": 16}, "heads whose total width"),
        (GEMMA | {"attention_soft_cap": None}, "`attention_soft_cap`=None"),
        (GEMMA | {"attention_scale": 0.1}, '"gemma2" .*`attention_scale`=0.1'),
        (GEMMA | {"tie_embeddings": False}, "`tie_embeddings`=False"),
        (GEMMA | {"o_bias": True}, "`o_bias`=True"),
        (GEMMA | {"layers": (LayerKind(window=8),)}, "these sliding windows"),
        (OLMOE | {"num_kv_heads": 2}, '"olmoe" .*heads whose total width'),
        (OLMOE | {"experts": Experts(4, 2)}, "`experts`=.*normalized=True"),
        (MIXTRAL | {"layers": (LayerKind(window=8),)}, '"llama" .*sliding windows'),
        (OSS | {"qkv_bias": False}, '"gpt-oss" .*`qkv_bias`=False'),
        (OSS | {"tie_embeddings": True}, "`tie_embeddings`=True"),
        (OSS | {"layers": OSS["layers"][::-1]}, "these sliding windows"),
        (OSS | {"layers": (LayerKind(STRETCHED),)}, "these rotary positions"),
        ({"layers": (LayerKind(heads=Heads(1, 16)),)}, "layers of these structures"),
        (GEMMA | {"value_norms": True, "output_scalars": True}, "`value_norms`=True"),
        ({"per_layer_width": 4}, "`per_layer_width`=4"),
        ({"layers": (LayerKind(Rope(dim=8, num_pairs=2)),)}, "these rotary positions"),
        ({"pre_norms": False, "post_norms": True}, '"olmo2" .*`qk_norms`=False'),
        ({"qkv_bias": True, "head_dim": 16}, '"qwen2" .*heads whose total'),
        (GEMMA | {"qk_norms": True}, '"gemma3" .*`logit_soft_cap`=30.0'),
    ],
)
def test_models_that_llama_cpp_computes_differently_are_refused(change, message):
    config = DecoderConfig(64, 32, 48, 2, 4, **{"num_kv_heads": 2} | change)
    with pytest.raises(ValueError, match=message):
        check_gguf_config(config, context=128)


def test_a_rounding_of_llama_cpp_in_gpt_oss_gives_a_warning():
    """llama.cpp rounds the bounds of YaRN's ramp, 8.09 and 17.40, to 8 and 18."""
    raw = {**QWEN3, "model_type": "gpt_oss", "head_dim": 64}

    def ramp(i, low, high):
        return 1 - 31 / 32 * np.clip((i - low) / (high - low), 0, 1)

    low, high = (32 * np.log(4096 / (n * 2 * np.pi)) / np.log(150_000) for n in (32, 1))
    pairs = np.arange(32)
    share = np.abs(ramp(pairs, low, high) / ramp(pairs, 8, 18) - 1).max()
    with pytest.warns(UserWarning, match=f"by up to {share:.1%}"):
        assert check_gguf_config(config_from_hf(raw), context=128) == "gpt-oss"


def test_equivalent_settings_are_written():
    """Windows may cover the context; Gemma 2 27B, known by its layers, has a scale."""
    wide = DecoderConfig(64, 32, 48, 2, 4, 2, layers=(LayerKind(window=128),))
    assert check_gguf_config(wide, context=128) == "llama"
    full = DecoderConfig(64, 32, 48, 2, 4, 2, **OSS | {"layers": (LayerKind(),)})
    assert check_gguf_config(full, context=8192) == "gpt-oss"
    layers = GEMMA["layers"] * 23
    large = {"head_dim": 4, "layers": layers, "attention_scale": 8**-0.5}
    config = DecoderConfig(64, 32, 48, 46, 4, 2, **GEMMA | large)
    assert check_gguf_config(config, context=128) == "gemma2"


def test_a_refused_model_is_refused_before_it_is_read(tmp_path):
    mistral = {"model_type": "mistral", "architectures": None, "sliding_window": 8}
    folder = save_tiny(tmp_path / "model", **mistral)
    (tmp_path / "model" / "model.safetensors").unlink()
    out = str(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="these sliding windows"):
        app.export(app.ExportConfig(folder, "gguf", out))


def test_bad_arguments_are_refused(tmp_path, qwen3):
    folder, params = qwen3

    def save(params, *arguments, **kwargs):
        return save_gguf(
            tmp_path / "model.gguf",
            folder,
            params,
            *arguments,
            progress=False,
            **kwargs,
        )

    fewer = {k: v for k, v in params.items() if k != "norm"}
    large, huge = (
        {**params, "embed_tokens": {"embedding": jnp.full((320, 32), x)}}
        for x in (1e5, 1e8)
    )
    unknown_lora = {"other": {"kernel": jnp.ones(1)}}
    for call, message in [
        (lambda: save(params, fmt="Q4_K_M"), "`fmt` must be one of"),
        (lambda: save(fewer), "another shape: .'norm/scale'"),
        (lambda: save(params, unknown_lora), "`lora` must have the paths of kernels"),
        (lambda: save(large), r"token_embd\.weight must fit F16"),
        (lambda: save(huge, fmt="Q8_0"), r"token_embd\.weight must fit Q8_0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert list(tmp_path.iterdir()) == []
