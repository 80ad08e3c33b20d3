"""Q4_K, Q5_K and Q6_K, and files of llama.cpp's type Q4_K_M, as the gguf package reads
them. tests/interop/test_k_quants.py compares with llama.cpp itself."""

import gguf
import jax
import numpy as np
import pytest
from test_gguf_out import stored_tensors
from tokenizer_helpers import write_rows
from tolerances import assert_close, relative_error

import qlora_jax as ql
from qlora_jax.llm import app
from qlora_jax.llm.gguf.decoder_out import save_gguf
from qlora_jax.llm.gguf.k_quants import K_QUANTS, pack_k_quant
from qlora_jax.llm.gguf.q4_k_m import q4_k_m_format
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.config import DecoderConfig, Experts
from qlora_jax.llm.models.families import MIXTRAL_EXPERTS
from qlora_jax.llm.models.tiny import save_tiny


def decode(packed, fmt):
    return gguf.dequantize(packed, gguf.GGMLQuantizationType[fmt])


def draw_blocks(fmt, count=5000):
    """Returns bytes of random blocks, each of which has extreme scales and codes.

    In each group of weights there is a code at each end of the range, and in each block
    there is a scale and an offset at the end of its range. Packing the decoded weights
    therefore gives the same bytes.
    """
    rng = np.random.default_rng(0)
    bits = {"Q4_K": 4, "Q5_K": 5, "Q6_K": 6}[fmt]
    size = 16 if bits == 6 else 32
    codes = rng.integers(0, 2**bits, (count, 256 // size, size), np.uint8)
    codes[..., 0], codes[..., 1] = 0, 2**bits - 1
    steps = rng.uniform(1e-3, 1e-2, (2, count, 1)).astype(np.float16)
    if bits == 6:
        # A code of -32 is the extreme of a group, and a number of -128 of a block.
        numbers = rng.integers(-127, 127, (count, 16)).astype(np.int8)
        numbers[np.abs(numbers) < 64] = 64
        numbers[:, 3] = -128
        return write_q6_k(codes, numbers, steps[0])
    # Offsets are those of groups whose lowest weight is not positive.
    scales, offsets = rng.integers(32, 64, (2, count, 8), np.uint8)
    scales[:, 2] = offsets[:, 5] = 63
    return write_q4_k(codes, scales, offsets, *steps, bits)


def write_q4_k(codes, scales, offsets, step, offset_step, bits):
    """Writes Q4_K or Q5_K number by number, from the table in ggml-common.h."""
    count = len(codes)
    joined = np.zeros((count, 12), np.uint8)
    for j in range(4):
        joined[:, j] = scales[:, j] + 64 * (scales[:, j + 4] // 16)
        joined[:, j + 4] = offsets[:, j] + 64 * (offsets[:, j + 4] // 16)
        joined[:, j + 8] = scales[:, j + 4] % 16 + 16 * (offsets[:, j + 4] % 16)
    high, low = np.zeros((count, 32), np.uint8), np.zeros((count, 128), np.uint8)
    for group in range(8):
        high |= (codes[:, group] // 16) << group
        start = 32 * (group // 2)
        low[:, start : start + 32] += codes[:, group] % 16 * 16 ** (group % 2)
    parts = [step.view(np.uint8), offset_step.view(np.uint8), joined]
    return np.concatenate(parts + [high] * (bits == 5) + [low], axis=-1)


def write_q6_k(codes, numbers, step):
    codes = codes.reshape(-1, 256)
    low, high = (np.zeros((len(codes), n), np.uint8) for n in (128, 64))
    for i in range(256):
        half, j = divmod(i, 128)
        low[:, 64 * half + j % 64] += codes[:, i] % 16 * 16 ** (j // 64)
        high[:, 32 * half + j % 32] += codes[:, i] // 16 * 4 ** (j // 32)
    parts = [low, high, numbers.view(np.uint8), step.view(np.uint8)]
    return np.concatenate(parts, axis=-1)


@pytest.mark.parametrize("fmt", K_QUANTS)
def test_decoded_blocks_are_packed_to_the_same_bytes(fmt):
    blocks = draw_blocks(fmt)
    np.testing.assert_array_equal(pack_k_quant(decode(blocks, fmt), fmt), blocks)


def test_blocks_of_one_value_are_nearly_exact():
    """Zeros are exact. Other values are rounded with a scale in float16."""
    for value in (0.0, 0.3, -0.3):
        x = np.full((2, 512), value, np.float32)
        for fmt in K_QUANTS:
            decoded = decode(pack_k_quant(x, fmt), fmt)
            # Scales have 6 bits, and are rounded to half of one in 63.
            np.testing.assert_array_less(np.abs(decoded - x), abs(value) / 126 + 1e-30)


def test_errors_are_smaller_than_those_of_a_grid_over_the_range():
    """The nearest of 2**bits numbers over the range of a group is off by a uniform
    error, whose mean square is a twelfth of the squared step."""
    x = np.random.default_rng(0).standard_t(4, (64, 1024)).astype(np.float32)
    groups = x.reshape(-1, 32)
    for fmt, bits in (("Q4_K", 4), ("Q5_K", 5)):
        steps = np.ptp(groups, axis=-1) / (2**bits - 1)
        error = decode(pack_k_quant(x, fmt), fmt) - x
        assert np.mean(error**2) < np.mean(steps**2) / 12


# The layers in which llama.cpp's own test, test-quant-type-selection, expects more bits
# for attn_v and ffn_down. The sizes are the layers, inputs, inputs of ffn_down, heads,
# and heads of keys.
QWEN3_06B = [0, 1, 2, *range(5, 24, 3), *range(24, 28)]
GEMMA3_4B = [0, 1, 2, 3, *range(6, 28, 3), *range(29, 34)]
LLAMA_70B = [*range(10), *range(12, 70, 3), *range(70, 80)]
GPT_OSS = [0, 1, 2, 3, *range(6, 31, 3), *range(31, 36)]
HEADS = {
    "qwen3": {"token_embd": "Q4_K", "output": "Q6_K"},
    "gemma3": {"token_embd": "Q6_K"},
    "llama": {"token_embd": "Q4_K", "output": "Q6_K"},
    "gpt-oss": {"token_embd": "Q5_0", "output": "Q8_0"},
}


@pytest.mark.parametrize(
    "architecture, sizes, layers, formats",
    [
        ("qwen3", (28, 1024, 3072, 16, 8), QWEN3_06B, ("Q6_K", "Q4_K", "Q4_K")),
        ("gemma3", (34, 2560, 10240, 8, 4), GEMMA3_4B, ("Q6_K", "Q4_K", "Q4_K")),
        ("llama", (80, 8192, 28672, 64, 8), LLAMA_70B, ("Q6_K", "Q5_K", "Q4_K")),
        ("gpt-oss", (36, 2880, 2880, 64, 8), GPT_OSS, ("Q8_0", "Q5_0", "Q5_0")),
    ],
)
def test_each_tensor_has_the_format_that_llama_cpp_chooses(
    architecture, sizes, layers, formats
):
    num_layers, hidden_size, intermediate_size, *heads = sizes
    options = {"tie_embeddings": architecture == "gemma3", "head_dim": 64}
    config = DecoderConfig(
        320, hidden_size, intermediate_size, num_layers, *heads, **options
    )

    def choose(name, num_inputs=hidden_size):
        return q4_k_m_format(f"{name}.weight", num_inputs, config, architecture)

    more, value, usual = formats
    for name, expected in HEADS[architecture].items():
        assert choose(name) == expected
    for layer in range(num_layers):
        prefix, has_more = f"blk.{layer}.", layer in layers
        experts = "_exps" * (architecture == "gpt-oss")
        assert choose(f"{prefix}attn_v") == (more if has_more else value)
        down = choose(f"{prefix}ffn_down{experts}", intermediate_size)
        assert down == (more if has_more else usual)
        for name in ("attn_q", "attn_k", f"ffn_gate{experts}", f"ffn_up{experts}"):
            assert choose(prefix + name) == usual
        # The number of inputs is that of all heads, 4096 in gpt-oss.
        assert choose(f"{prefix}attn_output", 4096) == "Q4_K"


def test_models_with_eight_experts_have_more_bits_for_attention():
    """As in llama_tensor_get_type_impl of llama.cpp's llama-quant.cpp."""
    experts = Experts(8, 2, **MIXTRAL_EXPERTS)
    config = DecoderConfig(320, 4096, 14336, 32, 32, 8, experts=experts)
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_down_exps"]
    formats = [
        q4_k_m_format(f"blk.{layer}.{name}.weight", 4096, config, "llama")
        for layer in (0, 4)
        for name in names
    ]
    assert formats[:5] == ["Q4_K", "Q8_0", "Q8_0", "Q5_K", "Q6_K"]
    assert formats[5:] == ["Q4_K", "Q8_0", "Q8_0", "Q5_K", "Q4_K"]
    # 32 does not divide the number of inputs.
    assert q4_k_m_format("blk.0.attn_q.weight", 4080, config, "llama") == "F16"


@pytest.mark.slow
def test_a_file_has_the_mixture_and_is_read_again(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 8}
    folder = save_tiny(tmp_path / "model", **sizes)
    _, params = load(folder, progress=False)
    path = tmp_path / "model.gguf"
    save_gguf(path, folder, params, fmt="Q4_K_M", progress=False)
    fields = gguf.GGUFReader(str(path)).fields
    expected_type = gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert fields["general.file_type"].contents() == expected_type
    stored = stored_tensors(path)
    formats = {name: tensor.tensor_type.name for name, tensor in stored.items()}
    assert formats["token_embd.weight"] == "Q6_K"  # also the head
    assert formats["blk.3.attn_q.weight"] == formats["blk.2.attn_v.weight"] == "Q4_K"
    assert formats["blk.3.attn_v.weight"] == "Q6_K"
    # 256 does not divide 288.
    downs = [formats[f"blk.{layer}.ffn_down.weight"] for layer in range(8)]
    assert downs == ["Q8_0", "Q5_0", "Q5_0", "Q8_0", "Q5_0", "Q5_0", "Q8_0", "Q8_0"]
    assert formats["blk.0.attn_norm.weight"] == "F32"
    read = load(path, progress=False)[1]["layers"]
    value, down = "blk.3.attn_v.weight", "blk.3.ffn_down.weight"
    kernels = read["self_attn"]["v_proj"], read["mlp"]["down_proj"]
    for name, kernel in zip((value, down), kernels, strict=True):
        decoded = decode(stored[name].data, formats[name])
        np.testing.assert_array_equal(kernel["kernel"][3].T, decoded)


@pytest.mark.parametrize(
    ("module", "name", "fmt"),
    [
        ("mlp/up_proj", "ffn_up", "Q4_K"),
        ("self_attn/v_proj", "attn_v", "Q6_K"),
        ("mlp/down_proj", "ffn_down", "Q5_0"),
    ],
)
def test_weights_above_float16_fit_if_the_scales_of_blocks_do(
    tmp_path, module, name, fmt
):
    sizes = {"hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 2}
    folder = save_tiny(tmp_path / "model", **sizes)
    _, params = load(folder, progress=False)
    group, projection = module.split("/")
    leaf = params["layers"][group][projection]
    layer = 1 if fmt == "Q6_K" else 0
    options = {"fmt": "Q4_K_M", "tokenizer": False, "progress": False}
    path, tensor = tmp_path / "model.gguf", f"blk.{layer}.{name}.weight"
    kernel = np.asarray(leaf["kernel"])
    # The scale of a block is about the range of its weights, divided by the largest
    # code (15 or more) and, in K-quants, by the largest scale of a group.
    leaf["kernel"] = kernel * (3e5 / np.abs(kernel).max())
    save_gguf(path, folder, params, **options)
    stored = stored_tensors(path)[tensor]
    assert stored.tensor_type.name == fmt
    expected = leaf["kernel"][layer].T
    assert relative_error(decode(stored.data, fmt), expected) < 0.1
    # Float16 ends at 65504, so none of the formats has weights of more than 2.7e8.
    leaf["kernel"] = kernel * (1e10 / np.abs(kernel).max())
    with pytest.raises(ValueError, match=f"{name}.weight must fit Q"):
        save_gguf(path, folder, params, **options)


def test_a_packed_base_is_packed_again_with_a_warning(tmp_path):
    folder = save_tiny(tmp_path / "model")
    settings = ql.QLoRAConfig(fmt="nf4", block_size=32, targets="layers/mlp/.*/kernel")
    _, base = load(folder, qlora=settings, progress=False)
    options = {"fmt": "Q4_K_M", "tokenizer": False, "progress": False}
    with pytest.warns(UserWarning, match="in nf4 again, so they are rounded twice"):
        save_gguf(tmp_path / "model.gguf", folder, base, **options)


@pytest.mark.slow
def test_export_merges_an_adapter_into_the_weights_of_the_files(tmp_path):
    """Even if the adapter was trained on a packed base, as in a run's folder."""
    folder, adapter = save_tiny(tmp_path / "model"), tmp_path / "adapter.safetensors"
    _, params = load(folder, progress=False)
    qlora = ql.QLoRAConfig(fmt=None, rank=4, targets="layers/mlp/down_proj/kernel")
    _, lora = ql.init(jax.random.key(0), params, qlora)
    lora = jax.tree.map(lambda x: x + 0.2, lora)
    ql.io.save(adapter, lora, qlora)
    out = tmp_path / "model.gguf"
    rows = str(write_rows(tmp_path / "rows.jsonl", [{"text": "one two three"}]))
    settings = {"adapter": str(adapter), "gguf_type": "Q4_K_M", "data": rows}
    written = app.export(app.ExportConfig(folder, "gguf", str(out), **settings))
    assert written.losses is not None
    loss = app.score(app.ScoreConfig(model=str(out), data=rows)).loss
    assert_close(written.losses.file, loss)
    trees = params, load(out, progress=False)[1]
    kernel, read = (tree["layers"]["mlp"]["down_proj"]["kernel"] for tree in trees)
    factors = ql.leaves_by_path(lora)["layers/mlp/down_proj/kernel"]
    arrays = (np.asarray(x, np.float64) for x in (factors.a, factors.b))
    merged = kernel + factors.scaling * np.einsum("lkr,lrn->lkn", *arrays)
    assert relative_error(read, merged) < 0.1 < relative_error(read, kernel)


@pytest.mark.parametrize("name, value", [("fmt", "nf4"), ("block_size", 32)])
@pytest.mark.parametrize("gguf_type", ["Q4_0", "Q4_K_M"])
def test_options_of_training_are_refused_for_4_bits(gguf_type, name, value):
    settings = {"gguf_type": gguf_type, name: value}
    with pytest.raises(
        ValueError, match=f"`{name}` must be left out with .* {gguf_type}"
    ):
        app.ExportConfig("model", "gguf", "out.gguf", **settings)
