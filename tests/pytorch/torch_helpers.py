"""Tiny models of transformers, and what PyTorch and PEFT compute with them."""

import collections
import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from transformers.pytorch_utils import Conv1D

import qlora_jax as ql

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_model(kind, **changes):
    """Returns a language model with random weights, in evaluation mode."""
    config = transformers.AutoConfig.for_model(kind, **SIZES | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:  # make weights larger, or the logits would be small
                weight.mul_(4)
            elif name.endswith("bias"):
                weight.normal_()
    return model.eval()


def random_ids(rows=2, tokens=12):
    return np.random.default_rng(0).integers(3, 100, (rows, tokens))


def torch_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), use_cache=False).logits.numpy()


def logits_of(model, variables, ids, **kwargs):
    return model.apply(variables, input_ids=ids, use_cache=False, **kwargs)["logits"]


def loss_of(model, variables, ids, **kwargs):
    logits = logits_of(model, variables, ids, **kwargs)[:, :-1]
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_probs, ids[:, 1:, None], -1).mean()


def init(module, targets, block_size=16, **settings):
    """Returns the wrapped module, its base tree, and a lora tree whose B is not 0."""
    model = ql.torch.wrap(module)
    config = ql.QLoRAConfig(
        rank=4, alpha=8, targets=targets, block_size=block_size, **settings
    )
    key = jax.random.key(0)
    base, lora = ql.torch.init(key, model, ql.torch.params(model), config)
    leaves, structure = jax.tree.flatten(lora)
    keys = jax.random.split(key, len(leaves))
    pairs = zip(keys, leaves, strict=True)
    noise = [0.1 * jax.random.normal(k, x.shape) for k, x in pairs]
    lora = jax.tree.map(jnp.add, lora, structure.unflatten(noise))
    return model, base, lora


def copy_weights(module, weights):
    """Copies arrays into the parameters of a PyTorch module."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.tensor(np.asarray(weights[name])))


def with_decoded_weights(module, base):
    """Copies the decoded packed leaves of `base` into a PyTorch module; returns it."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, leaf in base.items():
            if ql.is_packed(leaf):
                weight = np.asarray(ql.dequantize(leaf), np.float32)
                parameters[name].copy_(torch.tensor(weight))
    return module


def peft_model(module, base, lora, merged=()):
    """Returns a copy of the module with decoded weights and PEFT's adapters.

    Also returns the layer in which PEFT adapts each weight, and the parameters of the
    weights in `merged`. The adapters of these weights are added to them, without PEFT.
    """
    module = copy.deepcopy(module)
    copy_weights(module, ql.merge(base, {name: lora[name] for name in merged}))
    parameters = {name: module.get_parameter(name) for name in merged}
    # Look the modules up before PEFT inserts its layers, which may change their names.
    owners = {}  # the module of each weight, and the weight's name in this module
    for name in lora:
        if name not in merged:
            path, _, weight_name = name.rpartition(".")
            owners[name] = module.get_submodule(path), weight_name
    names = [name for name, (owner, _) in owners.items() if is_product(owner)]
    with warnings.catch_warnings():  # PEFT warns if a `Conv1D` is a target
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["adapted." + name.rpartition(".")[0] for name in names],
            target_parameters=[
                "adapted." + name for name in owners if name not in names
            ],
        )
        # For some types of models, PEFT changes the targets. In a dict, the model has
        # no type.
        peft.get_peft_model(torch.nn.ModuleDict({"adapted": module}), config)
    adapters = {
        (layer.get_base_layer(), getattr(layer, "parameter_name", "weight")): layer
        for layer in module.modules()
        if isinstance(layer, LoraLayer)
    }
    layers = {name: adapters[owner] for name, owner in owners.items()}
    with torch.no_grad():
        for name, layer in layers.items():
            arrays = arrays_in_peft(lora[name])
            for factor, array in zip(factors_of(layer), arrays, strict=True):
                factor.copy_(torch.tensor(array))
    return module, layers, parameters


def is_product(module):
    """Whether a module computes a product or a lookup, and nothing else.

    PEFT adapts the output of such a module (`target_modules`). In any other module, it
    adapts the weight itself (`target_parameters`).
    """
    classes = torch.nn.Linear, torch.nn.Embedding, Conv1D
    return type(module).forward in [cls.forward for cls in classes]


def factors_of(layer):
    """Returns A and B of PEFT's layer."""
    if layer.lora_A:
        return layer.lora_A.default.weight, layer.lora_B.default.weight
    return layer.lora_embedding_A.default, layer.lora_embedding_B.default


def arrays_in_peft(adapter):
    """Returns A and B as PEFT stores them: [E r, k] and [n, r E] for E experts."""
    a, b = (np.asarray(x).reshape(-1, *x.shape[-2:]) for x in (adapter.a, adapter.b))
    return a.swapaxes(1, 2).reshape(-1, a.shape[1]), b.T.reshape(b.shape[2], -1)


def adapter_of(adapter, a, b):
    """Returns an adapter with A and B that PEFT stored (see `arrays_in_peft`)."""
    *experts, k, rank = adapter.a.shape
    a = a.reshape(*experts, rank, k).swapaxes(-1, -2)
    b = b.reshape(-1, rank, *experts).T
    return jax.tree.unflatten(jax.tree.structure(adapter), [a, b])


def peft_loss_and_gradients(module, base, lora, ids, merged=(), **inputs):
    """Returns PEFT's loss, its gradients as a lora tree, and the names without PEFT.

    PEFT adapts a weight where its module is called. This does not work for weights that
    several modules share, or that the code of another module reads. Their adapters are
    merged, like those in `merged`, and PyTorch computes the gradients.
    """
    all_parameters = module.named_parameters(remove_duplicate=False)
    uses = collections.Counter(parameter for _, parameter in all_parameters)
    shared = {name for name in lora if uses[module.get_parameter(name)] > 1}
    merged = {*merged} | shared
    model, layers, parameters = peft_model(module, base, lora, merged)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    tokens = torch.tensor(ids)
    logits = model(input_ids=tokens, use_cache=False, **inputs).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten()
    )
    loss.backward()
    factors = {name: factors_of(layer) for name, layer in layers.items()}
    if unused := {name for name, (_, b) in factors.items() if b.grad is None}:
        names = merged | unused
        return peft_loss_and_gradients(module, base, lora, ids, names, **inputs)
    gradients = {}
    for name, adapter in lora.items():
        if name in merged:
            gradients[name] = merged_gradient(adapter, parameters[name])
        else:
            arrays = [factor.grad.numpy() for factor in factors[name]]
            gradients[name] = adapter_of(adapter, *arrays)
    # The loss does not depend on weights that have no gradient at all.
    return loss.item(), gradients, {n for n in merged if parameters[n].grad is not None}


def adapter_gradients(module, base, lora, compute_loss):
    """Returns PyTorch's loss on merged weights, and its gradients as a lora tree."""
    parameters = dict(module.named_parameters())
    copy_weights(module, ql.merge(base, lora))
    module.zero_grad()
    loss = compute_loss()
    loss.backward()
    return loss.item(), {
        name: merged_gradient(adapter, parameters[name])
        for name, adapter in lora.items()
    }


def merged_gradient(adapter, parameter):
    """Returns the gradient of A and B from the gradient dW of a merged weight.

    The merged weight is W + s A B, so dA = s dW B^T and dB = s A^T dW.
    """
    grad = parameter.grad
    if grad is None:  # the loss does not depend on the weight
        grad = torch.zeros_like(parameter)
    grad = adapter.scaling * grad.numpy()
    if adapter.geometry.kinds.endswith("nk"):  # [out, in]
        grad = grad.swapaxes(-1, -2)
    a, b = np.asarray(adapter.a), np.asarray(adapter.b)
    arrays = [grad @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ grad]
    return jax.tree.unflatten(jax.tree.structure(adapter), arrays)
