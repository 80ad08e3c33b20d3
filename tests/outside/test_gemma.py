"""The transformer of the `gemma` package, which is independent of this library.

A small config with random weights. Its `Einsum` takes the equation in the call and
reads its kernel itself; the feed-forward block has two kernels in one scope, by
`nn.share_scope`; the call is under `nn.jit`.
"""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_bits, randomized
from name_tables import gemma_names
from stored import draw_peft, tensors_of
from tolerances import assert_close

import qlora_jax as ql

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("gemma")
    from gemma.gm.nn import _config, _layers, _modules, _transformer

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 60, (2, 7)))
TARGETS = r".*/(q_einsum|kv_einsum|qkv_einsum|attn_vec_einsum)/w|.*/mlp/.*"
KERNELS = {
    "q_einsum": ((4, 32, 16), (32, 64)),
    "kv_einsum": ((2, 2, 32, 16), (32, 64)),
    "qkv_einsum": ((3, 4, 32, 16), (32, 192)),
    "attn_vec_einsum": ((4, 16, 32), (64, 32)),
}


def make_model(num_kv_heads: int, transpose: bool):
    kinds = _modules.AttentionType
    sizes = dict(num_embed=64, embed_dim=32, hidden_dim=48, num_heads=4, head_dim=16)
    sizes |= dict(num_kv_heads=num_kv_heads, sliding_window_size=4)
    options = dict(use_post_attn_norm=True, use_post_ffw_norm=True, use_qk_norm=True)
    options |= dict(attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL))
    options |= dict(final_logit_softcap=30.0, transpose_gating_einsum=transpose)
    config = _config.TransformerConfig(**sizes, **options)
    model = _transformer.Transformer(config=config, dtype=jnp.float32)
    params = model.init(jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(1)

    def draw(x):
        return jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype)

    return model, jax.tree.map(lambda x: draw(x) if x.ndim > 1 else x, params)


def wrap(num_kv_heads=2, transpose=True):
    model, params = make_model(num_kv_heads, transpose)
    # The module takes its equation in the call, so a trace cannot read it.
    contract = {r".*/attn_vec_einsum/w": (-3, -2)}
    config = ql.QLoRAConfig(
        rank=4, alpha=8, targets=TARGETS, contract=contract, block_size=16
    )
    base, lora = ql.linen.init(jax.random.key(2), model, params, config, TOKENS)
    return model, ql.linen.wrap(model), base, lora


@pytest.mark.parametrize(
    ("num_kv_heads", "transpose"), [(2, True), (2, False), (4, True), (1, True)]
)
def test_wrapped_model_equals_the_model_on_merged_weights(num_kv_heads, transpose):
    model, wrapped, base, lora = wrap(num_kv_heads, transpose)

    def run(lora):
        return wrapped.apply({"params": base, "lora": lora}, TOKENS).logits

    dequantized = ql.dequantize(base)
    assert_close(run(lora), model.apply({"params": dequantized}, TOKENS).logits)
    lora = randomized(lora)
    merged = ql.merge(base, lora)
    assert_close(run(lora), model.apply({"params": merged}, TOKENS).logits)


def test_every_kernel_is_packed_along_what_its_equation_contracts():
    _, _, base, lora = wrap(transpose=False)
    for layer in ("layer_0", "layer_1"):
        for name, kernel in base[layer]["attn"].items():
            if name in KERNELS:
                shape, (k, n) = KERNELS[name]
                adapter = lora[layer]["attn"][name]["w"]
                assert kernel["w"].shape == shape
                assert adapter.a.shape[-2] == k
                assert np.prod(adapter.a.shape[:-2]) * adapter.b.shape[-1] == n
        mlp = lora[layer]["mlp"]
        assert mlp["gating_einsum"].a.shape[-2] == 32
        assert mlp["linear"].a.shape == (48, 4)


def test_gradients_equal_those_of_the_merged_model():
    model, wrapped, base, lora = wrap()
    lora = randomized(lora)

    def loss(lora):
        logits = wrapped.apply({"params": base, "lora": lora}, TOKENS).logits
        return jnp.sum(jnp.square(logits))

    def float_loss(params):
        return jnp.sum(jnp.square(model.apply({"params": params}, TOKENS).logits))

    grads, grad_w = jax.grad(loss)(lora), jax.grad(float_loss)(ql.merge(base, lora))
    for layer, path in [("layer_0", ("attn", "q_einsum", "w")), ("layer_1", ("mlp",))]:
        parts = [layer, *path] if path != ("mlp",) else [layer, "mlp", "linear"]
        adapter_grads, g, adapter = grads, grad_w, lora
        for part in parts:
            adapter_grads, g, adapter = adapter_grads[part], g[part], adapter[part]
        g = np.asarray(adapter.geometry.to_matrix(g))
        assert_close(
            adapter_grads.a, 2 * g @ np.swapaxes(np.asarray(adapter.b), -1, -2)
        )


class Registered(_layers.Einsum):
    pass


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Registered((4, 32, 16), name="heads")("BTD,NDH->BTNH", x)


def test_registered_einsum_takes_the_fast_path():
    ql.linen.register(Registered, kernel="w", einsum="eqn")
    model, x = Heads(), jnp.ones((2, 3, 32))
    params = model.init(jax.random.key(0), x)["params"]
    config = ql.QLoRAConfig(rank=4, targets=r"heads/w", block_size=16)
    base, lora = ql.linen.init(jax.random.key(1), model, params, config, x)
    assert lora["heads"]["w"].a.shape == (32, 4)
    lora = randomized(lora)
    y = ql.linen.wrap(model).apply({"params": base, "lora": lora}, x)
    assert_close(y, model.apply({"params": ql.merge(base, lora)}, x))


def merged_by_hand(params, deltas, num_kv_heads, transpose):
    """Adds what adapters add to Hugging Face's weights `[out, in]`.

    Follows the package's conversion: heads are rows of q, k and v, and columns of o.
    """
    params = jax.tree.map(np.array, params)

    def split_heads(delta):  # [N * H, D] -> [N, D, H]
        return delta.reshape(-1, 16, 32).swapaxes(1, 2)

    for layer in range(2):
        d = {n: deltas[f"model.layers.{layer}.{n}"] for n in PROJECTIONS}
        attention = params[f"layer_{layer}"]["attn"]
        mlp = params[f"layer_{layer}"]["mlp"]
        q, k, v = (split_heads(d[f"self_attn.{n}_proj"]) for n in "qkv")
        if num_kv_heads == 4:
            attention["qkv_einsum"]["w"] += np.stack([q, k, v])
        else:
            attention["q_einsum"]["w"] += q
            attention["kv_einsum"]["w"] += np.stack([k, v])
        attention["attn_vec_einsum"]["w"] += d["self_attn.o_proj"].T.reshape(4, 16, 32)
        gate_up = np.stack([d["mlp.gate_proj"], d["mlp.up_proj"]])
        mlp["gating_einsum"] += gate_up if transpose else gate_up.swapaxes(1, 2)
        mlp["linear"] += d["mlp.down_proj"].T
    return params


PROJECTIONS = [f"self_attn.{n}_proj" for n in "qkvo"]
PROJECTIONS += [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


@pytest.mark.parametrize(("num_kv_heads", "transpose"), [(2, True), (4, False)])
def test_adapter_of_peft_is_that_of_the_same_weights(num_kv_heads, transpose, tmp_path):
    model, params = make_model(num_kv_heads, transpose)
    names = gemma_names(qkv_einsum=num_kv_heads == 4, transpose_gating_einsum=transpose)
    sizes = {"q": (64, 32), "o": (32, 64), "gate": (48, 32), "up": (48, 32)}
    sizes |= {"k": (16 * num_kv_heads, 32), "v": (16 * num_kv_heads, 32)}
    sizes["down"] = (32, 48)

    def size_of(name):
        return sizes[name.split(".")[1].removesuffix("_proj")]

    modules = {f"model.layers.{i}.{n}": size_of(n) for i in (0, 1) for n in PROJECTIONS}
    factors = draw_peft(tmp_path, modules, target_modules=".*_proj")
    deltas = {module: 2 * b @ a for module, (a, b) in factors.items()}
    base, lora, peft_config = ql.io.load_peft(tmp_path, params, names)
    run = ql.linen.wrap(model).apply
    logits = run({"params": base, "lora": lora}, TOKENS).logits
    expected = merged_by_hand(params, deltas, num_kv_heads, transpose)
    assert_close(logits, model.apply({"params": expected}, TOKENS).logits)
    before = model.apply({"params": params}, TOKENS).logits
    assert np.abs(before - logits).max() > 0.1
    ql.io.save_peft(tmp_path / "again", base, lora, names, peft_config)
    assert_same_bits(tensors_of(tmp_path / "again"), tensors_of(tmp_path))
