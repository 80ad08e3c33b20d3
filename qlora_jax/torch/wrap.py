"""`wrap` turns a PyTorch module into a pure function."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchax

import qlora_jax as ql

from . import autograd_functions
from .arrays import Model, module_of, named_tensors
from .layers import names_in, runs_of
from .scan import LayerScan
from .weights import (
    Backend,
    KernelFunctions,
    StackedWeight,
    as_array,
    as_tensor,
    call_module,
)

PyTree = Any
Policy = Callable[..., bool]


@dataclass(frozen=True, eq=False)
class WrappedModule:
    """A PyTorch module as a pure function of JAX arrays; made by `wrap`.

    Attributes:
        module: The module. It does not change.
        training: Whether each module in it was in training mode when it was wrapped, by
            name: True after `module.train()`, and False after `module.eval()`.
        policy: The policy of `jax.checkpoint` for stacked layers, as in `wrap`.
        backend: The back end of all products, as in `wrap`.

    Example:
        >>> import jax, qlora_jax as ql, torch
        >>> model = ql.torch.wrap(torch.nn.Linear(64, 8).eval())
        >>> params = ql.torch.params(model)
        >>> model.apply({"params": params}, jax.numpy.ones((2, 64))).shape
        (2, 8)
    """

    module: torch.nn.Module
    training: Mapping[str, bool] = field(repr=False)
    policy: Policy | None = None
    backend: Backend = None

    def apply(
        self,
        variables: Mapping[str, PyTree],
        *args: PyTree,
        dropout_key: jax.Array | None = None,
        **kwargs: PyTree,
    ) -> PyTree:
        """Returns the output of the module's `forward` as JAX arrays.

        Args:
            variables: `"params"` is the base tree, with the module's parameters and
                buffers by name, or a combined tree. `"lora"` is the lora tree, if it is
                separate.
            *args: Passed to the module, with JAX and NumPy arrays as tensors.
            dropout_key: PRNG key of the module's random numbers and of the adapters'
                dropout, for a module in training mode.
            **kwargs: Passed to the module, like `args`.

        Returns:
            What the module returns, with JAX arrays in place of tensors. Mappings, such
            as the outputs of transformers, become plain dicts, and tuples that are not
            namedtuples, such as the result of `torch.max`, become plain tuples.

        Raises:
            TypeError: If an argument is a PyTorch tensor; or if the module returns
                something that is neither a tensor nor a number, nor a container of
                them.
            ValueError: If `"params"` lacks names or has unknown ones; if an adapter
                does not fit its kernel; if the module draws random numbers, but there
                is no `dropout_key`; if there is a `dropout_key`, but the module is in
                evaluation mode; if the module has backward hooks; or if it changes its
                buffers or parameters, as batch normalization does in training mode.

        Example:
            >>> import jax, qlora_jax as ql, torch
            >>> model = ql.torch.wrap(torch.nn.Linear(64, 8).eval())
            >>> config = ql.QLoRAConfig(rank=4, targets="weight")
            >>> base, lora = ql.torch.init(
            ...     jax.random.key(0), model, ql.torch.params(model), config)
            >>> x = jax.numpy.ones((2, 64))
            >>> model.apply({"params": base, "lora": lora}, x).shape
            (2, 8)
        """
        # 1. Check the names and the key, and convert arrays to tensors.
        leaves = self._checked_leaves(variables)
        _refuse_backward_hooks(self.module)
        if dropout_key is not None and not any(self.training.values()):
            raise ValueError(
                "`dropout_key` must be None for a module in evaluation mode. Call "
                "module.train() before ql.torch.wrap. Got a key."
            )
        scans, leaves = self._scans(leaves)
        args, kwargs = jax.tree.map(_to_tensor, (args, kwargs))
        # 2. Run the module. Without a `dropout_key`, use a constant key, which shows
        #    afterwards whether the module drew random numbers.
        key = jax.random.key(0) if dropout_key is None else dropout_key
        kernel_functions = KernelFunctions(dropout_key is not None, self.backend)
        with self._environment(key, kernel_functions, scans) as env:
            output = call_module(self.module, leaves, args, kwargs)
            drew_numbers = env.prng_key is not key
            output = kernel_functions.with_checks(_to_arrays(output))
        if drew_numbers and dropout_key is None:
            raise ValueError(
                "`dropout_key` must be a key: the module draws random numbers. For a "
                "module without dropout, call module.eval() before ql.torch.wrap. Got "
                "None."
            )
        return output

    @contextlib.contextmanager
    def _environment(
        self, key: jax.Array, kernel_functions: KernelFunctions, scans: list[LayerScan]
    ) -> Iterator[torchax.tensor.Environment]:
        """Prepares PyTorch's and JAX's settings for one call of the module."""
        env = torchax.default_env()
        with contextlib.ExitStack() as contexts:
            # PyTorch asks for 64-bit integers, and JAX warns that it makes 32-bit ones.
            # PyTorch's code also broadcasts arrays of different ranks, which JAX may be
            # set to refuse.
            contexts.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Explicitly requested dtype .?int64")
            contexts.enter_context(jax.numpy_rank_promotion("allow"))
            # Gradients are only stopped by a `torch.no_grad` in the module's own code,
            # and not by one around the call of `apply`.
            contexts.enter_context(torch.enable_grad())
            contexts.enter_context(autograd_functions.in_jax(kernel_functions))
            contexts.enter_context(self._training_modes())
            for scan in scans:
                contexts.enter_context(scan.active())
            contexts.enter_context(env.override_property(prng=key))
            contexts.enter_context(env)
            contexts.enter_context(kernel_functions)
            yield env

    def _checked_leaves(self, variables: Mapping[str, PyTree]) -> dict[str, Any]:
        unknown = sorted({*variables} - {"params", "lora"})
        if unknown or "params" not in variables:
            raise ValueError(
                "`variables` must have the keys 'params' and possibly 'lora'. Got "
                f"{sorted(variables)}."
            )
        params, lora = variables["params"], variables.get("lora")
        leaves = dict(ql.combine(params, lora) if lora else params)
        names = {*named_tensors(self.module)}
        received = {name for leaf_name in leaves for name in names_in(leaf_name)}
        missing, extra = sorted(names - received), sorted(received - names)
        if missing or extra:
            raise ValueError(
                "`params` must have the parameters and buffers of the module, as "
                f"ql.torch.params returns them. Missing: {missing}, unknown: {extra}."
            )
        return leaves

    def _scans(self, leaves: dict[str, Any]) -> tuple[list[LayerScan], dict[str, Any]]:
        """Returns the scans of stacked layers, and the leaves that are not stacked.

        Each weight of a stacked layer has a placeholder among the latter.
        """
        scans, unstacked = [], dict(leaves)
        for run, names in runs_of(leaves, self.module).items():
            stacks: list[dict[str, Any]] = [{} for _ in range(run.period)]
            for name in names:
                position, tensor_name = run.parse(name)
                stack = unstacked.pop(name)
                stacks[position][tensor_name] = stack
                for layer_name in names_in(name):
                    unstacked[layer_name] = StackedWeight.of(stack, run.list_name)
            layers = [
                self.module.get_submodule(f"{run.list_name}.{i}") for i in run.indices
            ]
            scans.append(LayerScan(run, layers, stacks, self.policy))
        return scans, unstacked

    @contextlib.contextmanager
    def _training_modes(self) -> Iterator[None]:
        # The modes are those from the time of `wrap`, even if they have changed since,
        # because a jitted function would not notice the change.
        modules = dict(self.module.named_modules())
        current = {name: module.training for name, module in modules.items()}
        try:
            for name, mode in self.training.items():
                modules[name].training = mode
            yield
        finally:
            for name, mode in current.items():
                modules[name].training = mode


def wrap(
    model: Model, *, policy: Policy | None = None, backend: Backend = None
) -> WrappedModule:
    """Returns a PyTorch module as a pure function of JAX arrays.

    When JAX traces the function, the code of the module runs in JAX, through torchax.
    The function may be jitted, differentiated and mapped. The weights come from the
    arguments of `apply`, so the module itself may be on the meta device. The module is
    neither changed nor copied.

    The function keeps the modes that the module has now: dropout is active if the
    module was wrapped after `module.train()`.

    Args:
        model: The module. A wrapped module is returned unchanged, unless this call has
            options, which then replace all of its options.
        policy: The policy of `jax.checkpoint`, which decides which values of stacked
            layers are kept for the backward pass. By default, only their inputs are
            kept.
        backend: The back end or back ends of all products with packed weights, as in
            `qlora_jax.matmul`. `apply` raises an error if a back end is unknown.

    Raises:
        TypeError: If `model` is not a PyTorch module.

    Example:
        >>> import jax, qlora_jax as ql, torch
        >>> model = ql.torch.wrap(torch.nn.Linear(64, 8).eval())
        >>> params = ql.torch.params(model)
        >>> apply = jax.jit(model.apply)
        >>> apply({"params": params}, jax.numpy.ones((2, 64))).shape
        (2, 8)
    """
    if isinstance(model, WrappedModule) and policy is None and backend is None:
        return model
    modes = {name: m.training for name, m in module_of(model).named_modules()}
    return WrappedModule(module_of(model), modes, policy, backend)


def _refuse_backward_hooks(module: torch.nn.Module) -> None:
    owners = {**dict(module.named_modules()), **dict(module.named_parameters())}
    hooked = [
        name
        for name, owner in owners.items()
        if owner._backward_hooks or getattr(owner, "_backward_pre_hooks", None)
    ]
    if hooked:
        raise ValueError(
            "the module must not have backward hooks, which JAX would not call. Got "
            f"backward hooks of {hooked}."
        )


def _to_tensor(value: Any) -> Any:
    if isinstance(value, jax.Array | np.ndarray):
        return as_tensor(jnp.asarray(value))
    if isinstance(value, torch.Tensor) and not isinstance(value, torchax.tensor.Tensor):
        raise TypeError(
            "the arguments of `apply` must be JAX or NumPy arrays instead of tensors. "
            f"Got a tensor of shape {tuple(value.shape)}."
        )
    return value


def _to_arrays(output: Any) -> PyTree:
    # Output objects of transformers are Mappings, but not pytrees.
    if isinstance(output, torch.Tensor):
        return as_array(output)
    if isinstance(output, Mapping):
        return {key: _to_arrays(value) for key, value in output.items()}
    if isinstance(output, tuple | list):
        values = [_to_arrays(value) for value in output]
        if hasattr(output, "_fields"):  # a namedtuple
            return type(output)(*values)
        # Other classes of tuples, such as `torch.return_types.max`, are not pytrees.
        return values if isinstance(output, list) else tuple(values)
    if output is None or isinstance(output, bool | int | float):
        return output
    hint = ""
    if type(output).__name__.endswith("Cache"):
        hint = " Pass use_cache=False to a model of transformers."
    raise TypeError(
        "the module must return tensors, numbers, or containers of them. Got "
        f"{type(output).__name__}.{hint}"
    )
