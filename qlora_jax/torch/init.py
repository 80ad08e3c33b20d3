"""`init` packs the weights of a PyTorch module, and gives them adapters."""

import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import torch

import qlora_jax as ql

from .arrays import Model, module_of, named_tensors
from .layers import names_in, stacked_names, template_of

PyTree = Any


def init(
    key: jax.Array,
    model: Model,
    params: Mapping[str, PyTree],
    config: ql.QLoRAConfig,
    *,
    donate: bool = False,
) -> tuple[dict[str, PyTree], dict]:
    r"""Returns a module's parameters with packed targets, and a tree of adapters.

    This is like `qlora_jax.init`, but the type of each module determines which axis of
    its weight is contracted. Weights of `torch.nn.Linear` are `[out, in]`, those of
    transformers' `Conv1D` are `[in, out]`, those of `torch.nn.Embedding` are tables,
    and the experts of transformers are stacks of matrices. For weights of other
    modules, set `config.contract`. Where such a module uses its weight for anything but
    a product or a lookup, the weight is decoded.

    Args:
        key: PRNG key for A.
        model: The module, wrapped or not. It may be on the meta device.
        params: Its parameters and buffers by name, as `ql.torch.params` returns them.
        config: The targets, by PyTorch's names, and the settings for packing and
            adapting them.
        donate: As in `qlora_jax.init`.

    Raises:
        TypeError: As `qlora_jax.init`.
        ValueError: As `qlora_jax.init`; or if the contracted axes of targets are not
            known, or differ from `config.contract`. The error lists all such targets.

    Example:
        >>> import jax, qlora_jax as ql, torch
        >>> module = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU())
        >>> config = ql.QLoRAConfig(rank=4, targets=r".*\.weight")
        >>> base, lora = ql.torch.init(
        ...     jax.random.key(0), module, ql.torch.params(module), config)
        >>> base["0.weight"].shape, lora["0.weight"].b.shape
        ((8, 64), (4, 8))
    """
    module = module_of(model)
    roles_by_name = dict(kernel_roles(module))
    owners = {
        name: module.get_submodule(name.rpartition(".")[0])
        for name in named_tensors(module)
    }
    contract, problems = {}, []
    for name in filter(config.is_target, params):
        tensor_name = names_in(name)[0]  # all tensors of a stack have the same axes
        axis_roles = roles_by_name.get(tensor_name)
        setting = config.contract_of(name)
        if axis_roles is None and setting is None:
            owner = type(owners.get(tensor_name)).__name__
            problems.append(
                f"{name}: the axes that its module, {owner}, contracts are not known. "
                "Exclude it, or set `contract`."
            )
        elif axis_roles is not None and setting not in (None, axis_roles):
            problems.append(
                f"{name}: its axes are {axis_roles!r}. Got contract={setting!r}."
            )
        elif axis_roles is not None:
            contract[re.escape(name)] = axis_roles
    if problems:
        listing = "\n  ".join(problems)
        raise ValueError(f"these weights cannot be targets:\n  {listing}")
    settings: Any = config.contract  # the config has converted it to a dict
    config = dataclasses.replace(config, contract={**contract, **settings})
    return ql.init(key, dict(params), config, donate=donate)


def kernel_roles(module: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """Yields the name of each weight whose module has a known type, and its roles.

    These are the roles of its axes, as in `QLoRAConfig.contract`.
    """
    for module_name, inner in module.named_modules():
        prefix = f"{module_name}." if module_name else ""
        if isinstance(inner, torch.nn.Linear):
            yield f"{prefix}weight", "nk"
        elif isinstance(inner, torch.nn.Embedding) or is_conv1d(inner):
            yield f"{prefix}weight", "kn"
        elif isinstance(getattr(inner, "is_transposed", None), bool):
            # In transformers, modules with the weights of experts have this attribute.
            axis_roles = "bkn" if inner.is_transposed else "bnk"
            for name, tensor in inner.named_parameters(recurse=False):
                if tensor.ndim == 3:
                    yield f"{prefix}{name}", axis_roles


def is_conv1d(module: torch.nn.Module) -> bool:
    """Whether a module is a `Conv1D` of transformers, whose weights are `[in, out]`."""
    # If transformers is not imported, the module cannot be of one of its classes.
    utils: Any = sys.modules.get("transformers.pytorch_utils")
    return utils is not None and isinstance(module, utils.Conv1D)


def names(model: Model, *, stacked: bool = False) -> ql.io.Names:
    """Returns the names that a module's leaves have in checkpoints, for `ql.io`.

    Tensors in checkpoints have PyTorch's own names.

    Args:
        model: The module, wrapped or not.
        stacked: Whether the base and lora trees are stacked, as `stack` returns them.

    Raises:
        TypeError: If `model` is not a module.

    Example:
        >>> import qlora_jax as ql, torch
        >>> names = ql.torch.names(torch.nn.Linear(64, 8))
        >>> names.of("weight").item(), names.roles("weight"), names.roles("bias")
        ('weight', 'nk', '')
    """
    module = module_of(model)
    roles_by_name = dict(kernel_roles(module))
    entries: dict[str, ql.io.Entry] = {}
    leaf_names = stacked_names(module) if stacked else named_tensors(module)
    for leaf_name in leaf_names:
        axis_roles = roles_by_name.get(names_in(leaf_name)[0], "")
        name, indices = template_of(leaf_name)
        numbers = {"layer": indices} if indices else {}
        if axis_roles.startswith("b"):
            # One tensor contains all experts. A name that ends in a placeholder is that
            # of a part of a tensor (see `ql.io.Entry`).
            expert_name = f"{name}.{{expert}}"
            roles = "nk" if axis_roles == "bnk" else "kn"
            entries[leaf_name] = ql.io.Entry(
                expert_name, roles, parameter=name, stack_roles=roles, numbers=numbers
            )
        else:
            entries[leaf_name] = ql.io.Entry(name, axis_roles, numbers=numbers)
    return ql.io.Names(entries)
