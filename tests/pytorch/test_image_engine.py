"""The command line trains and scores a model of text and images on texts.

The losses equal those of transformers and PEFT.
"""

import json
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from image_models import save_image_model
from tolerances import assert_close
from torch_helpers import init, with_decoded_weights

import qlora_jax as ql
from qlora_jax.llm import app
from qlora_jax.llm.app.adapters import (
    init_shapes,
    lora_config_for,
    packing_config_for,
)
from qlora_jax.llm.app.open_model import open_model
from qlora_jax.llm.cli.main import main

ROWS = [("See this?", "yes"), ("Alike?", "no, not at all"), ("How are you?", "fine")]
LAYERS = r".*language_model\.layers\..*_proj\.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns a folder with a model, rows and a run, and the model's processor."""
    folder = tmp_path_factory.mktemp("images")
    processor = save_image_model(folder / "model")
    (folder / "rows.jsonl").write_text("".join(map(to_line, ROWS)))
    settings = {"steps": 3, "batch_size": 4, "max_length": 64, "dtype": "float32"}
    settings |= {"learning_rate": 1e-2, "rank": 4, "engine": "torch"}
    command = ["train", "--model", str(folder / "model"), "--out", str(folder / "run")]
    command += ["--data", str(folder / "rows.jsonl")]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    assert main(command) == 0
    return folder, processor


def to_messages(row, question_type=str):
    question, answer = row
    content = question_type(question)
    messages = [{"role": "user", "content": content}]
    return [*messages, {"role": "assistant", "content": answer}]


def to_line(row, question_type=str):
    return json.dumps({"messages": to_messages(row, question_type)}) + "\n"


def torch_loss(model, processor):
    """Returns the mean loss of the tokens of all answers."""
    losses = []
    for row in ROWS:
        inputs = processor.apply_chat_template(
            to_messages(row), tokenize=True, return_dict=True, return_tensors="pt"
        )
        count = len(processor.tokenizer.encode(row[1] + "<|im_end|>"))
        ids = inputs["input_ids"][0]
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0]
        # The last token is a line break after the answer. The logits at each token
        # predict the next token.
        targets, logits = ids[-count - 1 : -1], logits[-count - 2 : -2]
        losses.append(
            torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        )
    return torch.cat(losses).mean().item()


def test_score_of_a_trained_adapter_equals_the_loss_in_peft(trained):
    folder, processor = trained
    path = folder / "model"
    module = transformers.AutoModelForImageTextToText.from_pretrained(path).eval()
    _, base, _ = init(module, LAYERS, block_size=64)
    with_decoded_weights(module, base)
    before = torch_loss(module, processor)
    with warnings.catch_warnings():  # PEFT asks transformers for a deprecated name
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(module, folder / "run" / "adapter")
    expected = torch_loss(model.eval(), processor)
    assert expected < before - 0.01
    config = app.ScoreConfig(
        run=str(folder / "run"), data=str(folder / "rows.jsonl"), batch_tokens=64
    )
    assert_close(np.asarray(app.score(config).loss), np.asarray(expected))
    metrics = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert_close(
        np.asarray(json.loads(metrics[0])["loss"]), np.asarray(before), roundings=2
    )


def test_a_vision_tower_is_adapted_only_by_name(trained):
    folder, _ = trained
    settings = {"model": str(folder / "model"), "engine": "torch"}
    settings |= {"data": str(folder / "rows.jsonl"), "out": str(folder / "run2")}
    names = {"all-linear": set(), "q_proj,fc1": {"fc1", "q_proj"}}
    for target_modules, expected in names.items():
        config = app.TrainConfig.from_settings(
            settings | {"target_modules": target_modules, "rank": 4}
        )
        model = open_model(config.model, engine="torch")
        packing = packing_config_for(config, model, "nf4")
        adapters = lora_config_for(config, model, packing)
        base, lora = init_shapes(model.base, adapters)
        adapted = {x.split(".")[-2] for x in lora if "vision_tower" in x}
        assert adapted == expected
        packed, _ = init_shapes(base, packing)
        assert not any(ql.is_packed(packed[x]) for x in packed if "vision_tower" in x)
        assert any(ql.is_packed(packed[x]) for x in packed if "language_model" in x)


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_rows_with_images_are_rejected(trained, tmp_path, capsys, engine):
    folder, _ = trained
    rows = tmp_path / "rows.jsonl"
    rows.write_text(to_line(ROWS[0], lambda x: [{"type": "image", "path": x}]))
    command = ["train", "--model", str(folder / "model"), "--engine", engine]
    command += ["--data", str(rows), "--out", str(tmp_path / "run")]
    assert main(command) == 1
    assert "`messages[0]` must have parts" in capsys.readouterr().err
