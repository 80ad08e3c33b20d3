"""What `qlora-jax train` leaves, in the libraries that it is for."""

import llama
import numpy as np
import pytest
import torch
from tokenizer_helpers import write_rows

from qlora_jax import cli
from qlora_jax.models.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")


def test_peft_computes_the_validation_loss_of_a_run(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("valid", 3)):
        rows = [{"input_ids": rng.integers(0, 250, 9).tolist()} for _ in range(count)]
        write_rows(tmp_path / f"{split}.jsonl", rows)
    folder = save_tiny(tmp_path / "base")
    options = dict(steps=4, learning_rate=1e-2, fmt="none", dtype="float32")
    options |= dict(target_modules=["q_proj", "down_proj"], lora_r=4, lora_alpha=8)
    out = str(tmp_path / "run")
    result = cli.train(cli.TrainConfig(folder, str(tmp_path), out, **options))
    model = llama.their_model(folder, result.adapter)
    tokens = torch.tensor([row["input_ids"] for row in rows])  # those of `valid`
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss
        assert result.valid_loss == pytest.approx(float(loss), abs=1e-4)
        with model.disable_adapter():
            bare = model(input_ids=tokens, labels=tokens).loss
    assert abs(float(bare) - float(loss)) > 0.01
