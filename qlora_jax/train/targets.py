"""Which kernels a run adapts: PEFT's `target_modules`, in the decoder's tree."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

import qlora_jax as ql

ALL_LINEAR = "all-linear"
HEAD = "lm_head"
_NAMES = re.compile(r"[A-Za-z_][\w.]*(\s*,\s*[A-Za-z_][\w.]*)*")


def find_target_paths(
    target_modules: str | Sequence[str], params: Any, names: "ql.io.Names"
) -> tuple[str, ...]:
    """Returns the paths of the kernels that PEFT's `target_modules` name.

    Args:
        target_modules: "all-linear" for all linear layers but the head, as in PEFT; or
            names of modules, or the ends of their names behind a dot, such as "q_proj";
            or several with commas between; or one regular expression for whole names,
            which a text of other characters is.
        params: The parameters, or their shapes.
        names: What they are called in the Hugging Face model.

    Returns:
        The paths, in the order of the tree.

    Raises:
        ValueError: If a name or an expression chooses nothing, the head, or some layers
            of a stack only; all are named.

    Example:
        >>> import jax, qlora_jax as ql
        >>> from qlora_jax import train
        >>> params = {"up": {"kernel": jax.ShapeDtypeStruct((2, 8, 8), "float32")}}
        >>> names = ql.io.Names({"up/kernel": "layers.{layer}.up.weight"})
        >>> train.find_target_paths(["up"], params, names)
        ('up/kernel',)
    """
    modules = _modules(params, names)
    if target_modules == ALL_LINEAR:
        return tuple(path for path, own in modules.items() if HEAD not in own)
    if isinstance(target_modules, str) and _NAMES.fullmatch(target_modules):
        target_modules = re.split(r"\s*,\s*", target_modules)
    is_regex = isinstance(target_modules, str)
    tests = [target_modules] if is_regex else [*target_modules]
    if is_regex:
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"`target_modules` must be {ALL_LINEAR!r}, names of modules or a "
                f"regular expression. Got {target_modules!r}: {error}."
            ) from error
        chooses = lambda test, module: pattern.fullmatch(module) is not None
    else:
        chooses = lambda test, module: f".{module}".endswith(f".{test}")
    chosen, problems = set(), []
    for test in tests:
        found = False
        for path, own in modules.items():
            hits = [chooses(test, module) for module in own]
            found = found or any(hits)
            if all(hits):
                chosen.add(path)
            elif any(hits):
                problems.append(
                    f"{test!r} chooses {sum(hits)} of the {len(own)} layers of {path}, "
                    "which are one stack: all or none"
                )
            if any(hits) and HEAD in own:
                problems.append(f"{test!r} chooses {HEAD}, which the loss needs frozen")
        if not found:
            problems.append(f"{test!r} chooses no module")
    if problems or not chosen:
        ends = sorted({own[0].rpartition(".")[2] for own in modules.values()})
        raise ValueError(
            f"`target_modules` must choose linear layers: {ALL_LINEAR!r}, or some of "
            f"{ends}. Got: {'; '.join(problems) or 'none'}."
        )
    return tuple(path for path in modules if path in chosen)


def _modules(params: Any, names: "ql.io.Names") -> dict[str, list[str]]:
    """Returns the modules of each linear layer's kernel, by its path."""
    found = {}
    for path, leaf in ql.leaves_by_path(params).items():
        if names.roles(path) != "kn":
            continue
        batch = leaf.shape[: names.num_batch_axes(path)]
        own = [name.removesuffix(".weight") for name in names.of(path, batch).flat]
        found[path] = own
    return found


def add_adapters(key: Any, base: Any, config: "ql.QLoRAConfig") -> dict[str, Any]:
    """Returns the adapters of kernels that are packed already, or stay in float.

    Unlike in `qlora_jax.init`, each kernel may be packed in settings of its own, as in
    4-bit checkpoints, and none is packed here.

    Args:
        key: PRNG key for A.
        base: The base tree.
        config: The targets, and the settings of their adapters; what it says of packing
            is not used.

    Returns:
        The lora tree.

    Raises:
        ValueError: As `qlora_jax.init`.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> from qlora_jax import train
        >>> base = {"up": {"kernel": ql.quantize(jnp.ones((64, 8)), block_size=32)}}
        >>> config = ql.QLoRAConfig(rank=4, targets="up/kernel")
        >>> train.add_adapters(jax.random.key(0), base, config)["up"]["kernel"].rank
        4
    """
    is_packed = lambda x: isinstance(x, ql.QTensor)
    groups: dict[tuple, list[str]] = {}
    for path, leaf in ql.leaves_by_path(base).items():
        if config.is_target(path):
            kind = (None, config.block_size, False)
            if is_packed(leaf):
                kind = (leaf.fmt, leaf.block_size, leaf.double_quant)
            groups.setdefault(kind, []).append(re.escape(path))
    lora: dict[str, Any] = {}
    for index, (kind, paths) in enumerate(groups.items()):
        own = dict(zip(("fmt", "block_size", "double_quant"), kind, strict=True))
        part = dataclasses.replace(config, targets=tuple(paths), exclude=(), **own)
        _, added = ql.init(jax.random.fold_in(key, index), base, part)
        lora = _union(lora, added)
    return lora


def _union(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Returns the leaves of two nested dicts, which have none in common."""
    both = {key: _union(one[key], other[key]) for key in one.keys() & other.keys()}
    return {**one, **other, **both}
