"""Four commands with unusual kinds of layers, against transformers and PEFT.

The commands are train, score, generate and export.
"""

import json

import configs
import llama
import numpy as np
import pytest
import torch
from stored import export
from tolerances import assert_close
from transformers import AutoTokenizer

from qlora_jax.llm import app
from qlora_jax.llm.models.tiny import byte_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS |= {"shared_expert_intermediate_size": 24}
# Two layers with keys and values, and one that shares those of the second.
SHARED = {"num_hidden_layers": 3, "num_kv_shared_layers": 1, "sliding_window": 8}
SHARED |= {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
SHARED |= {"head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 8}
SHARED |= {"vocab_size_per_layer_input": 259, "num_global_key_value_heads": None}
# The settings of each model type, and the number of its linear layers.
MODELS = {
    # Three of the four layers have linear attention with five projections, and one has
    # attention with four. Each layer also has three of an MLP. With experts, these are
    # those of the shared expert, which also has a gate.
    "qwen3_5_text": (configs.DELTA, 3 * 5 + 4 + 4 * 3),
    "qwen3_5_moe_text": (configs.DELTA | EXPERTS, 3 * 5 + 4 + 4 * 4),
    # The last layer has no projections of keys and values. Each layer has three of the
    # MLP and two for its per-layer input, and the model has one more.
    "gemma4_text": (SHARED, 4 + 4 + 2 + 3 * 5 + 1),
}

# This one takes a while to compile, and another model has most of its layers.
SLOW = ("qwen3_5_text",)
MARKED = [
    pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS
]


@pytest.mark.parametrize("kind", MARKED)
def test_commands(kind, tmp_path):
    # 1. Write a model with transformers, a tokenizer, and rows of tokens.
    folder, run, merged = (tmp_path / name for name in ("base", "run", "merged"))
    settings, num_adapters = MODELS[kind]
    tokenizer = byte_tokenizer()
    settings = configs.SIZES | {"vocab_size": tokenizer.get_vocab_size()} | settings
    configs.random_model(kind, settings).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
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
    # 3. transformers and PEFT compute the same loss and generate the same tokens.
    ids = torch.tensor(tokens)
    model = llama.their_model(folder, adapter).eval()
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
    # 4. transformers loads the merged model, which has the same loss.
    export(folder, "merged", merged, adapter)
    assert json.loads((merged / "config.json").read_text())["model_type"] == kind
    assert_close(loss_of(llama.their_model(merged), ids), expected)


def loss_of(model, ids):
    with torch.no_grad():
        return model.eval()(ids, labels=ids).loss.item()
