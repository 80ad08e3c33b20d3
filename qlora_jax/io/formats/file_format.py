"""The records that describe a file format: how a library stores packed weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...quant.qtensor import QTensor
from ..files import require
from ..stored_weight import StoredWeight

Settings = Mapping[str, Any]  # `quantization_config` in a folder's `config.json`
Config = Mapping[str, Any]  # the content of `config.json`
Kernels = Mapping[str, QTensor]  # `[K, N]`, by the names of their weights


class Parts(dict[str, Any]):
    """The tensors of one weight, by the ends of their names.

    These are `FileFormat.parts` and the end of the name that `FileFormat.marker`
    matched, all without `.` or `_` in front.
    """

    def tensor(self, name: str, *dtypes: str, axes: int = 2) -> Any:
        """Returns a part, which must have one of the dtypes and no axis of size 0."""
        require(name in self, f"`{name}` must be given. Got none.")
        x, choices = self[name], " or ".join(dtypes)
        has_dtype, shape = str(x.dtype) in dtypes, list(x.shape)
        message = f"`{name}` must have dtype {choices} and {axes} axes. Got {x.dtype}"
        require(has_dtype and len(shape) == axes and all(shape), f"{message}{shape}.")
        return x

    def scalar(self, name: str) -> float:
        """Returns the value of a part that holds one positive number."""
        is_scalar = name in self and tuple(self[name].shape) in ((), (1,))
        require(is_scalar, f"`{name}` must be one number.")
        value = float(np.asarray(self[name][...], np.float32).reshape(()))
        is_valid = 0 < value < np.inf
        require(is_valid, f"`{name}` must be positive and finite. Got {value}.")
        return value


@dataclass(frozen=True)
class Writer:
    """How packed kernels become tensors and settings."""

    name: str  # in lower case, the `layout` of `save_packed`
    formats: tuple[str, ...]  # of the kernels
    # Returns the tensors of a kernel `[K, N]` whose weight has a name `module.weight`.
    tensors: Callable[[str, QTensor], dict[str, Any]]
    # Returns the changes to `config.json`, from the kernels, the modules in float and
    # the config of the float model.
    config: Callable[[Kernels, list[str], Config], dict[str, Any]]
    # Returns why a kernel of these formats cannot be stored, or None if it can.
    problem: Callable[[QTensor], str | None] | None = None
    # The attributes of a QTensor that must be equal in all kernels.
    shared: tuple[str, ...] = ("fmt", "block_size")


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """How a library stores packed weights, in tensors and in `config.json`.

    For AWQ, the marker matches `up.qweight`, and its group is `up.`. The parts `qzeros`
    and `scales` are then the tensors `up.qzeros` and `up.scales`. All three go to
    `read`, which returns the weight under the name `weight`, as `up.weight`.
    """

    # A pattern that matches the name of one tensor of each weight. Its group is the
    # start of the names of all of the weight's tensors.
    marker: str
    # The dtype of that tensor, if other formats have tensors of the same name.
    marker_dtype: str = ""
    # The ends of the names, after that start, of other tensors that a weight may have.
    parts: tuple[str, ...] = ()
    # Maps the parts and the settings to weights, by the ends of the weights' names.
    read: Callable[[Parts, Settings], Mapping[str, StoredWeight]]
    # For each `quant_method`, the settings that change how weights are stored, with
    # their supported values. The first value is the default.
    methods: Mapping[str, Mapping[str, tuple]] = field(default_factory=dict)
    fmt: str = "int4_f16"  # of the weights, for `read_quantization`
    # Checks the settings, and returns them with the `fmt` that they imply, and under
    # the names that `methods` and `read` use.
    read_settings: Callable[[Settings], dict[str, Any]] = dict
    write: Writer | None = None  # None for a format that is only read
