"""Rows with several sequences, which some models in PyTorch's code keep apart."""

import jax
import numpy as np
import pytest
import transformers
from engine_models import SIZES, save_model
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm.app.open_model import open_model
from qlora_jax.llm.data import Row, eval_batches
from qlora_jax.llm.train import decoder_loss

HEADS = {"num_key_value_heads": 2, "head_dim": 16}
LAYERS = {"num_hidden_layers": 2, **HEADS}
# The window is shorter than the sequences.
GEMMA = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
PACKED = {
    "gpt_neox": (transformers.GPTNeoXConfig, {"num_hidden_layers": 2}),
    "llama": (transformers.LlamaConfig, LAYERS),
    "gemma3": (transformers.Gemma3TextConfig, LAYERS | GEMMA),
}
REFUSED = {
    "gpt2": (transformers.GPT2Config, {}, "positions are not rotary"),
    "bloom": (transformers.BloomConfig, {}, "attention in its own code"),
    "lfm2": (
        transformers.Lfm2Config,
        {"layer_types": ["conv", "full_attention"]},
        "states or convolutions",
    ),
    "qwen3_next": (
        transformers.Qwen3NextConfig,
        {"layer_types": ["linear_attention", "full_attention"]},
        "states or convolutions",
    ),
}


@pytest.mark.parametrize("kind", PACKED)
def test_the_loss_of_packed_rows_is_that_of_separate_rows(kind, tmp_path):
    config_class, changes = PACKED[kind]
    folder = save_model(tmp_path / "model", config_class, **changes)
    model = open_model(str(folder), engine="torch").read(progress=False)
    assert model.engine.packing_problem is None
    rng, rows = np.random.default_rng(0), []
    for length in (9, 5, 7):
        ids = rng.integers(3, 200, length).astype(np.int32)
        rows.append(Row(ids, np.where(np.arange(length) > 0, ids, -100), "rows"))
    losses = []
    for packing in (False, True):
        loss = decoder_loss(model.engine.make_model(has_packed_rows=packing))
        size = 1 if packing else len(rows)
        [batch] = eval_batches(rows, batch_size=size, max_length=24, packing=packing)
        total, count = jax.jit(loss)({}, model.base, batch, None)
        losses.append(np.asarray(total / count))
    assert_close(losses[1], losses[0])


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_mix_sequences_are_refused(kind, tmp_path):
    config_class, changes, reason = REFUSED[kind]
    config_class(**SIZES | LAYERS | changes).save_pretrained(tmp_path)
    problem = ql.torch.packing_problem(ql.torch.open_language_model(tmp_path))
    assert problem is not None and reason in problem
