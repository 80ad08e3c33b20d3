"""Files with a tensor for each expert, for models in PyTorch's code that stack them."""

import numpy as np
import pytest
import transformers
from engine_models import save_model, torch_loss, write_rows
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm import app
from qlora_jax.llm.app.open_model import open_model

HEADS = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16}
CASES = {
    "mixtral": (
        transformers.MixtralConfig,
        HEADS | {"num_local_experts": 11, "num_experts_per_tok": 2},
        "model.layers.0.block_sparse_moe.experts.3.w1.weight",
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        HEADS
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "model.layers.0.mlp.experts.3.gate_proj.weight",
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_separate_experts_are_stacked_while_they_are_read(kind, tmp_path):
    config_class, changes, stored_name = CASES[kind]
    folder = save_model(tmp_path / "model", config_class, **changes)
    assert stored_name in ql.io.open_safetensors(folder)
    module = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = torch_loss(module)
    model, data = open_model(str(folder), engine="torch"), write_rows(tmp_path)
    config = app.ScoreConfig(str(folder), data, engine="torch", batch_tokens=64)
    assert_close(np.asarray(app.score(config).loss), np.asarray(expected))
    # Experts that are packed while they are read have the same codes as the stacked
    # experts of transformers.
    packing = model.packing_config("nf4", 32, False)
    base = model.read(packing_config=packing, dtype="float32", progress=False).base
    parameters = dict(module.named_parameters())
    name = "model.layers.{}.mlp.experts.gate_up_proj"
    stacked = np.stack([parameters[name.format(i)].detach().numpy() for i in (0, 1)])
    experts = base[name.format("0:2:1")]
    codes = ql.quantize(stacked, "nf4", block_size=32, contract="bnk").codes
    assert np.array_equal(experts.codes, codes)
    # In a merged folder, the experts are stacked. transformers can load these too.
    out = tmp_path / "merged"
    ql.io.save_merged(out, base, {}, model.names, folder, progress=False)
    merged = transformers.AutoModelForCausalLM.from_pretrained(out)
    parameters = dict(merged.named_parameters())
    merged_experts = [parameters[name.format(i)].detach().numpy() for i in (0, 1)]
    assert np.array_equal(merged_experts, ql.dequantize(experts))
