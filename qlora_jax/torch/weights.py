"""Packed and adapted kernels that replace the weights of a PyTorch module."""

import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F
import torchax
from jax.core import Tracer
from jax.typing import DTypeLike
from torch.overrides import TorchFunctionMode
from torchax.ops.mappings import j2t_dtype
from torchax.tensor import TENSOR_CONSTRUCTORS
from torchax.view import View

import qlora_jax as ql

from . import operators
from .layers import ScanError
from .tensors import Detached, as_array, as_tensor, beside_jax, is_jax, is_known

operators.register()
PyTree = Any
Leaf = Any  # an array, a kernel, or an `AdaptedKernel`
Backend = str | Sequence[str] | None


def tensor_of(leaf: Leaf) -> torch.Tensor:
    """Returns the tensor that a module reads for a leaf of a combined tree."""
    if isinstance(leaf, Placeholder):  # for a weight of a stacked layer
        return leaf
    base, lora = ql.split(leaf)
    adapter: Any = lora or None  # `lora` is an empty dict if there is no adapter
    # An array that is trained in full replaces the frozen one.
    if adapter is not None and adapter.replacement is not None:
        return as_tensor(ql.merge(base, adapter))
    # A plain array has no geometry.
    if adapter is None and not hasattr(base, "geometry"):
        return as_tensor(jnp.asarray(base))
    return KernelTensor.of(base, adapter)


def call_module(
    module: torch.nn.Module,
    leaves: Mapping[str, Leaf],
    args: tuple,
    kwargs: dict[str, Any],
    prefix: str = "",
) -> Any:
    """Calls a module with leaves in place of its parameters and buffers.

    Raises ValueError if the module changes them. `prefix` is the part of their names
    that the keys of `leaves` do not have.
    """
    # `tensors` has only the first name of each tied weight. `functional_call` also
    # replaces the weight under its other names. If the module assigns a tensor to a
    # parameter or a buffer, `functional_call` writes this tensor into `tensors`.
    tensors = {name: tensor_of(leaf) for name, leaf in leaves.items()}
    values = {name: _value_of(tensor) for name, tensor in tensors.items()}
    # If a module has two names, `functional_call` does not restore its tensors. The
    # module's code may also set attributes, such as `weight` with `weight_norm`.
    originals = [
        (inner, dict(vars(inner)), dict(inner._parameters), dict(inner._buffers))
        for inner in module.modules()
    ]
    try:
        output = torch.func.functional_call(module, tensors, args, kwargs)
    finally:
        for inner, attributes, parameters, buffers in originals:
            vars(inner).clear()
            vars(inner).update(attributes)
            inner._parameters.update(parameters)
            inner._buffers.update(buffers)
    changed = [
        f"{prefix}{name}"
        for name, value in values.items()
        if _value_of(tensors[name]) is not value
    ]
    if changed:
        raise ValueError(
            "the module must not change its buffers or parameters, because `apply` "
            "returns only its output. Call eval() of the modules that change them "
            f"before ql.torch.wrap. Got changes of {changed}."
        )
    return output


def _value_of(tensor: torch.Tensor) -> object:
    """Returns an object that is replaced if a function changes the tensor in place."""
    return tensor if isinstance(tensor, Placeholder) else as_array(tensor)


class Placeholder(torch.Tensor):
    """A tensor with a shape and a dtype, and without data."""

    struct: jax.ShapeDtypeStruct
    # Without this line, PyTorch would treat reading an attribute of the tensor as a
    # call of a function.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    def __new__(cls, shape: Sequence[int], dtype: DTypeLike) -> Self:
        """Returns a new tensor without data."""
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=j2t_dtype(dtype), device=torch.device("meta")
        )
        self.struct = jax.ShapeDtypeStruct(tuple(shape), dtype)
        return self

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: object, args: tuple = (), kwargs: Any = None
    ) -> Any:
        """Raises an error: only `KernelFunctions` handles functions of placeholders."""
        raise NotImplementedError(
            f"this tensor can only be used in `apply` of a wrapped module. Got {func}."
        )

    # Modules may read these attributes. The device is that of torchax's tensors.
    shape = property(lambda self: torch.Size(self.struct.shape))  # pyright: ignore
    ndim = property(lambda self: len(self.struct.shape))  # pyright: ignore
    dtype = property(lambda self: j2t_dtype(self.struct.dtype))  # pyright: ignore
    device = property(lambda self: torch.device("jax:0"))  # pyright: ignore

    def is_floating_point(self) -> bool:
        """Whether the dtype is a float."""
        return self.dtype.is_floating_point


class PendingOutput(Placeholder):
    """The output of a layer that will run later, in a scan (see `scan.py`)."""

    source_scan: object
    list_name: str


class StackedWeight(Placeholder):
    """A weight of a stacked layer, as the model sees it outside of the layer."""

    list_name: str

    @classmethod
    def of(cls, stack: Leaf, list_name: str) -> "StackedWeight":
        """Returns the placeholder of any weight in a stack."""
        base, _ = ql.split(stack)
        self = cls(base.shape[1:], base.dtype)
        self.list_name = list_name
        return self


class KernelTensor(Placeholder):
    """A kernel and its adapter as the tensor that a module sees."""

    base: Leaf
    lora: Any
    is_transposed: bool  # whether the last two axes are swapped

    @classmethod
    def of(cls, base: Leaf, lora: Any, is_transposed: bool = False) -> "KernelTensor":
        """Returns the tensor of a kernel."""
        shape = list(base.shape)
        if is_transposed:
            shape[-2:] = reversed(shape[-2:])
        self = cls(shape, base.dtype)
        self.base, self.lora, self.is_transposed = base, lora, is_transposed
        return self

    @property
    def roles(self) -> str:
        """The roles of the axes, such as "nk": n output, k contracted, b batch."""
        # If the weights are a plain array, only the adapter knows the roles.
        geometry = getattr(self.base, "geometry", None) or self.lora.geometry
        roles = geometry.roles(self.ndim)
        return roles[:-2] + roles[-1] + roles[-2] if self.is_transposed else roles

    def transposed(self) -> "KernelTensor":
        """Returns the tensor with its last two axes swapped."""
        return KernelTensor.of(self.base, self.lora, not self.is_transposed)

    def decoded(self) -> "DecodedWeight":
        """Returns the float weights, with the adapter added."""
        weight = ql.merge(self.base, self.lora)
        weight = weight.swapaxes(-1, -2) if self.is_transposed else weight
        return DecodedWeight(weight, torchax.default_env())


class DecodedWeight(torchax.tensor.Tensor):
    """The decoded weights of a kernel, which raise an error if they are changed.

    A change would have no effect on the kernel. Every change of a tensor of torchax in
    place, or of a view of it, assigns a new array to its attribute `_elem`.
    """

    @property
    def _elem(self) -> jax.Array:
        return self._array

    @_elem.setter
    def _elem(self, array: jax.Array) -> None:
        if hasattr(self, "_array"):
            raise _changed_in_place(self)
        self._array = array


@dataclass
class KernelFunctions(TorchFunctionMode):
    """Handles all calls of PyTorch functions with kernels while it is active.

    Products and lookups use the packed weights. All other functions get the decoded
    weights, with the adapter added.
    """

    has_dropout: bool  # whether the adapters' dropout is active
    backend: Backend = None  # of all products, as in `wrap`
    # The conditions that the module has checked so far. Whether they are true is not
    # known while JAX traces the module, so `with_checks` uses them afterwards.
    conditions: list[jax.Array] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.new_tensor:
            func, kwargs = torch.tensor, {"dtype": args[0].dtype, **kwargs}
            args = args[1:]
        is_constructor = func in TENSOR_CONSTRUCTORS and kwargs.get("device") is None
        if is_constructor:
            kwargs["device"] = "jax"
        tensors = [x for x in _values(args, kwargs) if isinstance(x, torch.Tensor)]
        if (tensors or is_constructor) and all(map(is_known, tensors)):
            # The module's code may depend on these values, such as `zeros(n).tolist()`.
            with jax.ensure_compile_time_eval():
                result = self._call(func, args, kwargs)
            for value in _values((result,), {}):
                if isinstance(value, torchax.tensor.Tensor):
                    value.is_known = True  # type: ignore
        else:
            if any(map(is_jax, tensors)):
                args, kwargs = _beside_jax(func, args, kwargs)
            result = self._call(func, args, kwargs)
        # torchax ignores `torch.no_grad`, so gradients are stopped here. As in PyTorch,
        # they are not stopped if a function such as `contiguous` returns its argument.
        if torch.is_grad_enabled() or any(result is value for value in args):
            return result
        return jax.tree.map(_stop_gradient, result)

    def _call(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is torch.Tensor.copy_:
            # torchax can copy from tensors, but not from its views of tensors.
            sources: Any = jax.tree.map(_without_view, (args[1:], kwargs))
            args, kwargs = (args[0], *sources[0]), sources[1]
        if func in GROUPED_PRODUCTS:
            return self._grouped_product(*args, **kwargs)
        if func is IS_ALL_TRUE:
            return self._is_all_true(*args)
        if func in (F.embedding, F.embedding_bag):
            # Both functions take it as their fourth argument.
            max_norm = args[3] if len(args) > 3 else kwargs.get("max_norm")
            if max_norm is not None:
                raise ValueError(
                    "embeddings must not have `max_norm`, with which PyTorch changes "
                    f"rows of the table. Got max_norm={max_norm}."
                )
        if func in (F.batch_norm, F.instance_norm):
            _mark_statistics(func, args, kwargs)
        placeholders = [x for x in _values(args, kwargs) if isinstance(x, Placeholder)]
        if func is torch.detach and not placeholders:
            return next(iter(args)).detach()
        if not placeholders:
            return func(*args, **kwargs)
        for placeholder in placeholders:
            if isinstance(placeholder, PendingOutput):
                raise ScanError(
                    f"the layers of {placeholder.list_name!r} cannot be scanned: the "
                    f"output of one is read by {func.__name__} before the next one "
                    "runs. Pass trees that are not stacked."
                )
            if isinstance(placeholder, StackedWeight):
                raise ScanError(
                    f"the layers of {placeholder.list_name!r} cannot be scanned: a "
                    f"weight of one is read by {func.__name__} outside of the layer. "
                    "Pass trees that are not stacked."
                )
        result = NotImplemented
        if (rule := RULES.get(func)) is not None:
            result = rule(self, *args, **kwargs)
        if result is not NotImplemented:
            return result
        args, kwargs = jax.tree.map(self._decode, (args, kwargs))
        return func(*args, **kwargs)

    def with_checks(self, output: PyTree) -> PyTree:
        """Returns the module's output, with NaN in floats if a condition is false."""
        if not self.conditions:
            return output
        is_valid = jnp.stack(self.conditions).all()

        def check_leaf(x: Any) -> Any:
            if not isinstance(x, jax.Array) or not jnp.issubdtype(
                x.dtype, jnp.floating
            ):
                return x
            return jnp.where(is_valid, x, jnp.nan)

        return jax.tree.map(check_leaf, output)

    def _is_all_true(self, condition: torch.Tensor) -> torch.Tensor:
        # `torch._check_tensor_all` calls this, and raises an error if the result is
        # false. Models of text and images use it to check that the text has as many
        # placeholders as there are features of images.
        is_true = as_array(condition).all()
        if not isinstance(is_true, Tracer):
            return torch.tensor(bool(is_true), device="cpu")
        self.conditions.append(is_true)
        return torch.tensor(True, device="cpu")

    def _decode(self, weight: Any) -> Any:
        if not isinstance(weight, KernelTensor):
            return weight
        # Dropout acts on the input of A. Merged weights have no such input.
        if self.has_dropout and getattr(weight.lora, "dropout", 0):
            raise ValueError(
                "adapters of weights that a module reads itself must not have dropout. "
                f"Got dropout={weight.lora.dropout} for a weight of shape "
                f"{tuple(weight.shape)}."
            )
        return weight.decoded()

    def _key(self, lora: Any) -> jax.Array | None:
        is_active = self.has_dropout and getattr(lora, "dropout", 0)
        return torchax.default_env().get_and_rotate_prng_key() if is_active else None

    def matmul(self, input: torch.Tensor, other: Any) -> Any:
        """Computes `input @ other`, if the first axis of `other` is contracted.

        This method and the public ones below return NotImplemented for calls that they
        do not support. `RULES` lists the PyTorch functions that they compute. Their
        parameters have PyTorch's names, because modules may pass them by name.
        """
        if isinstance(input, KernelTensor) or _roles_of(other) != "kn":
            return NotImplemented
        options = {"dropout_key": self._key(other.lora), "backend": self.backend}
        return as_tensor(ql.apply(other.base, other.lora, as_array(input), **options))

    def mm(self, input: torch.Tensor, mat2: Any) -> Any:
        """Computes `torch.mm`."""
        return self.matmul(input, mat2)

    def linear(
        self, input: torch.Tensor, weight: Any, bias: torch.Tensor | None = None
    ) -> Any:
        """Computes `F.linear`."""
        if not isinstance(weight, KernelTensor) or isinstance(bias, KernelTensor):
            return NotImplemented
        y = self.matmul(input, weight.transposed())
        return y if y is NotImplemented or bias is None else y + bias

    def addmm(
        self, input: torch.Tensor, mat1: torch.Tensor, mat2: Any, **factors: float
    ) -> Any:
        """Computes `torch.addmm`, as in the `Conv1D` of GPT-2."""
        if factors or isinstance(input, KernelTensor):
            return NotImplemented
        y = self.matmul(mat1, mat2)
        return y if y is NotImplemented else input + y

    def embedding(
        self,
        input: torch.Tensor,
        weight: Any,
        *_: object,
        **options: object,
    ) -> Any:
        """Computes `F.embedding`.

        The options are ignored: `max_norm` is refused before, `norm_type` depends on
        it, and the others only affect how PyTorch computes the gradient of the table.
        """
        if not isinstance(weight, KernelTensor) or weight.is_transposed:
            return NotImplemented
        # A table that is also the head may have a LoRA: it is merged for the lookup.
        if weight.lora is not None and not weight.lora.replaced_rows:
            return NotImplemented
        return as_tensor(ql.lookup(weight.base, weight.lora, as_array(input)))

    def transpose(self, input: KernelTensor, *axes: int, **named: int) -> Any:
        """Swaps the last two axes."""
        swapped = axes or named.values()
        are_last = {axis % input.ndim for axis in swapped} == {*range(input.ndim)[-2:]}
        return input.transposed() if are_last else NotImplemented

    def transpose_matrix(self, input: KernelTensor) -> Any:
        """Computes `input.T`, `input.mT` or `input.t()` of a matrix."""
        return input.transposed() if input.ndim == 2 else NotImplemented

    def detach(self, input: KernelTensor) -> torch.Tensor:
        """Computes `input.detach()`, whose changes are changes of the weight."""
        return self._decode(input).detach()

    def refuse_change(self, input: torch.Tensor, *_: object) -> Any:
        """Raises ValueError for `input[...] = value` and `input.data = value`."""
        # They are refused here, because torch.Tensor's setters cannot be called on
        # decoded weights: the tensors of torchax have their own setters.
        if isinstance(input, KernelTensor):
            raise _changed_in_place(input)
        return NotImplemented

    def _grouped_product(
        self, x: torch.Tensor, weight: Any, offs: Any = None, **options: Any
    ) -> Any:
        # Group i has the rows offs[i - 1] to offs[i] - 1.
        settings = {"offs": offs, **options}
        names = [name for name, value in settings.items() if value is not None]
        if names != ["offs"]:
            raise NotImplementedError(
                f"grouped products must have the option 'offs' alone. Got {names}."
            )
        rows = as_array(x)
        sizes = jnp.diff(as_array(offs), prepend=jnp.zeros(1, jnp.int32))
        if _roles_of(weight) == "bkn":
            key = self._key(weight.lora)
            y = ql.ragged_dot(
                rows,
                weight.base,
                sizes,
                weight.lora,
                dropout_key=key,
                backend=self.backend,
            )
        else:
            # Unlike `jax.lax.ragged_dot`, this function supports every kind of `vmap`.
            y = ql.ragged_dot(rows, as_array(self._decode(weight)), sizes)
        return as_tensor(y)


def _stop_gradient(value: Any) -> Any:
    if isinstance(value, View):
        return value.create_sub_view(Detached())
    if isinstance(value, torchax.tensor.Tensor) and value.dtype.is_floating_point:
        array = jax.lax.stop_gradient(as_array(value))
        return type(value)(array, torchax.default_env())  # such as a `DecodedWeight`
    return value


def _beside_jax(func: Callable, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Converts tensors that are not those of JAX, unless the function changes them."""
    name = getattr(func, "__name__", "")
    is_in_place = name.startswith(("__i", "__set")) or re.search("[^_]_$", name)
    head = args[: bool(is_in_place)]
    out = {"out": kwargs["out"]} if "out" in kwargs else {}
    args, kwargs = jax.tree.map(beside_jax, (args[len(head) :], kwargs))
    return (*head, *args), kwargs | out


def _without_view(value: Any) -> Any:
    return value.torch() if isinstance(value, View) else value


def _roles_of(value: object) -> str:
    """Returns the roles of the axes of a `KernelTensor`; "" for other values."""
    return value.roles if isinstance(value, KernelTensor) else ""


def _mark_statistics(func: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """Marks running statistics as changed if PyTorch's function updates them."""
    # torchax does not update them. Adding zero in place makes `call_module` raise the
    # same error for them as for other buffers.
    values = inspect.signature(func).bind(*args, **kwargs).arguments
    if func is F.batch_norm:
        is_updated = values.get("training", False)
    else:
        is_updated = values.get("use_input_stats", True)
    statistics = values.get("running_mean"), values.get("running_var")
    for statistic in statistics:
        if is_updated and statistic is not None:
            statistic.add_(0)


def _changed_in_place(weight: torch.Tensor) -> ValueError:
    return ValueError(
        "the module must not change packed or adapted weights in place. Got a change "
        f"of a weight of shape {tuple(weight.shape)}."
    )


def _values(args: tuple, kwargs: dict) -> Iterable[object]:
    # Functions take tensors as arguments, or as lists and tuples (`torch.cat`).
    for value in itertools.chain(args, kwargs.values()):
        yield from value if isinstance(value, list | tuple) else (value,)


# The same product, under its older and its newer name. torchax does not support it, so
# it is also computed here if none of its operands is a kernel.
GROUPED_PRODUCTS = {getattr(torch, "_grouped_mm"), F.grouped_mm}  # noqa: B009
IS_ALL_TRUE = torch.Tensor._is_all_true
RULES: dict[Callable, Callable[..., Any]] = {
    F.linear: KernelFunctions.linear,
    F.embedding: KernelFunctions.embedding,
    torch.addmm: KernelFunctions.addmm,
    torch.detach: KernelFunctions.detach,
    torch.Tensor.detach: KernelFunctions.detach,
    torch.Tensor.data.__get__: KernelFunctions.detach,  # pyright: ignore
    torch.Tensor.data.__set__: KernelFunctions.refuse_change,  # pyright: ignore
    torch.Tensor.__setitem__: KernelFunctions.refuse_change,
    torch.Tensor.t: KernelFunctions.transpose_matrix,
    torch.Tensor.T.__get__: KernelFunctions.transpose_matrix,  # pyright: ignore
    torch.Tensor.mT.__get__: KernelFunctions.transpose_matrix,  # pyright: ignore
    torch.t: KernelFunctions.transpose_matrix,
    torch.transpose: KernelFunctions.transpose,
    torch.Tensor.transpose: KernelFunctions.transpose,
    torch.matmul: KernelFunctions.matmul,
    torch.mm: KernelFunctions.mm,
    torch.Tensor.matmul: KernelFunctions.matmul,
    torch.Tensor.__matmul__: KernelFunctions.matmul,
    torch.Tensor.mm: KernelFunctions.mm,
}
