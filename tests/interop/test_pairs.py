"""What `pairs` calls exact for mlx-lm is computed there as it is here."""

import jax
import llama
import numpy as np
import pytest
from clients import mlx_logits
from configs import EXPERTS, LINEAR, LLAMA3, OLMOE, SIZES, YARN, longrope, random_model
from helpers import relative_error, trees_of
from stored import export
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.models.checkpoint import load
from qlora_jax.models.decoder import Decoder

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = np.random.default_rng(0).integers(3, 64, (1, 24))
HEADS = {"head_dim": 16, "hidden_size": 64}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
WINDOW = {"sliding_window": 8}
USED = WINDOW | {"use_sliding_window": True, "max_window_layers": 1}
LOCAL = {"full_attention": LINEAR | {"rope_theta": 1e6}}
LOCAL |= {"sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}
MIXTRAL = {"num_local_experts": 4}
# Options that count, by family, and whether mlx-lm computes them.
CASES = {
    "llama": (THETA | {"attention_bias": True, "mlp_bias": True}, True),
    "llama, llama3": ({"rope_parameters": LLAMA3}, True),
    "llama, yarn": ({"rope_parameters": YARN | {"truncate": False}}, False),
    "mistral": (THETA | {"sliding_window": None}, True),
    "mistral, window": (WINDOW, False),
    "qwen2": (THETA, True),
    "qwen2, window": (USED, False),
    "qwen3": (HEADS | THETA, True),
    "qwen3, window": (HEADS | USED, False),
    "qwen3_moe": (HEADS | EXPERTS | THETA, True),
    "mixtral": (MIXTRAL | THETA, True),
    "mixtral, linear": (MIXTRAL | {"rope_parameters": LINEAR}, False),
    "olmoe": (OLMOE | THETA, True),
    "gemma2": (HEADS | THETA, True),
    "gemma2, window": (HEADS | WINDOW, False),
    "gemma3_text": (
        HEADS | WINDOW | {"num_hidden_layers": 7, "rope_parameters": LOCAL},
        True,
    ),
    "smollm3": (THETA | {"num_hidden_layers": 4}, True),
    "phi3": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, True),
    "phi3, longrope": (longrope(4, original=512), False),
    "phi3, window": (WINDOW, False),
}


@pytest.mark.parametrize("name", CASES)
def test_mlx_computes_what_is_called_exact(name, tmp_path):
    settings, is_exact = CASES[name]
    model, out = tmp_path / "model", tmp_path / "out"
    random_model(name.split(",")[0], SIZES | settings).save_pretrained(model)
    config, params = load(model, progress=False)
    targets = "layers/self_attn/.*_proj/kernel"
    base, lora = trees_of(params, fmt=None, rank=2, targets=targets)
    ql.io.save(tmp_path / "a", lora, ql.QLoRAConfig(fmt=None))
    pair = export(model, None, out, tmp_path / "a", server="mlx").pair
    assert pair.exact == is_exact
    got = mlx_logits(TOKENS, out / "base", out / "adapter")
    logits = jax.jit(Decoder(config).apply)
    bare, want = (logits({"params": x}, TOKENS) for x in (base, ql.merge(base, lora)))
    assert relative_error(bare, want) > 0.05
    if is_exact:
        assert_close(got, want)
    theirs = llama.logits_of(llama.their_model(out / "base"), TOKENS)
    assert_close(theirs, bare)  # transformers reads both forms
