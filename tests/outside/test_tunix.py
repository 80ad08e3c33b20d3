"""Models of google-tunix, which is independent of this library: wrap, train, merge.

Small configs, random weights. Its `Einsum` and experts read their kernels themselves.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qlora_jax as ql

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("tunix")
    from tunix.models.gemma import model as gemma
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen3 import model as qwen3

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "embed_dim": 32,
    "hidden_dim": 48,
    "num_heads": 4,
    "head_dim": 16,
    "num_kv_heads": 2,
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 7)))
ATTENTION_AND_MLP = r".*(q|k|v|o|gate|up|down)_proj/(w|kernel)"


@pytest.fixture(autouse=True)
def rank_promotion():
    with jax.numpy_rank_promotion("allow"):
        yield


def make_llama(remat=llama3.RematConfig.NONE):
    config = llama3.ModelConfig(
        vocab_size=60,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=False,
        remat_config=remat,
        **SIZES,
    )
    return fill(llama3.Llama3(config, rngs=nnx.Rngs(0)))


def make_qwen_experts():
    config = qwen3.ModelConfig(
        vocab_size=60,
        rope_theta=10_000,
        norm_eps=1e-6,
        num_experts=4,
        num_experts_per_tok=2,
        **SIZES,
    )
    return fill(qwen3.Qwen3(config, rngs=nnx.Rngs(0)))


def make_gemma():
    config = gemma.ModelConfig(
        num_embed=60,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=[gemma.AttentionType.GLOBAL] * 2,
        **SIZES,
    )
    return fill(gemma.Gemma(config, rngs=nnx.Rngs(0)))


def fill(model):
    """Random kernels: some of the models' initializers give zeros."""
    state = nnx.state(model, nnx.Param)
    leaves, treedef = jax.tree.flatten(state)
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype)
    leaves = [draw(x) if x.ndim > 1 else x for x in leaves]
    nnx.update(model, jax.tree.unflatten(treedef, leaves))
    return model


def logits(model, tokens=TOKENS):
    length = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    mask = jnp.tril(jnp.ones((length, length), bool))[None].repeat(len(tokens), 0)
    return model(tokens, positions, None, mask)[0]


def randomize_b(model):
    state = nnx.state(model, nnx.LoRAParam)
    leaves, treedef = jax.tree.flatten(state)
    rng = np.random.default_rng(2)
    leaves = [x + 0.05 * jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves]
    nnx.update(model, jax.tree.unflatten(treedef, leaves))
    return model


def assert_close(x, y, tolerance=1e-5):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


MODELS = {
    "llama3": (make_llama, ATTENTION_AND_MLP + "|lm_head/w", 15),
    "llama3_remat": (
        lambda: make_llama(llama3.RematConfig.DECODER),
        ATTENTION_AND_MLP,
        14,
    ),
    "qwen3_experts": (
        make_qwen_experts,
        ATTENTION_AND_MLP + r"|.*/mlp/(gate|up|down)_proj",
        14,
    ),
    "gemma": (
        make_gemma,
        r".*_einsum/w|.*/mlp/.*_proj/kernel|embedder/input_embedding",
        13,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_wrapped_model_equals_the_model_on_its_merged_weights(name):
    make, targets, count = MODELS[name]
    model = make()
    config = ql.QLoRAConfig(rank=4, alpha=8, targets=targets)
    wrapped = ql.nnx.wrap(model, config, rngs=nnx.Rngs(1))
    assert len(nnx.to_flat_state(nnx.state(wrapped, ql.nnx.Packed))) == count
    assert len(nnx.to_flat_state(nnx.state(wrapped, nnx.LoRAParam))) == 2 * count
    assert_close(logits(wrapped), logits(ql.nnx.merge(wrapped)))  # B = 0: dequantized
    error = np.linalg.norm(logits(wrapped) - logits(model))
    assert 0 < error < 0.5 * np.linalg.norm(logits(model))
    randomize_b(wrapped)
    merged = ql.nnx.merge(wrapped)
    assert_close(logits(wrapped), logits(merged))
    assert nnx.graphdef(merged) == nnx.graphdef(model)


@pytest.mark.parametrize("name", MODELS)
def test_wrapped_model_learns_and_keeps_its_base(name):
    make, targets, _ = MODELS[name]
    config = ql.QLoRAConfig(rank=4, alpha=8, targets=targets)
    wrapped = ql.nnx.wrap(make(), config, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(wrapped, optax.adamw(2e-2), wrt=nnx.LoRAParam)
    before = jax.tree.map(np.array, nnx.state(wrapped, nnx.Not(nnx.LoRAParam)))

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            predicted = logits(model)[:, :-1]
            losses = optax.softmax_cross_entropy_with_integer_labels(
                predicted.astype(jnp.float32), TOKENS[:, 1:]
            )
            return losses.mean()

        wrt = nnx.DiffState(0, nnx.LoRAParam)
        value, grads = nnx.value_and_grad(loss, argnums=wrt)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(wrapped, optimizer)) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    after = nnx.state(wrapped, nnx.Not(nnx.LoRAParam))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_gradients_equal_those_of_the_merged_model():
    config = ql.QLoRAConfig(rank=4, alpha=8, targets=ATTENTION_AND_MLP)
    wrapped = randomize_b(ql.nnx.wrap(make_llama(), config, rngs=nnx.Rngs(1)))
    loss = lambda model: jnp.sum(jnp.sin(logits(model)))
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.grad(loss, argnums=wrt)(wrapped)
    grad_w = nnx.grad(loss)(ql.nnx.merge(wrapped))
    _, lora = ql.nnx.split(wrapped)
    for name in ("q_proj", "o_proj"):
        adapter = lora["layers"]["1"]["attn"][name]["w"]
        g = grad_w["layers"][1]["attn"][name]["w"].get_value()
        g = np.asarray(adapter.geometry.to_matrix(g))
        found = grads["layers"][1]["attn"][name]["w_lora"]["a"].get_value()
        assert_close(found, 2 * g @ np.asarray(adapter.b).T, 1e-4)


def test_geometry_is_read_from_the_equation_a_module_carries():
    config = ql.QLoRAConfig(rank=4, targets=ATTENTION_AND_MLP)
    wrapped: Any = ql.nnx.wrap(make_llama(), config, rngs=nnx.Rngs(1))
    attention = wrapped.layers[0].attn
    assert attention.q_proj.w_lora.a.shape == (32, 4)  # BTD,DNH->BTNH
    assert attention.o_proj.w_lora.a.shape == (64, 4)  # BTNH,NHD->BTD


def test_registered_einsum_takes_the_fast_path():
    ql.nnx.register(llama3.Einsum, kernel="w", einsum="einsum_str")
    config = ql.QLoRAConfig(rank=4, targets=ATTENTION_AND_MLP, dropout=0.5)
    wrapped = randomize_b(ql.nnx.wrap(make_llama(), config, rngs=nnx.Rngs(1)))
    assert not np.array_equal(logits(wrapped), logits(wrapped))
    wrapped.eval()
    assert_close(logits(wrapped), logits(ql.nnx.merge(wrapped)))


def test_without_registration_dropout_is_refused_by_name():
    targets = r".*_einsum/w"
    config = ql.QLoRAConfig(rank=4, targets=targets, dropout=0.5)
    with pytest.raises(ValueError, match=r"layers/1/attn/q_einsum/w: Einsum reads it"):
        ql.nnx.wrap(make_gemma(), config, rngs=nnx.Rngs(1))
