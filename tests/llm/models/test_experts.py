"""Mixtures of experts, packed and adapted; see also interop/."""

import json
import pathlib
import re
from dataclasses import replace
from functools import partial

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, trees_of
from jax.sharding import AbstractMesh
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm import train
from qlora_jax.llm.gguf.save import save_gguf, save_gguf_lora
from qlora_jax.llm.models.checkpoint import abstract_params, load, read_config
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.decoder_names import decoder_names
from qlora_jax.llm.models.experts import MixtureOfExperts, split_alternating
from qlora_jax.llm.models.families import config_from_hf
from qlora_jax.llm.models.jax_engine import LAYERS
from qlora_jax.llm.models.sharding import place_arguments
from qlora_jax.llm.models.tiny import CONFIG, save_tiny
from qlora_jax.llm.train.target_modules import find_target_paths

SIZES = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
QWEN = dict(model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], **SIZES)
QWEN |= dict(head_dim=16, norm_topk_prob=True, tie_word_embeddings=False)
QWEN |= dict(rms_norm_eps=2.0**-17)  # GGUF has it in float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("experts") / "base", **QWEN)


@pytest.mark.slow
def test_experts_are_packed_and_routers_are_not(folder):
    qlora = ql.QLoRAConfig(fmt="nf4", block_size=32, targets=LAYERS)
    config, base = load(folder, qlora=qlora, progress=False)
    mlp, names = base["layers"]["mlp"], decoder_names(config)
    up, router = mlp["experts"]["up_proj"]["kernel"], mlp["router"]["kernel"]
    assert (up.fmt, up.shape, router.shape) == ("nf4", (2, 4, 64, 32), (2, 64, 4))
    assert router.dtype == jnp.float32
    # Packing all experts together equals packing the tensor of each.
    tensors = ql.io.open_safetensors(folder)
    expert_weight = tensors["model.layers.1.mlp.experts.2.up_proj.weight"][...]
    packed_alone = ql.quantize(jnp.asarray(expert_weight.T), block_size=32)
    np.testing.assert_array_equal(up.codes[1, 2], packed_alone.codes)
    target_paths = find_target_paths("all-linear", base, names)
    assert [*target_paths] == [f"layers/self_attn/{x}_proj/kernel" for x in "koqv"]
    # Packed experts with adapters compute the same as their decoded weights.
    base, lora = trees_of(base, rank=2, targets="layers/.*_proj/kernel")
    tokens = jnp.arange(10).reshape(2, 5)
    model = ql.linen.wrap(Decoder(config, remat=True), scanned=Decoder.scanned)

    def output_and_gradients(model, base, lora):
        def apply(lora):
            return model.apply({"params": base, "lora": lora}, tokens)

        def loss(lora):
            return jnp.sum(jnp.square(apply(lora)))

        return apply(lora), jax.grad(loss)(lora)

    run = jax.jit(partial(output_and_gradients, model)).lower(base, lora)
    plain = ql.dequantize(base)
    expected = jax.jit(partial(output_and_gradients, model))(plain, lora)
    assert_close(run.compile()(base, lora), expected)
    # The program never decodes the weights of several experts at once.
    assert not re.search("tensor<(2x)?4x(64x32|32x64)xf32>", run.as_text())


@pytest.mark.slow
def test_routers_are_frozen_adapted_or_trained_by_pattern(folder):
    config, params = load(folder, progress=False)
    params = jax.tree.map(lambda x: x[0], params["layers"]["mlp"])
    model, x = MixtureOfExperts(config), jnp.asarray(normal(0, (2, 5, 64)))

    @partial(jax.jit, static_argnums=0)
    def gradient(model, params, lora):
        def variables(lora):
            return {"params": params, "lora": lora}

        def loss(lora):
            return jnp.sum(jnp.square(model.apply(variables(lora), x)))

        return jax.grad(loss)(lora)["router"]["kernel"]

    @jax.jit
    def float_gradient(params):
        def loss(params):
            return jnp.sum(jnp.square(model.apply({"params": params}, x)))

        return jax.grad(loss)(params)["router"]["kernel"]

    def init(**settings):
        return ql.init(
            jax.random.key(0), params, ql.QLoRAConfig(rank=1, fmt=None, **settings)
        )

    experts, router, want = "experts/.*/kernel", "router/kernel", float_gradient(params)
    assert [*init(targets=experts)[1]] == ["experts"] and np.abs(want).max() > 1e-3
    _, lora = init(targets=[experts, router])
    got = gradient(ql.linen.wrap(model), params, lora)
    assert_close(got.b, lora["router"]["kernel"].a.T @ want)
    _, lora = init(targets=experts, trainable=router)
    assert_close(gradient(ql.linen.wrap(model), params, lora).value, want)


def test_a_gguf_file_has_the_experts_of_a_layer_in_one_tensor(folder, tmp_path):
    path = tmp_path / "model.gguf"
    _, params = load(folder, progress=False)
    options = dict(fmt="Q4_0", tokenizer=False, progress=False)
    save_gguf(path, folder, params, **options)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    mlp = jax.tree.map(np.asarray, params["layers"]["mlp"])
    # Routers are float. The experts of a layer, [E, K, N], are packed as [E, N, K].
    router = stored["blk.1.ffn_gate_inp.weight"].data
    np.testing.assert_array_equal(router, mlp["router"]["kernel"][1].T)
    for name in ("gate", "up", "down"):
        experts = mlp["experts"][f"{name}_proj"]["kernel"][1].swapaxes(1, 2)
        expected = gguf.quantize(experts, gguf.GGMLQuantizationType.Q4_0)
        data = stored[f"blk.1.ffn_{name}_exps.weight"].data
        np.testing.assert_array_equal(data, expected)
    raw = json.loads((pathlib.Path(folder) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"norm_topk_prob": False}))
    with pytest.raises(ValueError, match="does not support `experts`=.*=False"):
        save_gguf(tmp_path / "new.gguf", tmp_path, params, **options)
    expert_adapter = ql.io.PlainLoRA(1.0, {"model.layers.0.mlp.experts.0.up_proj": {}})
    with pytest.raises(ValueError, match="of experts: .* Got 1, such as model.lay"):
        save_gguf_lora(tmp_path / "new.gguf", folder, expert_adapter)


@pytest.mark.slow
def test_adapters_of_experts_are_merged_one_by_one(folder, tmp_path):
    path, targets = tmp_path / "model.gguf", "layers/mlp/experts/.*_proj/kernel"
    _, params = load(folder, progress=False)
    settings = dict(
        trainable=["norm/scale", ".*/input_layernorm/scale"],
        alpha=2.0,
        rank_pattern={".*up.*": 3},
    )
    base, lora = trees_of(params, rank=2, targets=targets, fmt="mxfp4", **settings)
    save_gguf(path, folder, base, lora, tokenizer=False, progress=False)
    merged = ql.merge(base, lora)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name in ("gate", "up", "down"):
        expected = merged["layers"]["mlp"]["experts"][f"{name}_proj"]["kernel"][1]
        got = np.float32(stored[f"blk.1.ffn_{name}_exps.weight"].data).swapaxes(1, 2)
        assert_close(got, expected, roundings=1, dtype=np.float16)
    norms = {"output_norm": merged["norm"]["scale"]}
    norms["blk.1.attn_norm"] = merged["layers"]["input_layernorm"]["scale"][1]
    for name, expected in norms.items():
        np.testing.assert_array_equal(stored[f"{name}.weight"].data, expected)


def test_each_expert_is_split_as_an_mlp(folder):
    config, mesh = read_config(folder), AbstractMesh((2, 2), ("fsdp", "tensor"))
    rules = place_arguments(config, abstract_params(config), mesh)["rules"]

    def spec_of(name):
        return tuple(rules[f"layers/mlp/{name}/kernel"])

    assert (
        spec_of("experts/gate_proj")
        == spec_of("experts/up_proj")
        == (None, None, "fsdp", "tensor")
    )
    assert spec_of("experts/down_proj") == (None, None, "tensor", "fsdp")
    assert "layers/mlp/router/kernel" not in rules  # replicated on all devices


@pytest.mark.slow
def test_the_kernel_computes_the_sinks_of_gpt_oss():
    sizes = dict(num_local_experts=4, num_experts_per_tok=2, vocab_size=64)
    raw = {**CONFIG, **sizes, "model_type": "gpt_oss", "architectures": None}
    config = config_from_hf(raw | {"sliding_window": 3})
    tokens = jnp.arange(8)[None]
    params = Decoder(config).init(jax.random.key(0), tokens)["params"]
    attention = params["layers"]["self_attn"]
    attention["sinks"] = jax.random.normal(jax.random.key(1), attention["sinks"].shape)
    splash = partial(ql.memory.splash_attention, interpret=True)

    def run(decoder):
        return jax.jit(decoder.apply)({"params": params}, tokens)

    assert_close(run(Decoder(config, attention=splash)), run(Decoder(config)))


def test_the_gradient_of_columns_by_turns_does_not_pad_between_them():
    x = jax.random.normal(jax.random.key(0), (3, 10))

    def plain(x):
        return (x[:, ::2], x[:, 1::2])

    def total(split):
        return lambda x: jnp.sum(jnp.sin(split(x)[0]) * split(x)[1])

    ours, want = (jax.grad(total(split)) for split in (split_alternating, plain))
    assert_close(ours(x), want(x))
    assert " pad" not in str(jax.make_jaxpr(ours)(x))


def test_tokens_in_tiles_have_no_balance(folder):
    config = read_config(folder)
    for decoder in (
        Decoder(config, mlp_tile=4),
        Decoder(replace(config, experts=None)),
    ):
        with pytest.raises(ValueError, match="`balance` must be 0 .* Got 0.1"):
            train.decoder_loss(ql.linen.wrap(decoder), balance=0.1)
