"""The records that describe a file format: how a library stores packed weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...quant.qtensor import QTensor
from ..stored_weight import StoredWeight

Parts = Mapping[str, Any]  # the tensors of one weight, by the ends of their names
Settings = Mapping[str, Any]  # `quantization_config` in a folder's `config.json`
Config = Mapping[str, Any]  # the content of `config.json`
Kernels = Mapping[str, QTensor]  # `[K, N]`, by the names of their weights


@dataclass(frozen=True)
class Writer:
    """How packed kernels become tensors and settings."""

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
    """How a library stores packed weights, in tensors and in `config.json`."""

    name: str  # in lower case, the `layout` of `save_packed`
    # A pattern that matches the name of one tensor of each weight. Its group is the
    # start of the names of all of the weight's tensors.
    marker: str
    marker_dtype: str = ""  # if other formats have a tensor of the same name
    parts: tuple[str, ...] = ()  # ends of names of other tensors that it may have
    ignored: tuple[str, ...] = ()  # ends of names that do not describe weights
    # Maps the parts and the settings to weights, by the ends of the weights' names.
    read: Callable[[Parts, Settings], Mapping[str, StoredWeight]]
    # For each `quant_method`, the settings that change how weights are stored, with
    # their supported values. The first value is the default.
    methods: Mapping[str, Mapping[str, tuple]] = field(default_factory=dict)
    fmt: str = "int4_f16"  # of the weights, for `read_quantization`
    # Changes the settings: replaces `fmt`, or names of settings that have older names.
    read_settings: Callable[[Settings], dict[str, Any]] = dict
    write: Writer | None = None  # None for a format that is only read
