"""Adapters of PEFT, read and written: equal logits, bytes and settings.

The models are tiny random Llamas with biases; the adapters have random A and B.
"""

import configs
import jax
import jax.numpy as jnp
import llama
import numpy as np
import pytest
import torch
from helpers import assert_same_bits, randomized, trees_of
from peft_adapters import (
    TOKENS,
    assert_gradients,
    assert_there_and_back,
    our_logits,
    settings_of,
    torch_logits,
    train_there,
)
from stored import export, tensors_of
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder_names import decoder_names

pytestmark = pytest.mark.filterwarnings("ignore")

LINEAR = dict(target_modules=["q_proj", "o_proj", "down_proj"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float checkpoint."""
    folder = tmp_path_factory.mktemp("base")
    biases = {"attention_bias": True, "mlp_bias": True}
    configs.random_model("llama", configs.SIZES | biases).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(folder):
    return load(folder, progress=False)


Q = {"r": 2, "target_modules": ["q_proj"]}
CASES = {
    "list": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "regex": {"r": 4, "target_modules": r".*\.[12]\.(self_attn\.[qv]|mlp\.up)_proj"},
    "all_linear": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "head": {"r": 2, "target_modules": ["lm_head", "o_proj"]},
    "layer": {"r": 4, "target_modules": ["up_proj"], "layers_to_transform": 1},
    "layers": Q
    | {"layers_to_transform": [0, 2], "layers_pattern": "layers"}
    | {"r": 4, "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "patterns": {"r": 4, "lora_alpha": 8}
    | {"target_modules": ["q_proj", "v_proj", "up_proj"]}
    | {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 3}}
    | {"alpha_pattern": {r"layers\.[02]\.self_attn\.q_proj": 3}},
    "rslora": {"r": 8, "lora_alpha": 3, "use_rslora": True}
    | {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"}
    | {"rank_pattern": {"0.self_attn.q_proj": 3}},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True, "bias": "lora_only"}
    | {"target_modules": ["q_proj", "down_proj"]}
    | {"rank_pattern": {"1.self_attn.q_proj": 2}},
    "biases": Q | {"bias": "all"},
    "own_biases": Q | {"bias": "lora_only"},
    "tokens": Q | {"trainable_token_indices": [60, 0, 31]},
    "named_tokens": Q | {"trainable_token_indices": {"embed_tokens": [1, 60]}},
    "whole": {"r": 2, "target_modules": ["q_proj", "up_proj"]}
    | {"modules_to_save": ["lm_head", "embed_tokens", "1.mlp", "norm"]},
}


@pytest.mark.parametrize("name", CASES)
def test_adapters_go_there_and_back(name, folder, base, tmp_path):
    theirs = train_there(folder, tmp_path / "theirs", **CASES[name])
    assert_there_and_back(*base, tmp_path, theirs)
    model = llama.their_model(folder, tmp_path / "ours")
    assert_close(torch_logits(model), torch_logits(theirs))


@pytest.mark.parametrize("name", ["layers", "patterns", "rslora"])
def test_a_portable_adapter_needs_no_setting_but_its_rank(name, folder, tmp_path):
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    logits = torch_logits(train_there(folder, theirs, **CASES[name]))
    export(folder, "peft-portable", out, theirs)
    raw, rank = settings_of(out), CASES[name]["r"]
    plain = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
    plain |= {"use_rslora": False, "use_dora": False, "layers_to_transform": None}
    assert raw.items() >= plain.items()
    assert raw["base_model_name_or_path"] == str(folder)
    for key, x in tensors_of(out).items():
        assert x.shape["lora_B" in key] == rank and x.dtype == np.float32
    model = llama.their_model(folder, out)
    assert_close(torch_logits(model), logits)


@pytest.mark.parametrize(
    "settings, message",
    [
        (CASES["dora"] | {"bias": "none"}, r"must be LoRA: .*\n  layers/.*: DoRA"),
        (CASES["own_biases"], "must not replace biases or modules for peft-portable"),
    ],
)
def test_what_servers_do_not_load_is_refused(settings, message, folder, tmp_path):
    train_there(folder, tmp_path / "theirs", **settings)
    with pytest.raises(ValueError, match=message):
        export(folder, "peft-portable", tmp_path / "out", tmp_path / "theirs")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss"])
def test_adapters_of_experts(kind, tmp_path):
    """PEFT fuses adapters of all experts, and those of gate and up in twice the rank.

    PEFT's own adapters of gate and up share one A.
    """
    local = kind in ("mixtral", "gpt_oss")
    sizes = {"num_local_experts" if local else "num_experts": 4}
    sizes["num_experts_per_tok"] = 2
    if kind == "qwen3_moe":
        sizes["moe_intermediate_size"] = 16
    configs.random_model(kind, configs.SIZES | sizes).save_pretrained(tmp_path / "base")
    config, base = load(tmp_path / "base", progress=False)
    router = "router.weight" if kind == "gpt_oss" else "gate.weight"
    parameters = ["experts.gate_up_proj", "mlp.experts.down_proj", router]
    theirs = dict(r=2, lora_alpha=4, target_modules=["q_proj"])
    theirs |= dict(target_parameters=parameters, rank_pattern={r"1\..*\.down_proj": 3})
    model = train_there(tmp_path / "base", tmp_path / "theirs", **theirs)
    assert_there_and_back(config, base, tmp_path, model)
    targets = "layers/(self_attn|mlp/(experts|router)).*/kernel"
    base, lora = trees_of(base, rank=2, alpha=4, fmt=None, targets=targets)
    ours, names = our_logits(config, base, lora), decoder_names(config)
    assert np.abs(ours - our_logits(config, base, {})).max() > 0.1
    for fused in (True, False):
        settings = ql.io.peft_config(base, lora, names, fused=fused)
        ql.io.save_peft(tmp_path / f"{fused}", base, lora, names, settings)
        model = llama.their_model(tmp_path / "base", tmp_path / f"{fused}")
        assert_close(ours, torch_logits(model))
        model.save_pretrained(tmp_path / f"{fused} again")  # always fused
        _, again, _ = ql.io.load_peft(tmp_path / f"{fused} again", base, names)
        assert_same_bits(again, lora)
    if kind == "gpt_oss":
        assert_gradients(tmp_path / "base", tmp_path / "True", tmp_path)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_gradients_of_dora_are_those_of_peft(use_rslora, folder, tmp_path):
    # One scaling: other gradients of B are those of PEFT divided by the ratio.
    settings = CASES["dora"] | {"bias": "none", "use_rslora": use_rslora}
    settings |= {"rank_pattern": {}}
    train_there(folder, tmp_path / "adapter", **settings)
    assert_gradients(folder, tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize(
    "overrides",
    [
        {"trainable": [r"layers/self_attn/._proj/bias"]},
        {"use_dora": True},
        {"trainable": [".*bias", ".*norm/scale", "lm_head/kernel", ".*embedding"]},
        {"trainable_rows": {".*/embedding": [63, 5]}},
    ],
)
def test_adapter_made_here_loads_there(overrides, folder, base, tmp_path):
    config, params = base
    settings = {"targets": r"layers/.*_proj/kernel"} | overrides
    settings = ql.QLoRAConfig(
        rank=4, alpha=6, fmt=None, rank_pattern={".*/v_proj/kernel": 3}, **settings
    )
    new, lora = ql.init(jax.random.key(0), params, settings)
    lora = jax.tree.map(jnp.add, lora, randomized(lora))
    ql.io.save_peft(tmp_path, new, lora, decoder_names(config))
    model = llama.their_model(folder, tmp_path)
    logits = torch_logits(model)
    assert np.abs(logits - our_logits(config, params)).max() > 0.1
    assert_close(our_logits(config, new, lora), logits)
    base, again, _ = ql.io.load_peft(tmp_path, new, decoder_names(config))
    assert_close(our_logits(config, base, again), logits)
    ql.io.save_merged(tmp_path / "merged", folder, lora, decoder_names(config))
    merged = llama.their_model(tmp_path / "merged")
    assert_close(torch_logits(merged), logits)
    # PEFT writes the adapter again with the same settings.
    model.save_pretrained(tmp_path / "again")
    assert settings_of(tmp_path / "again") | {"base_model_name_or_path": None} == (
        settings_of(tmp_path)
    )


def two_adapters(folder, params, names, tmp_path, ranks=(4, 2)):
    """Returns a PEFT model with two adapters, and both adapters in qlora_jax."""
    loras = []
    for name, rank in zip("ab", ranks, strict=True):
        train_there(folder, tmp_path / name, **LINEAR, r=rank, lora_alpha=3 * rank + 1)
        loras.append(ql.io.load_peft(tmp_path / name, params, names)[1])
    model = llama.their_model(folder, tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    return model.eval(), loras


def test_rows_have_adapters_as_in_a_mixed_batch_of_peft(folder, base, tmp_path):
    config, params = base
    names = decoder_names(config)
    model, loras = two_adapters(folder, params, names, tmp_path)
    bank = ql.bank(loras, capacity=3).with_adapter(
        2, jax.tree.map(jnp.negative, loras[0])
    )
    ql.io.save_peft(tmp_path / "c", params, bank[2], names)
    model.load_adapter(tmp_path / "c", adapter_name="c")
    assert bank[1]["layers"]["mlp"]["down_proj"]["kernel"].rank == 2
    tokens = torch.tensor(np.concatenate([TOKENS, TOKENS]))
    with torch.no_grad():
        rows = ["b", "__base__", "a", "c"]
        theirs = model(input_ids=tokens, adapter_names=rows).logits.numpy()
    chosen = ql.select(bank, np.array([1, -1, 0, 2]))
    ours = llama.our_logits(config, params, chosen, tokens=tokens.numpy())
    assert_close(ours, theirs)


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_merged_adapters_are_those_of_peft(method, folder, base, tmp_path):
    config, params = base
    names, ranks = decoder_names(config), (4, 4 if method == "linear" else 2)
    model, loras = two_adapters(folder, params, names, tmp_path, ranks)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new", combination_type=method)
    model.set_adapter("new")
    lora = ql.merge_adapters(loras, [0.7, -0.4], method=method)
    ours = our_logits(config, params, lora)
    assert_close(ours, torch_logits(model))
    factors = lora["layers"]["mlp"]["down_proj"]["kernel"]
    expected_ranks = {"cat": 6, "linear": 4}
    assert (factors.rank, factors.scaling) == (expected_ranks[method], 1.0)


@pytest.mark.parametrize(
    "settings, refused",
    [
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens is also the head"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "must be linear"),
        (CASES["tokens"], None),
    ],
)
def test_a_tied_embedding(settings, refused, tmp_path):
    """PEFT can train rows that the head shares, but not a copy or a LoRA."""
    tied = configs.SIZES | {"tie_word_embeddings": True}
    configs.random_model("llama", tied).save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["q_proj"], **settings}
    model = train_there(tmp_path / "base", tmp_path / "theirs", **settings)
    base = load(tmp_path / "base", progress=False)
    if refused is None:
        return assert_there_and_back(*base, tmp_path, model)
    with pytest.raises(ql.io.CheckpointError, match=refused):
        ql.io.load_peft(tmp_path / "theirs", base[1], decoder_names(base[0]))
