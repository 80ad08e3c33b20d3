"""Adapters of convolutions of PEFT, read and written: equal outputs and bytes."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import llama
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from helpers import assert_same_bits, randomized
from stored import tensors_of
from tolerances import assert_close

import qlora_jax as ql

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ql.io.Names(
    {
        "image/kernel": ql.io.Entry("image.weight", "wwkn"),
        "image/bias": "image.bias",
        "line/kernel": ql.io.Entry("line.weight", "wkn"),
        "out/kernel": "out.weight",
    }
)
X = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


class Theirs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.image = torch.nn.Conv2d(3, 16, (3, 2), (2, 1), (1, 0))
        self.line = torch.nn.Conv1d(16, 12, 3, bias=False)
        self.out = torch.nn.Linear(12, 5, bias=False)

    def forward(self, x):
        x = torch.tanh(self.image(x.permute(0, 3, 1, 2)))
        x = torch.tanh(self.line(x.flatten(2)))
        return self.out(x.permute(0, 2, 1))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        padding = ((1, 1), (0, 0))
        x = nn.Conv(16, (3, 2), (2, 1), padding, name="image")(x)
        x = jnp.tanh(x).reshape(len(x), -1, 16)
        x = nn.Conv(12, (3,), padding="VALID", use_bias=False, name="line")(x)
        return nn.Dense(5, use_bias=False, name="out")(jnp.tanh(x))


class NNX(nnx.Module):
    def __init__(self, rngs):
        padding, self.padding = "VALID", ((1, 1), (0, 0))
        self.image = nnx.Conv(3, 16, (3, 2), (2, 1), padding=self.padding, rngs=rngs)
        self.line = nnx.Conv(16, 12, (3,), padding=padding, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(12, 5, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.image(x)).reshape(len(x), -1, 16)
        return self.out(jnp.tanh(self.line(x)))


def from_torch(model):
    """Returns the parameters in Flax's layout."""
    w = {name: x.detach().numpy() for name, x in model.state_dict().items()}

    def transpose(x):
        return jnp.asarray(np.moveaxis(x, (0, 1), (-1, -2)))

    return {
        "image": {"kernel": transpose(w["image.weight"]), "bias": w["image.bias"]},
        "line": {"kernel": transpose(w["line.weight"])},
        "out": {"kernel": transpose(w["out.weight"])},
    }


CASES = {
    "all": {"target_modules": ["image", "line", "out"], "r": 4, "lora_alpha": 6},
    "some": {"target_modules": ["line"], "modules_to_save": ["image"], "r": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_adapters_of_convolutions_go_there_and_back(name, tmp_path):
    torch.manual_seed(0)
    model = Theirs()
    params = from_torch(model)
    model = peft.get_peft_model(model, peft.LoraConfig(**CASES[name]))
    llama.draw_adapters(model)
    model.save_pretrained(tmp_path / "theirs")
    want = model(torch.tensor(X)).detach().numpy()
    base, lora, settings = ql.io.load_peft(tmp_path / "theirs", params, NAMES)
    outputs = ql.linen.wrap(Linen()).apply({"params": base, "lora": lora}, X)
    assert_close(outputs, want)
    assert np.abs(Linen().apply({"params": params}, X) - want).max() > 0.1
    ql.io.save_peft(tmp_path / "ours", base, lora, NAMES, settings)
    assert_same_bits(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs"))


def test_an_adapter_of_nnx_loads_there(tmp_path):
    torch.manual_seed(0)
    model = Theirs()
    float_model = NNX(nnx.Rngs(0))
    nnx.update(float_model, from_torch(model))
    config = ql.QLoRAConfig(rank=2, alpha=3, fmt=None, trainable="image/bias")
    ours = ql.nnx.wrap(float_model, config, rngs=nnx.Rngs(1))
    nnx.update(ours, randomized(nnx.state(ours, nnx.LoRAParam)))
    trees = ql.nnx.split(ours)
    settings = ql.io.peft_config(*trees, NAMES)
    settings = dataclasses.replace(settings, extra_settings={"task_type": None})
    ql.io.save_peft(tmp_path / "ours", *trees, NAMES, settings)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    expected = model(torch.tensor(X)).detach().numpy()
    assert_close(ours(X), expected)
