"""Each command with Qwen3.5, dense and with experts, against transformers and PEFT."""

import json

import configs
import llama
import numpy as np
import pytest
import torch
from stored import export, tensors_of
from tolerances import assert_close
from transformers import AutoTokenizer

import qlora_jax as ql
from qlora_jax.llm import app
from qlora_jax.llm.models.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS |= {"shared_expert_intermediate_size": 24}
KINDS = {
    "Qwen3_5ForCausalLM": {"model_type": "qwen3_5_text"},
    "Qwen3_5MoeForCausalLM": EXPERTS | {"model_type": "qwen3_5_moe_text"},
}


def fuse_experts(folder):
    """Rewrites a checkpoint in the form of the published files.

    In these, one tensor has the kernels of all experts of a layer, and the rows of gate
    and up follow each other.
    """
    tensors, experts = {}, {}
    for name, x in tensors_of(folder).items():
        layer, _, rest = name.partition(".experts.")
        if rest:
            experts.setdefault(f"{layer}.experts", {})[rest] = x
        else:
            tensors[name] = x
    for name, parts in experts.items():
        gate, up, down = (
            np.stack([parts[f"{i}.{kernel}_proj.weight"] for i in range(4)])
            for kernel in ("gate", "up", "down")
        )
        tensors[f"{name}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        tensors[f"{name}.down_proj"] = down
    ql.io.write_safetensors(folder / "model.safetensors", tensors)


# Compiling the model for each command takes a while.
DENSE = pytest.param("Qwen3_5ForCausalLM", marks=pytest.mark.slow)


@pytest.mark.parametrize("architecture", [DENSE, "Qwen3_5MoeForCausalLM"])
def test_commands(architecture, tmp_path):
    # 1. A model in the form of the published files, and rows of tokens.
    folder, run, merged = (tmp_path / name for name in ("base", "run", "merged"))
    sizes = configs.DELTA | KINDS[architecture]
    save_tiny(folder, architectures=[architecture], **sizes)
    if "Moe" in architecture:
        fuse_experts(folder)
    tokens = np.random.default_rng(0).integers(0, 200, (8, 12))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"input_ids": {x}}}\n' for x in tokens.tolist()))
    # 2. Train adapters on all linear layers; the loss falls.
    options = {"model": str(folder), "data": str(data), "out": str(run), "steps": 4}
    options |= {"target_modules": "all-linear", "fmt": "none", "dtype": "float32"}
    options |= {"batch_size": 4, "max_length": 16, "learning_rate": 2e-2}
    app.train(app.TrainConfig.from_settings(options))
    adapter = run / "adapter"

    def score(adapter=None):
        config = app.ScoreConfig(str(folder), str(data), adapter, dtype="float32")
        return app.score(config).loss

    before, after = score(), score(str(adapter))
    assert after < 0.99 * before
    # 3. transformers and PEFT compute the same loss, and continue in the same way.
    ids = torch.tensor(tokens)
    model = llama.their_model(folder, adapter).eval()
    # Of four layers, three have five projections in place of attention's four. Besides
    # these, there are the MLP's three, and in the mixture, a gate.
    num_adapters = 3 * 5 + 4 + 4 * (4 if "Moe" in architecture else 3)
    names = [key for key, _ in model.named_parameters() if "lora_A" in key]
    assert len(names) == num_adapters
    expected = loss_of(model, ids)
    assert_close(after, expected)
    assert_close(before, loss_of(llama.their_model(folder), ids))
    options = {"prompt": "abc", "chat": False, "max_new_tokens": 6}
    config = app.GenerateConfig(str(folder), str(adapter), **options)
    answer = app.generate(config, lambda text: None).answers[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = tokenizer("abc", return_tensors="pt")["input_ids"]
    continued = model.generate(input_ids=start, max_new_tokens=6, do_sample=False)
    assert answer.text == tokenizer.decode(continued[0, start.shape[1] :])
    # 4. Merged, it is a model of transformers with the same loss.
    export(folder, "merged", merged, adapter)
    raw = json.loads((merged / "config.json").read_text())
    assert raw["architectures"] == [architecture]
    assert_close(loss_of(llama.their_model(merged), ids), expected)


def loss_of(model, ids):
    with torch.no_grad():
        return model.eval()(ids, labels=ids).loss.item()
