"""Each pair of files of `qlora-jax export --for`, in the server's own program.

The cells are those of `SERVERS`: each server that runs on a CPU here, with each number
format that it has a base for, on configs whose options change the logits. Where a cell
is called exact, the server must compute our logits.
"""

import random

import jax
import llama
import numpy as np
import peft
import pytest
import torch
import transformers
from clients import llama_cpp, log_probabilities, mlx_logits
from configs import EXPERTS, LINEAR, LLAMA3, OLMOE, SIZES, YARN, longrope, random_model
from helpers import SEED, relative_error, trees_of
from stored import export
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.io.model_folder import read_config_json
from qlora_jax.llm.app.servers import SERVERS
from qlora_jax.llm.models import tiny
from qlora_jax.llm.models.checkpoint import load

pytestmark = pytest.mark.filterwarnings("ignore")

# Blocks of 32 and of 64 fit.
SIZES = SIZES | {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 272}
SIZES |= {"initializer_range": 0.1}  # activations in float16 lose little
TOKENS = np.random.default_rng(0).integers(3, 256, (1, 24))
HEADS = {"head_dim": 32}  # not the hidden size by the heads
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
WINDOW = {"sliding_window": 8}
WINDOW_OF_LAYERS = WINDOW | {"use_sliding_window": True, "max_window_layers": 1}
LOCAL = {"full_attention": LINEAR | {"rope_theta": 1e6}}
LOCAL |= {"sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}
MIXTRAL = {"num_local_experts": 4}
GPT_OSS = MIXTRAL | {"num_experts_per_tok": 2, "head_dim": 16}
# Options that change the logits, by family, and whether mlx-lm 0.32 computes them: what
# its source says, and the test below sees.
CASES = {
    "llama": (THETA | {"attention_bias": True, "mlp_bias": True}, True),
    "llama, llama3": ({"rope_parameters": LLAMA3}, True),
    "llama, yarn": ({"rope_parameters": YARN | {"truncate": False}}, False),
    "mistral": (THETA | {"sliding_window": None}, True),
    "mistral, window": (WINDOW, False),
    "qwen2": (THETA, True),
    "qwen2, window": (WINDOW_OF_LAYERS, False),
    "qwen3": (HEADS | THETA, True),
    "qwen3, window": (HEADS | WINDOW_OF_LAYERS, False),
    "qwen3_moe": (HEADS | EXPERTS | THETA, True),
    "mixtral": (MIXTRAL | THETA, True),
    "mixtral, linear": (MIXTRAL | {"rope_parameters": LINEAR}, False),
    "olmoe": (OLMOE | THETA, True),
    "gpt_oss": (GPT_OSS | {"rope_parameters": LINEAR}, False),
    "gemma2": (HEADS | THETA, True),
    "gemma2, window": (HEADS | WINDOW, False),
    "gemma3_text": (
        HEADS | WINDOW | {"num_hidden_layers": 7, "rope_parameters": LOCAL},
        True,
    ),
    "smollm3": (THETA | {"num_hidden_layers": 4}, True),
    "phi3": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, True),
    "phi3, longrope": (longrope(8, original=512), False),
    "phi3, window": (WINDOW, False),
    "olmo2": (THETA | {"attention_bias": True}, True),
}
# Cases for mlx-lm alone: other tests compare the other clients for these families.
ONLY_MLX = ("olmo2",)


def run_mlx(base, adapter):
    return mlx_logits(TOKENS, base, adapter)


def run_llama_cpp(base, adapter):
    """Returns the log-probabilities of the token after the last alone."""
    with llama_cpp(base, adapter) as ask:
        return log_probabilities(ask, TOKENS[0].tolist())


def run_transformers(base, adapter):
    packed = {}
    if "format" in read_config_json(base).get("quantization_config", {}):
        # PEFT adds nothing to modules that stay packed.
        plain = transformers.CompressedTensorsConfig(run_compressed=False)
        packed = {"quantization_config": plain}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager", **packed
    )
    # In evaluation, bitsandbytes packs weights anew on CPUs with products in bfloat16.
    adapted = peft.PeftModel.from_pretrained(model.train(), adapter).train()
    return llama.logits_of(adapted, TOKENS)


CLIENTS = {
    "mlx": run_mlx,
    "llama.cpp": run_llama_cpp,
    "transformers": run_transformers,
}
NEED_A_GPU = ("vllm", "sglang")
NEVER_EXACT = ("ollama",)  # it takes no adapter beside a base
# What clients round on their way: scales to the dtype of the model, products with Q4_0
# to 8 bits, decoded E2M1 to bfloat16. Other cells are exact in float32.
ROUNDED = {
    ("mlx", "int4_f16"): 1e-2,
    ("mlx", "q4_0"): 1e-2,
    ("llama.cpp", "int4_f16"): 3e-2,
    ("llama.cpp", "q4_0"): 3e-2,
    ("transformers", "int4_f16"): 2e-3,
    ("transformers", "q4_0"): 2e-3,
    ("transformers", "mxfp4"): 2e-2,
    ("transformers", "nvfp4"): 2e-2,
}


def list_cells():
    """Returns the server, the number format and the case of each cell.

    Two cases are drawn where weights are packed and the options of a config are
    computed by the same code as for floats, or are all computed (by transformers).
    """
    draw, cells = random.Random(SEED), []
    for server in CLIENTS:
        for fmt in (None, *SERVERS[server].bases):
            pool = [x for x in CASES if server == "mlx" or x not in ONLY_MLX]
            is_drawn = fmt is not None and (server, fmt) != ("llama.cpp", "int4_f16")
            cases = draw.sample(pool, 2) if is_drawn else pool
            cells += [(server, fmt, case) for case in cases]
    return cells


def test_each_server_has_its_client():
    assert SERVERS.keys() == {*CLIENTS, *NEED_A_GPU, *NEVER_EXACT}
    assert all(SERVERS[server].adapter is None for server in NEVER_EXACT)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Returns a function that writes a case's model, once, and gives its folder."""
    folders = {}

    def write(case):
        if case not in folders:
            folders[case] = folder = tmp_path_factory.mktemp("models") / "model"
            kind, (settings, _) = case.split(",")[0], CASES[case]
            random_model(kind, SIZES | settings).save_pretrained(folder)
            tiny.byte_tokenizer().save(str(folder / "tokenizer.json"))
        return folders[case]

    return write


@pytest.mark.parametrize("server, fmt, case", list_cells())
def test_what_is_called_exact_has_our_logits(models, tmp_path, server, fmt, case):
    model, out, adapter = models(case), tmp_path / "out", tmp_path / "adapter"
    config, params = load(model, progress=False)
    targets = "layers/self_attn/.*_proj/kernel"
    base, lora = trees_of(params, fmt=None, rank=2, targets=targets)
    ql.io.save(adapter, lora, ql.QLoRAConfig(fmt=None))
    packing = {} if fmt is None else {"fmt": fmt}
    if fmt in ("int4_f16", "q4_0"):
        packing["block_size"] = 32
    try:
        row = export(model, None, out, adapter, server=server, **packing).pair
    except ValueError:  # llama.cpp does not compute all options of a config
        assert server == "llama.cpp"
        return
    is_of_mlx = (server, fmt) == ("mlx", None)
    if not (row.exact or is_of_mlx):
        return
    if fmt is not None:
        settings = ql.QLoRAConfig(targets=llama.PACKED, **packing)
        _, base = load(model, qlora=settings, progress=False)
    bare, want = (llama.our_logits(config, base, x, TOKENS) for x in (None, lora))
    assert relative_error(bare, want) > 0.05
    if is_of_mlx:
        assert row.exact == CASES[case][1]
        theirs = llama.logits_of(llama.their_model(out / "base"), TOKENS)
        assert_close(theirs, bare)  # transformers reads both forms of keys
    suffix = ".gguf" if server == "llama.cpp" else ""
    written = (out / f"{part}{suffix}" for part in ("base", "adapter"))
    base_path, adapter_path = (x if x.exists() else model for x in written)
    if is_of_mlx and case == "gpt_oss":  # mlx-lm has other names for the experts
        with pytest.raises(ValueError, match="parameters not in model"):
            run_mlx(base_path, adapter_path)
        return
    got = CLIENTS[server](base_path, adapter_path)
    if got.ndim == 1:
        want = jax.nn.log_softmax(want[0, -1])
    bound = ROUNDED.get((server, fmt))
    if not row.exact:
        assert relative_error(got, want) > 0.01
    elif bound is None:
        assert_close(got, want)
    else:
        assert relative_error(got, want) < bound
