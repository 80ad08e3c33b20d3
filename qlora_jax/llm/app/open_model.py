"""Finds and reads a model, with or without an adapter."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import PyTree

import qlora_jax as ql
from qlora_jax.io.files import check_links
from qlora_jax.io.model_folder import read_config_json

from ..models.config import DecoderConfig
from ..models.families import is_known
from ..models.folder import ModelFolder
from ..models.jax_engine import JaxEngine
from ..models.sharding import Contract
from ..models.torch_decoder import TorchEngine, open_torch_engine
from ..reading import reading
from ..train.outputs import NATIVE_ADAPTER
from .configs import EngineName
from .processes import log

# A model in `Decoder` or in PyTorch's code, with the attributes that all commands need.
Engine = JaxEngine | TorchEngine


@dataclass(frozen=True)
class OpenModel:
    """A model, optionally with an adapter, before or after its weights are read."""

    engine: Engine
    base: PyTree  # parameters; before `read`, only their shapes
    lora: PyTree = dataclasses.field(default_factory=dict)
    adapter_path: pathlib.Path | None = None  # of an adapter that is not read yet
    peft: ql.io.PeftConfig | None = None  # the adapter's PEFT settings, if known
    recode: bool = False  # whether 4-bit weights may be decoded and packed again
    name: str = ""  # a hub id or a path
    step: int | None = None  # of the saved state of a run, if the adapter is from one

    @property
    def path(self) -> pathlib.Path:
        """The folder of the model."""
        return self.engine.path

    @property
    def files(self) -> ModelFolder:
        """The files of the model."""
        return self.engine.files

    @property
    def names(self) -> ql.io.Names:
        """The names of the parameters in the Hugging Face model."""
        return self.engine.names

    @property
    def decoder(self) -> DecoderConfig:
        """The config of the decoder.

        Raises ValueError for a model that runs in PyTorch's code instead.
        """
        if isinstance(self.engine, TorchEngine):
            raise ValueError(
                "`model` must be of a type that docs/models.md lists, because this "
                "command does not support models that run in PyTorch's code. Got "
                f"{self.engine.model_type}."
            )
        return self.engine.decoder

    def check_for_torch(self, option: str, value: str, allowed: Sequence[str]) -> None:
        """Raises ValueError if PyTorch's code runs the model and rejects `value`.

        `allowed` has the values of the option that such models support.
        """
        if isinstance(self.engine, TorchEngine) and value not in allowed:
            choices = f"one of {', '.join(allowed)}" if allowed else "left out"
            raise ValueError(
                f"`{option}` must be {choices} for a {self.engine.model_type} model, "
                f"which runs in PyTorch's code. Got {value}."
            )

    def contract_of(self, patterns: Sequence[Any]) -> Contract:
        """Returns the argument `contract` of `QLoRAConfig` for some kernels.

        `patterns` select the kernels, as `engine.layers` does. For a `JaxEngine`, the
        result is empty, because the default of `QLoRAConfig` holds for its kernels.
        """
        contract = self.engine.contract.items()
        return {pattern: roles for pattern, roles in contract if pattern in patterns}

    @property
    def is_local(self) -> bool:
        """Whether the name is a path on this machine."""
        return pathlib.Path(self.name).expanduser().exists()

    @property
    def revision(self) -> str | None:
        """The commit of a model from the hub; None for other weights."""
        # The hub's cache names the folder of a snapshot after its commit.
        return None if self.is_local else self.path.name

    @property
    def source(self) -> str:
        """Describes where the weights were found."""
        if self.is_local:
            return f"local files in {self.path}"
        return f"{self.name} on the Hugging Face hub, revision {self.revision}"

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The quantization settings in the files; a folder of floats has none."""
        return self.files.quantization

    @property
    def stored_fmt(self) -> str | None:
        """The number format of the weights in the files; None for float weights."""
        return self.quantization.get("fmt")

    @property
    def stored_packing(self) -> Any:
        """The `Packing` of the first packed weight in the files; None for floats."""
        return next(iter(self.stored_packings), None)

    @property
    def stored_packings(self) -> dict[Any, None]:
        """The packings of all weights in the files, in order and without repetition."""
        packed = ql.io.packed_tensors(self.files.stored_tensors).values()
        packings = (getattr(tensor, "packing", None) for tensor in packed)
        return dict.fromkeys(filter(None, packings))

    @property
    def replaces_weights(self) -> bool:
        """Whether the adapter also has biases or modules that replace the base's."""
        path = self.adapter_path
        if path is None or not _is_peft(path):
            return False
        tensors = ql.io.open_safetensors(path / "adapter_model.safetensors")
        return any(".lora_" not in key for key in tensors)

    def packing_config(
        self,
        fmt: str,
        block_size: int | None,
        double_quant: bool | None,
    ) -> ql.QLoRAConfig | None:
        """Returns how to pack the layers while reading; None to read them as stored."""
        stored_fmt = self.stored_fmt
        if fmt == "none" or (fmt == stored_fmt and not self.recode):
            self._check_stored(block_size=block_size, double_quant=double_quant)
            return None
        if fmt == stored_fmt and block_size is None:  # pack again, in the same format
            block_size = self.quantization.get("group_size")
        if stored_fmt is not None and not self.recode:
            raise ValueError(
                f"`fmt` must be none or {stored_fmt}, the format of the model, which "
                "is already in 4 bits. For another one, start from the float model. "
                f"Got {fmt!r}."
            )
        return ql.QLoRAConfig(
            fmt=fmt,
            block_size=block_size,
            double_quant=double_quant,
            targets=self.engine.layers,
            contract=self.contract_of(self.engine.layers),
        )

    def _check_stored(self, **settings: int | bool | None) -> None:
        """Raises ValueError if settings differ from those of the packed weights."""
        requested = {k: value for k, value in settings.items() if value is not None}
        if not requested or (packing := self.stored_packing) is None:
            return  # there are no settings, or no packed weights
        for name, value in requested.items():
            if value != (stored := getattr(packing, name)):
                raise ValueError(
                    f"`{name}` must be {stored}, as in the model, which is already in "
                    f"4 bits. Got {value}."
                )

    def read(
        self,
        *,
        dtype: Any = None,  # by default, the dtype in the files
        packing_config: ql.QLoRAConfig | None = None,
        place: Callable[[PyTree], PyTree] | None = None,
        progress: bool = True,
    ) -> "OpenModel":
        """Reads the parameters and the adapter. The arguments are those of `load`."""
        # Most adapters need only the shapes of the base. They are read first, so that
        # errors are found early. An adapter that replaces weights needs the weights.
        needs_weights = self.replaces_weights
        model = self if needs_weights else self.read_adapter()
        # `recode` converts byte layouts that are not supported, and reads the layers of
        # a module in float, with a warning, if only some of them are in 4 bits.
        base = self.engine.load(
            dtype, packing_config, recode=True, place=place, progress=progress
        )
        model = dataclasses.replace(model, base=base)
        return model.read_adapter() if needs_weights else model

    def read_adapter(self) -> "OpenModel":
        """Returns the model with its adapter in `lora`.

        If the adapter replaces parameters, they are replaced in the base.
        """
        if (path := self.adapter_path) is None:
            return self
        if _is_peft(path):
            base, lora, peft = ql.io.load_peft(path, self.base, self.names)
        else:
            base, lora, peft = self.base, _read_native(path), None
            ql.combine(base, lora)  # raises if the adapter does not fit
        return dataclasses.replace(
            self, base=base, lora=lora, peft=peft, adapter_path=None
        )


def _is_peft(path: pathlib.Path) -> bool:
    return (path / "adapter_config.json").exists()


def _read_native(path: pathlib.Path) -> PyTree:
    file = path / NATIVE_ADAPTER if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            "`adapter` must be a folder with adapter_config.json or "
            f"{NATIVE_ADAPTER}, or a file of qlora_jax.io.save. Got {str(path)!r}."
        )
    tree = ql.io.restore(file).tree
    # The file has the lora tree itself, or a dict with the lora tree under `lora`.
    return tree["lora"] if isinstance(tree, dict) and "lora" in tree else tree


def open_model(
    name_or_path: str,
    adapter: str | None = None,
    engine: EngineName = "jax",
) -> OpenModel:
    """Finds a model and an adapter.

    Reads only the model's config and, if it is in this library's format, the adapter,
    so that commands know early whether it is merge-aware. With the engine "auto",
    models that the JAX decoder does not support run in PyTorch's code.
    """
    path = ql.io.fetch(name_or_path)
    if not path.is_dir():
        raise ValueError(
            "`model` must be a folder with config.json and safetensors, or a hub id. "
            f"Got the file {path}."
        )
    adapter_path = None if adapter is None else fetch_adapter(adapter)
    model_engine = _open_engine(path, engine)
    model = OpenModel(
        model_engine,
        model_engine.shapes,
        adapter_path=adapter_path,
        name=name_or_path,
    )
    if not model.is_local:
        log(f"weights: {model.source}")
    is_native = adapter_path is not None and not _is_peft(adapter_path)
    return model.read_adapter() if is_native else model


def _open_engine(path: pathlib.Path, name: EngineName) -> Engine:
    files = ModelFolder(path)
    if name == "jax":
        return JaxEngine(path, files.config)
    with reading(path / "config.json"):
        has_decoder = is_known(read_config_json(path))
    if name == "auto" and has_decoder:
        return JaxEngine(path, files.config)
    engine = open_torch_engine(path)
    log(
        f"engine: torch. {engine.class_name} runs in the PyTorch code of transformers, "
        "through torchax"
    )
    if engine.scan_problem is not None:
        log(f"note: every layer is compiled by itself, because {engine.scan_problem}")
    return engine


def fetch_adapter(adapter: str) -> pathlib.Path:
    """Returns the local folder or file of an adapter, which may be a hub id."""
    try:
        path = ql.io.fetch(adapter)
    except FileNotFoundError as error:  # its message is about the option `model`
        message = str(error).replace("`model`", "`adapter`")
        raise FileNotFoundError(message) from error
    check_links(path)
    return path


def hash_files(path: pathlib.Path) -> str:
    """Returns a hash of the sizes of a model's files and of samples of their bytes."""
    hasher = hashlib.sha256()
    num_samples, sample_bytes = 64, 1 << 14
    names = ["config.json", *sorted(p.name for p in path.glob("*.safetensors"))]
    for file in [path / name for name in names] if path.is_dir() else [path]:
        size = file.stat().st_size
        hasher.update(f"{file.name} {size}\n".encode())
        last = max(0, size - sample_bytes)
        with file.open("rb") as opened:
            for offset in np.linspace(0, last, num_samples, dtype=np.int64):
                opened.seek(int(offset))
                hasher.update(opened.read(sample_bytes))
    return hasher.hexdigest()[:16]
