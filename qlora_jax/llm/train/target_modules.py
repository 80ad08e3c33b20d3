"""Finds the kernels that PEFT's `target_modules` selects."""

import re
from collections.abc import Sequence

from jaxtyping import PyTree

import qlora_jax as ql
from qlora_jax.trees.paths import leaves_by_path

from ..models.suggestions import did_you_mean

ALL_LINEAR = "all-linear"
HEAD = "lm_head"
# Module names separated by commas. Other text is a regular expression.
_NAME_LIST = re.compile(r"[A-Za-z_][\w.]*(\s*,\s*[A-Za-z_][\w.]*)*")


def find_target_paths(
    target_modules: str | Sequence[str],
    params: PyTree,
    names: ql.io.Names,
    *,
    head: str = HEAD,
) -> tuple[str, ...]:
    """Returns the paths of the kernels that `target_modules` selects, in tree order.

    Args:
        target_modules: One of the following. "all-linear": as in PEFT, all linear
            layers except the head, experts and their routers. A sequence of names, or
            names separated by commas: each is the full name of a module, or of a
            parameter that contains experts, or the part of such a name after one of its
            dots, such as "q_proj". Any other text: a regular expression that matches
            full names.
        params: The parameters, or their shapes.
        names: The Hugging Face names of the parameters.
        head: The name of the head's module.

    Raises:
        ValueError: If a name or the expression selects nothing, the head, or only some
            layers of a stack. The message lists all problems.
    """
    modules = _modules_by_path(params, names)
    if target_modules == ALL_LINEAR:
        # In transformers, experts and routers are parameters and not linear layers. For
        # each parameter, `names.parameters` has a dict whose keys are paths of kernels.
        batch_shapes = {
            path: leaf.shape[: names.num_batch_axes(path)]
            for path, leaf in leaves_by_path(params).items()
        }
        parameters = names.parameters(batch_shapes).values()
        excluded = {path for kernels in parameters for path in kernels}
        return tuple(
            path
            for path, layer_names in modules.items()
            if path not in excluded and head not in layer_names
        )
    # All problems are collected, so that one message lists them.
    targets, problems = set(), []
    short_names = sorted({x[0].rpartition(".")[2] for x in modules.values()})
    for name, pattern in _compile_patterns(target_modules).items():
        is_used = False
        for path, layer_names in modules.items():
            matches = [*filter(pattern.fullmatch, layer_names)]
            if matches and len(matches) == len(layer_names):
                targets.add(path)
            elif matches:
                problems.append(
                    f"{name!r} selects {len(matches)} of the {len(layer_names)} layers "
                    f"of {path}, which are one stack: select all or none"
                )
            if matches and head in layer_names:
                problems.append(f"{name!r} selects {head}, which must stay frozen")
            is_used |= bool(matches)
        if not is_used:
            hint = did_you_mean(name, short_names).strip()
            problems.append(f"{name!r} selects no module{hint and f' ({hint})'}")
    if problems or not targets:
        raise ValueError(
            f"`target_modules` must select linear layers: {ALL_LINEAR!r}, or some of "
            f"{short_names}. Got: {'; '.join(problems) or 'none'}."
        )
    return tuple(path for path in modules if path in targets)


def _compile_patterns(target_modules: str | Sequence[str]) -> dict[str, re.Pattern]:
    if isinstance(target_modules, str) and _NAME_LIST.fullmatch(target_modules):
        target_modules = re.split(r"\s*,\s*", target_modules)
    if not isinstance(target_modules, str):
        suffixes = {name: rf"(.*\.)?{re.escape(name)}" for name in target_modules}
        return {name: re.compile(suffix) for name, suffix in suffixes.items()}
    try:
        return {target_modules: re.compile(target_modules)}
    except re.error as error:
        raise ValueError(
            f"`target_modules` must be {ALL_LINEAR!r}, names of modules or a regular "
            f"expression. Got {target_modules!r}: {error}."
        ) from error


def _modules_by_path(params: PyTree, names: ql.io.Names) -> dict[str, list[str]]:
    """Returns, by path, the module names of each linear kernel, one for each layer."""

    def module_of(name: str) -> str:
        # Some models store all experts in one parameter, without a module for each. The
        # name of such an expert ends in its index, as in "experts.gate_up_proj.3", and
        # `target_modules` selects the parameter.
        parameter = name.rpartition(".")[0]
        is_expert = names.is_stack(parameter)
        return parameter if is_expert else name.removesuffix(".weight")

    modules = {}
    for path, leaf in leaves_by_path(params).items():
        # Keep only matrices, whose axes besides batch axes are an input and an output.
        if names.roles(path) in ("kn", "nk"):
            batch_shape = leaf.shape[: names.num_batch_axes(path)]
            modules[path] = [*map(module_of, names.of(path, batch_shape).flat)]
    return modules
