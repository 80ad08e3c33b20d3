"""Finds the kernels that PEFT's `target_modules` names."""

import re
from collections.abc import Sequence
from typing import Any

import qlora_jax as ql

ALL_LINEAR = "all-linear"
HEAD = "lm_head"
# Not among all linear layers.
_NOT_LINEAR = re.compile(
    r"lm_head|.*\.(experts\..*|router|(mlp|block_sparse_moe)\.gate)"
)
_NAMES = re.compile(r"[A-Za-z_][\w.]*(\s*,\s*[A-Za-z_][\w.]*)*")


def find_target_paths(
    target_modules: str | Sequence[str], params: Any, names: "ql.io.Names"
) -> tuple[str, ...]:
    """Returns the paths of kernels that PEFT's `target_modules` name, in tree order.

    Args:
        target_modules: "all-linear" for all linear layers but the head, as in PEFT, and
            but experts and their routers; or names of modules, or of parameters that
            hold experts, or the ends of such names after a dot, as "q_proj", as a
            sequence or separated by commas; or one regular expression that matches
            full names. Text with other characters than names have is an expression.
        params: The parameters, or their shapes.
        names: Their Hugging Face names.

    Raises:
        ValueError: If a name or an expression chooses nothing, the head, or only some
            layers of a stack. The message lists all of them.

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
        is_linear = lambda own: not any(map(_NOT_LINEAR.fullmatch, own))
        return tuple(path for path, own in modules.items() if is_linear(own))
    if isinstance(target_modules, str) and _NAMES.fullmatch(target_modules):
        target_modules = re.split(r"\s*,\s*", target_modules)
    if isinstance(target_modules, str):
        patterns = {target_modules: target_modules}
    else:
        patterns = {name: rf"(.*\.)?{re.escape(name)}" for name in target_modules}
    chosen, problems = set(), []
    for test, pattern in patterns.items():
        try:
            chooses = re.compile(pattern).fullmatch
        except re.error as error:
            raise ValueError(
                f"`target_modules` must be {ALL_LINEAR!r}, names of modules or a "
                f"regular expression. Got {target_modules!r}: {error}."
            ) from error
        hits = {path: [*filter(chooses, own)] for path, own in modules.items()}
        hits = {path: found for path, found in hits.items() if found}
        for path, found in hits.items():
            own = modules[path]
            if len(found) == len(own):
                chosen.add(path)
            else:
                problems.append(
                    f"{test!r} chooses {len(found)} of the {len(own)} layers of "
                    f"{path}, which are one stack: all or none"
                )
            if HEAD in own:
                problems.append(f"{test!r} chooses {HEAD}, which the loss needs frozen")
        if not hits:
            problems.append(f"{test!r} chooses no module")
    if problems or not chosen:
        ends = sorted({own[0].rpartition(".")[2] for own in modules.values()})
        raise ValueError(
            f"`target_modules` must choose linear layers: {ALL_LINEAR!r}, or some of "
            f"{ends}. Got: {'; '.join(problems) or 'none'}."
        )
    return tuple(path for path in modules if path in chosen)


def _modules(params: Any, names: "ql.io.Names") -> dict[str, list[str]]:
    """Maps the path of each linear kernel to its modules, one for each layer."""
    kernels = ql.leaves_by_path(params).items()
    of = lambda path, x: names.of(path, x.shape[: names.num_batch_axes(path)]).flat
    return {
        path: [_module(name, names) for name in of(path, leaf)]
        for path, leaf in kernels
        if names.roles(path) == "kn"
    }


def _module(name: str, names: "ql.io.Names") -> str:
    """Returns the module of a weight, or the parameter that holds an expert."""
    stem = name.rpartition(".")[0]
    return stem if names.is_stack(stem) else name.removesuffix(".weight")
