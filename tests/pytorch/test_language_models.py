"""Wrapped models of transformers compute the same in JAX as in PyTorch."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from tolerances import assert_close
from torch_helpers import (
    init,
    logits_of,
    loss_of,
    peft_loss_and_gradients,
    random_ids,
    random_model,
    torch_logits,
    with_decoded_weights,
)

import qlora_jax as ql

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}
# Settings by model type. Sliding windows only have an effect because they are shorter
# than the rows.
CASES = {
    "llama": {},
    "gpt2": {"n_layer": 2, "n_head": 4, "n_embd": 64},
    "qwen3_moe": EXPERTS,
    "gpt_oss": OSS | {"num_hidden_layers": 4},
    "gemma3_text": {
        "num_hidden_layers": 5,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2
        + ["sliding_attention"],
    },
}
PROJECTIONS = r".*(_proj|c_attn|c_fc)(\.weight)?"
# For each model type, the names of some stacks that `ql.torch.stack` must return.
STACKS = {
    "llama": ["model.layers.0:2:1.self_attn.q_proj.weight"],
    "gpt2": ["transformer.h.0:2:1.attn.c_attn.weight"],
    "qwen3_moe": ["model.layers.0:2:1.mlp.experts.down_proj"],
    "gpt_oss": [f"model.layers.{x}:2.mlp.experts.down_proj" for x in ("0:3", "1:4")],
    "gemma3_text": [f"model.layers.{x}:2.mlp.up_proj.weight" for x in ("0:3", "1:4")],
}


@pytest.mark.parametrize("kind", CASES)
def test_logits_equal_pytorch_with_layers_stacked_or_not(kind):
    module, ids = random_model(kind, **CASES[kind]), random_ids()
    expected = torch_logits(module, ids)
    assert np.abs(expected).max() > 1
    model = ql.torch.wrap(module)
    params = ql.torch.params(model)
    stacked = ql.torch.stack(model, params)
    assert [name for name in STACKS[kind] if name not in stacked] == []
    apply = jax.jit(lambda params, ids: logits_of(model, {"params": params}, ids))
    assert_close(apply(params, jnp.array(ids)), expected)
    assert_close(apply(stacked, jnp.array(ids)), expected)
    restored = ql.torch.unstack(stacked)
    assert {*restored} == {*params}
    assert all(np.array_equal(restored[name], params[name]) for name in params)


def loss_and_gradients(model, base, lora, ids):
    def loss(lora, base, ids):
        return loss_of(model, {"params": base, "lora": lora}, ids)

    return jax.jit(jax.value_and_grad(loss))(lora, base, jnp.array(ids))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_and_gradients_on_packed_weights_equal_peft(kind):
    module, ids = random_model(kind), random_ids()
    model, base, lora = init(module, PROJECTIONS)
    assert len(lora) >= 6
    loss, gradients = loss_and_gradients(model, base, lora, ids)
    expected_loss, expected, merged = peft_loss_and_gradients(module, base, lora, ids)
    assert not merged  # PEFT adapts all weights
    assert_close(np.asarray(loss), np.asarray(expected_loss))
    assert_close(gradients, expected)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "gemma3_text"])
def test_stacked_layers_and_experts_have_the_gradients_of_peft(kind):
    module, ids = random_model(kind, **CASES[kind]), random_ids()
    model, base, lora = init(module, PROJECTIONS)
    stacked = [ql.torch.stack(model, tree) for tree in (base, lora)]
    loss, gradients = loss_and_gradients(model, *stacked, ids)
    expected_loss, expected, merged = peft_loss_and_gradients(module, base, lora, ids)
    assert not merged
    assert_close(np.asarray(loss), np.asarray(expected_loss))
    assert_close(ql.torch.unstack(gradients), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_peft_loads_the_adapters(kind, tmp_path):
    module, ids = random_model(kind, **CASES[kind]), random_ids()
    model, base, lora = init(module, PROJECTIONS)
    logits = logits_of(model, {"params": base, "lora": lora}, jnp.array(ids))
    names = ql.torch.names(model)
    # With `fused`, adapters of experts are written as PEFT's `target_parameters`.
    config = ql.io.peft_config(base, lora, names, fused=kind == "qwen3_moe")
    ql.io.save_peft(tmp_path / "adapter", base, lora, names, config)
    with warnings.catch_warnings():  # PEFT asks transformers for a deprecated name
        warnings.simplefilter("ignore")
        decoded = with_decoded_weights(module, base)
        theirs = peft.PeftModel.from_pretrained(decoded, tmp_path / "adapter").eval()
        assert_close(logits, torch_logits(theirs, ids))


def test_experts_stay_packed():
    module = random_model("qwen3_moe", **EXPERTS)
    model, base, lora = init(module, r".*experts\.\w+_proj")
    ids = jnp.array(random_ids())

    def loss(base):
        return loss_of(model, {"params": base, "lora": lora}, ids)

    # No array in the program has the shape of the float weights of all experts.
    shapes = {q.shape for q in base.values() if ql.is_packed(q)}
    program = str(jax.make_jaxpr(loss)(base))
    for e, n, k in shapes:
        assert f"f32[{e},{n},{k}]" not in program
        assert f"f32[{e},{k},{n}]" not in program


def test_attention_in_jax_equals_eager_attention_on_packed_rows():
    ql.torch.register_attention()
    cases = {"gemma2": {"attn_logit_softcapping": 2.0, "sliding_window": 6}}
    cases["gpt_oss"] = OSS
    ids = random_ids()
    positions = np.concatenate([np.arange(5), np.arange(7)])[None].repeat(2, 0)
    for kind, changes in cases.items():
        module = random_model(kind, **changes)
        with torch.no_grad():
            inputs = {"input_ids": ids, "position_ids": positions}
            tensors = {name: torch.tensor(x) for name, x in inputs.items()}
            expected = module(**tensors, use_cache=False).logits.numpy()
        module.set_attn_implementation("qlora_jax")
        model = ql.torch.wrap(module)
        variables = {"params": ql.torch.params(model)}
        apply = jax.jit(
            lambda v, ids, positions, model=model: logits_of(
                model, v, ids, position_ids=positions
            )
        )
        logits = apply(variables, jnp.array(ids), jnp.array(positions))
        assert_close(logits, expected)
