"""docs/coming_from/peft_trl.md: both runs have the same losses, and settings exist."""

import dataclasses
import inspect
import json
import re
import shlex
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from coming_from import assert_settings_exist, code_blocks
from tolerances import assert_close

from qlora_jax.llm import app, train
from qlora_jax.llm.cli.parser import parse
from qlora_jax.llm.models.tiny import save_tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trl

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = "peft_trl"
MODEL = "meta-llama/Llama-3.2-1B-Instruct"
# To train on answers only, TRL needs a template that marks them with `generation`.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STEPS = 8  # in place of the page's 60


@pytest.fixture
def inputs(tmp_path):
    """A model, and as many rows as a step has, so that their order has no effect."""
    model, data = save_tiny(tmp_path / "base"), tmp_path / "data.jsonl"
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_start|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "base/chat_template.jinja").write_text(TEMPLATE)
    with data.open("w") as file:
        for length, letter in enumerate("abcdefgh", 1):
            question = {"role": "user", "content": f"{letter}="}
            answer = {"role": "assistant", "content": letter * length}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    return model, data


def run_trl(model, data, out, is_packed):
    """Runs the page's code in float32, and saves the first adapter in `out`/initial."""
    code, to_float32 = code_blocks(PAGE, "py")
    if not is_packed:
        code = re.sub(r"    quantization_config=.*?\n    \),\n", "", code, flags=re.S)
    save = f'trainer.model.save_pretrained("{out}/initial")\n'
    changes = {
        MODEL: model,
        "data.jsonl": str(data),
        '"run': f'"{out}/run',
        "torch.bfloat16": "torch.float32",
        "bf16=True": "bf16=False, use_cpu=True",
        # The libraries sum the mean of all scales in another order. The mean may differ
        # in its last bit, and then a few scales have other codes of 8 bits.
        "double_quant=True": "double_quant=False",
        "max_steps=60": f"max_steps={STEPS}",
        "trainer.train()": to_float32 + save + "trainer.train()",
    }
    for old, new in changes.items():
        assert old in code or not is_packed
        code = code.replace(old, new)
    names: dict = {}
    exec(compile(code, PAGE, "exec"), names)
    assert {x.dtype for x in names["model"].parameters()} >= {torch.float32}
    return [x["loss"] for x in names["trainer"].state.log_history if "loss" in x]


def run_qlora_jax(model, data, out, is_packed):
    """Runs the page's command in float32, from TRL's first adapter."""
    [command] = code_blocks(PAGE, "bash")
    _, config, _ = parse(shlex.split(command.replace("\\\n", " "))[1:])
    config = config.replace(
        model=model,
        data=str(data),
        out=str(out / "qlora_jax"),
        adapter=str(out / "initial"),
        dtype="float32",
        steps=STEPS,
        **({"double_quant": False} if is_packed else {"fmt": "none"}),
    )
    app.train(config)
    return [row["loss"] for row in train.read_metrics(out / "qlora_jax/metrics.jsonl")]


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_same_run(inputs, tmp_path, is_packed):
    expected = run_trl(*inputs, tmp_path, is_packed)
    assert len(expected) == STEPS and expected[-1] < expected[0] - 0.1
    losses = run_qlora_jax(*inputs, tmp_path, is_packed)
    assert_close(np.float32(losses), np.float32(expected))


def test_settings_of_peft_and_trl(tmp_path):
    configs = trl.SFTConfig(output_dir=str(tmp_path), bf16=False), peft.LoraConfig()
    defaults: dict = {}
    for config in configs:
        for field in dataclasses.fields(config):
            defaults[field.name] = getattr(config, field.name)
    quantization = transformers.BitsAndBytesConfig
    defaults |= {
        name: parameter.default
        for name, parameter in inspect.signature(quantization).parameters.items()
    }
    # The call above sets the first, and `SFTConfig` changes the second.
    defaults |= {"output_dir": "trainer_output", "report_to": "none"}
    assert_settings_exist(PAGE, "PEFT and TRL", defaults)
