"""Kinds of layers on a mesh, with splash attention and with recomputation.

tests/interop compares what they compute with transformers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm.models.checkpoint import abstract_params
from qlora_jax.llm.models.config import (
    DecoderConfig,
    DeltaRule,
    Experts,
    Heads,
    LayerKind,
    Rope,
)
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.sharding import place_arguments
from qlora_jax.llm.models.stream import Stream
from qlora_jax.llm.models.tiny import random_params

SIZES = 64, 32, 48, 4, 4, 2
# As in Gemma 4 E2B: the last two layers attend to keys and values of the first two.
SLIDING = LayerKind(window=3, kv_group="sliding")
FULL = LayerKind(Rope(dim=16, num_pairs=2), kv_group="full", heads=Heads(1, 16, True))
SHARED = DecoderConfig(
    *SIZES,
    layers=(
        *(SLIDING, FULL),
        LayerKind(window=3, kv_group="sliding", has_kv=False, mlp_width=96),
        LayerKind(FULL.rope, kv_group="full", has_kv=False, heads=FULL.heads),
    ),
    qk_norms=True,
    value_norms=True,
    per_layer_width=4,
    output_scalars=True,
    attention_scale=1.0,
)
MIXED = DecoderConfig(
    *SIZES, layers=(LayerKind(None, delta_rule=DeltaRule(2, 4, 8, 6)), LayerKind()) * 2
)
# As in Gemma 4 26B-A4B: layers with an MLP and experts.
BOTH = Experts(6, 2, width=16, joined="halves", beside_mlp=True)
BESIDE = DecoderConfig(*SIZES, post_norms=True, experts=BOTH)
CONFIGS = {"shared": SHARED, "mixed": MIXED, "beside": BESIDE}
TOKENS = np.random.default_rng(1).integers(0, 64, (2, 12)).astype(np.int32)


def compute_logits(config, params, **settings):
    model = Decoder(config, **settings)
    return jax.jit(model.apply)({"params": params}, TOKENS)


@pytest.mark.newest
def test_splash_attention_computes_the_same():
    params = random_params(SHARED)
    splash = functools.partial(ql.memory.splash_attention, interpret=True)
    expected = compute_logits(SHARED, params)
    assert_close(compute_logits(SHARED, params, attention=splash), expected)


def test_tiles_of_tokens_have_the_same_experts():
    params = random_params(BESIDE)
    expected = compute_logits(BESIDE, params)
    assert_close(compute_logits(BESIDE, params, mlp_tile=5), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_recomputed_layers_have_the_same_gradients(name):
    params = random_params(CONFIGS[name])

    def gradients(remat):
        model = Decoder(CONFIGS[name], remat=remat)

        def loss(params):
            return jnp.mean(jnp.square(model.apply({"params": params}, TOKENS)))

        return jax.jit(jax.grad(loss))(params)

    expected = gradients(False)
    # All parameters have gradients, those of shared keys and values too.
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(expected))
    assert_close(gradients(True), expected)


def test_a_mesh_splits_heads_and_widths():
    mesh = AbstractMesh((2, 2), ("fsdp", "tensor"))

    def rules_of(config):
        return place_arguments(config, abstract_params(config), mesh)["rules"]

    outputs = None, "fsdp", "tensor"
    # The full layers have one key head, which the mesh cannot split.
    shared = rules_of(SHARED)
    keys = {p: tuple(x) for p, x in shared.items() if p.endswith("k_proj/kernel")}
    assert keys and all("tensor" not in spec for spec in keys.values())
    beside = rules_of(BESIDE)
    assert tuple(beside["layers/mlp/dense/gate_proj/kernel"]) == outputs
    experts = beside["layers/mlp/experts/gate_up_proj/kernel"]
    assert tuple(experts) == (None, *outputs)
    mixed = rules_of(MIXED)
    linear = "layers/layer_0/linear_attn"
    assert tuple(mixed[f"{linear}/in_proj_qkv/kernel"]) == outputs
    assert tuple(mixed[f"{linear}/out_proj/kernel"]) == (None, "tensor", "fsdp")


@pytest.mark.newest
def test_a_stream_continues_layers_without_a_cache_of_their_own():
    params = random_params(SHARED)
    stream = Stream(Decoder(SHARED), {"params": params})
    prompt = TOKENS[0].tolist()
    tokens = [*stream(prompt, max_new_tokens=4, eos_ids=[])]
    row = np.array([[*prompt, *tokens]])
    logits = jax.jit(Decoder(SHARED).apply)({"params": params}, row)
    likeliest = jnp.argmax(logits[0, len(prompt) - 1 : -1], axis=-1)
    assert likeliest.tolist() == tokens
