"""Models of google-tunix, which is independent of this library: wrap, train, merge.

The configs are small and the weights random. Tunix's `Einsum` and experts read their
kernels themselves.
"""

import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import randomized
from nnx_contract import assert_equals_merged
from tolerances import assert_close

import qlora_jax as ql

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("tunix")
    from tunix.models.gemma import model as gemma
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen3 import model as qwen3

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = dict(num_layers=2, embed_dim=32, hidden_dim=48, num_heads=4)
SIZES |= dict(head_dim=16, num_kv_heads=2)
LLAMA = SIZES | dict(vocab_size=60, rope_theta=10_000)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 7)))
ATTENTION_AND_MLP = r".*(q|k|v|o|gate|up|down)_proj/(w|kernel)"


def make_llama(remat=llama3.RematConfig.NONE):
    config = llama3.ModelConfig(
        norm_eps=1e-5, weight_tying=False, remat_config=remat, **LLAMA
    )
    return fill(llama3.Llama3(config, rngs=nnx.Rngs(0)))


def make_qwen_experts():
    config = qwen3.ModelConfig(
        norm_eps=1e-6, num_experts=4, num_experts_per_tok=2, **LLAMA
    )
    return fill(qwen3.Qwen3(config, rngs=nnx.Rngs(0)))


def make_gemma():
    options: dict[str, Any] = dict(num_embed=64, final_logit_softcap=30.0)
    options |= dict(use_post_attn_norm=True, use_post_ffw_norm=True)
    options |= dict(attention_types=[gemma.AttentionType.GLOBAL] * 2)
    config = gemma.ModelConfig(**options, **SIZES)
    return fill(gemma.Gemma(config, rngs=nnx.Rngs(0)))


def fill(model):
    """Draws random kernels, since some initializers of these models return zeros."""
    state = nnx.state(model, nnx.Param)

    def draw(x, y):
        return 2 * y if x.ndim > 1 else x

    nnx.update(model, jax.tree.map(draw, state, randomized(state)))
    return model


def logits(model, tokens=TOKENS):
    length = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    mask = jnp.tril(jnp.ones((length, length), bool))[None].repeat(len(tokens), 0)
    return model(tokens, positions, None, mask)[0]


MODELS = {
    "llama3": (make_llama, ATTENTION_AND_MLP + "|lm_head/w"),
    "llama3_remat": (lambda: make_llama(llama3.RematConfig.DECODER), ATTENTION_AND_MLP),
    "qwen3_experts": (make_qwen_experts, ATTENTION_AND_MLP + "|.*/mlp/.*_proj"),
    "gemma": (make_gemma, ".*_einsum/w|.*/mlp/.*_proj/kernel|.*/input_embedding"),
}


@pytest.mark.parametrize("name", MODELS)
def test_wrapped_model_equals_the_model_on_its_merged_weights(name):
    make, targets = MODELS[name]
    model = make()
    paths = nnx.to_flat_state(nnx.state(model, nnx.Param)).paths
    names = ["/".join(map(str, path)) for path in paths]
    config = ql.QLoRAConfig(rank=4, alpha=8, targets=targets, block_size=16)
    wrapped = ql.nnx.wrap(model, config, rngs=nnx.Rngs(1))
    names = [path for path in names if re.fullmatch(targets, path)]
    assert_equals_merged(wrapped, model, logits, names)
    if name == "qwen3_experts":  # no array has the weights of all four in float
        program = nnx.jit(logits).lower(wrapped).as_text()
        assert not re.search("<4x(32x48|48x32)xf32>", program)


def test_geometry_is_read_from_the_equation_a_module_carries():
    config = ql.QLoRAConfig(rank=4, targets=ATTENTION_AND_MLP, block_size=16)
    wrapped: Any = ql.nnx.wrap(make_llama(), config, rngs=nnx.Rngs(1))
    attention = wrapped.layers[0].attn
    assert attention.q_proj.w_lora.a.shape == (32, 4)  # BTD,DNH->BTNH
    assert attention.o_proj.w_lora.a.shape == (64, 4)  # BTNH,NHD->BTD


def test_registered_einsum_takes_the_fast_path():
    ql.nnx.register(llama3.Einsum, kernel="w", einsum="einsum_str")
    config = ql.QLoRAConfig(
        rank=4, targets=ATTENTION_AND_MLP, dropout=0.5, block_size=16
    )
    wrapped = ql.nnx.wrap(make_llama(), config, rngs=nnx.Rngs(1))
    nnx.update(wrapped, randomized(nnx.state(wrapped, nnx.LoRAParam)))
    assert not np.array_equal(logits(wrapped), logits(wrapped))
    wrapped.eval()
    assert_close(logits(wrapped), logits(ql.nnx.merge(wrapped)))


def test_without_registration_dropout_is_refused_by_name():
    targets = r".*_einsum/w"
    config = ql.QLoRAConfig(rank=4, targets=targets, dropout=0.5)
    with pytest.raises(ValueError, match=r"layers/1/attn/q_einsum/w: Einsum reads it"):
        ql.nnx.wrap(make_gemma(), config, rngs=nnx.Rngs(1))
