"""Adapters that PEFT made, and comparisons of their logits, files and gradients."""

import dataclasses
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import llama
import numpy as np
import peft
import torch
from stored import tensors_of
from tolerances import assert_close, assert_within_rounding

import qlora_jax as ql
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder_names import decoder_names

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9))
our_logits = partial(llama.our_logits, tokens=TOKENS)
torch_logits = partial(llama.logits_of, tokens=TOKENS)


def all_linear(folder):
    """Returns PEFT's settings for adapters on all linear layers of a model.

    Experts and routers are parameters of other modules, not linear layers, in
    transformers. In models with experts, PEFT skips linear layers that have the name of
    a kernel of experts, so they are listed as parameters too. In Llama 4, the router is
    a linear layer that returns two arrays, which PEFT can adapt only as a parameter.
    """
    model = llama.their_model(folder)
    adapted = peft.get_peft_model(
        llama.their_model(folder),
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    skipped = {
        f"{name}.weight"
        for name, module in adapted.get_base_model().named_modules()
        if isinstance(module, torch.nn.Linear)
        and not name.endswith((".base_layer", ".default", "lm_head"))
    }
    others = torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d
    routers = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear
    }
    parameters = {
        re.sub(r".*\.layers\.\d+\.", "", f"{path}.{name}")
        for path, module in model.named_modules()
        if not isinstance(module, others) or path.rpartition(".")[2] in routers
        for name, x in module.named_parameters(recurse=False)
        if x.ndim > 1 and "bias" not in name
    }
    settings = {"target_modules": "all-linear"}
    if routers:
        settings["exclude_modules"] = sorted(routers)
    parameters |= {re.sub(r".*\.layers\.\d+\.", "", name) for name in skipped}
    if parameters:
        settings["target_parameters"] = sorted(parameters)
    return settings


def train_there(folder, out, **settings):
    """Saves an adapter of PEFT with random A, B and biases; returns the model."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(llama.their_model(folder), config)
    torch.manual_seed(1)
    llama.draw_adapters(model)
    model.save_pretrained(out)
    return model


def assert_there_and_back(config, params, tmp_path, model):
    """Checks that the adapter has equal logits here, and is written unchanged."""
    names = decoder_names(config)
    new, lora, settings = ql.io.load_peft(tmp_path / "theirs", params, names)
    logits, errors = llama.measure_rounding_of(model, partial(torch_logits, model))
    assert np.abs(logits - our_logits(config, params, {})).max() > 0.1
    assert_within_rounding(np.asarray(our_logits(config, new, lora)), logits, errors)
    ql.io.save_peft(tmp_path / "ours", new, lora, names, settings)
    # Where the scalings in a stack differ, B was multiplied by their ratio and back.
    assert_close(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs"))
    assert settings_of(tmp_path / "ours") == settings_of(tmp_path / "theirs")


def settings_of(folder):
    """Returns the settings of an adapter, in a form in which they can be compared."""
    raw = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(raw[name], list):
            raw[name] = sorted(raw[name])
    # An empty list means the same as None.
    raw["target_parameters"] = raw["target_parameters"] or None
    return raw


def sum_shared_factors(grads):
    """Returns gradients in which gate and up of experts have that of one shared A.

    In PEFT, gate and up are one parameter, so that their adapters share A.
    """
    if not isinstance(grads, dict):
        return grads
    grads = {name: sum_shared_factors(x) for name, x in grads.items()}
    experts = grads.get("experts", {})
    if names := [name for name in ("gate_proj", "up_proj") if name in experts]:
        total = sum(experts[name]["kernel"].a for name in names)
        for name in names:
            factors = experts[name]["kernel"]
            experts[name] = {"kernel": dataclasses.replace(factors, a=total)}
    return grads


def assert_gradients(folder, adapter, tmp_path):
    """Compares gradients of a random weighted sum of logits, without dropout."""
    config, params = load(folder, progress=False)
    names = decoder_names(config)
    _, lora, settings = ql.io.load_peft(adapter, params, names)
    weights = np.random.default_rng(3).normal(size=(*TOKENS.shape, 64))

    def loss(lora):
        return jnp.vdot(our_logits(config, params, lora), weights.astype("float32"))

    grads = sum_shared_factors(jax.grad(loss)(lora))
    ql.io.save_peft(tmp_path / "gradients", params, grads, names, settings)
    model = llama.their_model(folder, adapter, is_trainable=True)

    def their_gradients():
        model.zero_grad()
        logits = model.train()(torch.tensor(TOKENS)).logits
        (logits * torch.tensor(weights, dtype=torch.float32)).sum().backward()
        return {name: x.copy() for name, x in llama.gradients_of(model).items()}

    expected, errors = llama.measure_rounding_of(model, their_gradients)
    assert_within_rounding(tensors_of(tmp_path / "gradients"), expected, errors)
