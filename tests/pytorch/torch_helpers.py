"""Tiny models of transformers, and what PyTorch and PEFT compute with them."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers

import qlora_jax as ql

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
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


def init(module, targets, **settings):
    """Returns the wrapped module, its base tree and its lora tree, with random B."""
    model = ql.torch.wrap(module)
    config = ql.QLoRAConfig(rank=4, alpha=8, targets=targets, **settings)
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


def peft_model(module, base, lora):
    """Returns a PEFT model with decoded weights and the same adapters; and its modules.

    The modules are those of the model inside it, by name.
    """
    names = [name.removesuffix(".weight") for name in lora]  # of modules
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names)
    config.fan_in_fan_out = module.config.model_type == "gpt2"
    with warnings.catch_warnings():  # PEFT asks transformers for a deprecated name
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(with_decoded_weights(module, base), config)
    layers = dict(model.base_model.model.named_modules())
    with torch.no_grad():
        for name, adapter in zip(names, lora.values(), strict=True):
            layer = layers[name]
            layer.lora_A.default.weight.copy_(torch.tensor(np.asarray(adapter.a).T))
            layer.lora_B.default.weight.copy_(torch.tensor(np.asarray(adapter.b).T))
    return model, layers


def peft_loss_and_gradients(module, base, lora, ids, **inputs):
    """Returns PEFT's loss, and its gradients as a lora tree."""
    model, layers = peft_model(module, base, lora)
    tokens = torch.tensor(ids)
    logits = model(input_ids=tokens, use_cache=False, **inputs).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten()
    )
    loss.backward()
    gradients = {}
    for name, adapter in lora.items():
        layer = layers[name.removesuffix(".weight")]
        a, b = layer.lora_A.default.weight.grad.T, layer.lora_B.default.weight.grad.T
        gradients[name] = jax.tree.unflatten(
            jax.tree.structure(adapter), [a.numpy(), b.numpy()]
        )
    return loss.item(), gradients


def gradients_in_pytorch(module, base, lora, ids):
    """Returns PyTorch's loss of a language model, and its gradients as a lora tree."""
    tokens = torch.tensor(ids)

    def compute_loss():
        logits = module(input_ids=tokens, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten()
        )

    return adapter_gradients(module, base, lora, compute_loss)


def adapter_gradients(module, base, lora, compute_loss):
    """Returns PyTorch's loss and the gradients of A and B, as a lora tree.

    PyTorch computes the gradient dW of each merged weight W + s A B. The gradients of
    the adapter are then dA = s dW B^T and dB = s A^T dW.
    """
    parameters = dict(module.named_parameters())
    copy_weights(module, ql.merge(base, lora))
    module.zero_grad()
    loss = compute_loss()
    loss.backward()
    gradients = {}
    for name, adapter in lora.items():
        grad = parameters[name].grad
        if grad is None:  # the loss does not depend on the weight
            grad = torch.zeros_like(parameters[name])
        grad = adapter.scaling * grad.numpy()
        if adapter.geometry.kinds.endswith("nk"):  # [out, in]
            grad = grad.swapaxes(-1, -2)
        a, b = np.asarray(adapter.a), np.asarray(adapter.b)
        arrays = [grad @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ grad]
        gradients[name] = jax.tree.unflatten(jax.tree.structure(adapter), arrays)
    return loss.item(), gradients
