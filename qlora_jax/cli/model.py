"""Models and adapters as the commands take them."""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import qlora_jax as ql

from ..models.checkpoint import abstract_params, load, read_config
from ..models.config import DecoderConfig
from ..models.decoder_names import decoder_names
from ..models.download import fetch
from ..models.gguf.folder import folder_of_gguf
from ..models.text_half import folder_of_text, has_vision
from .train_config import TrainConfig

OWN_ADAPTER = "adapter.safetensors"
LAYERS = r"layers/.*/kernel"  # the head stays in float, as transformers has it


@dataclass(frozen=True)
class Model:
    """A model whose parameters are read.

    Attributes:
        path: Its folder or file.
        config: The decoder's config.
        base: Its parameters, or their shapes.
    """

    path: pathlib.Path
    config: DecoderConfig
    base: Any

    @property
    def names(self) -> "ql.io.Names":
        """What its parameters are called in a Hugging Face model."""
        return decoder_names(self.config)

    @property
    def written_names(self) -> "ql.io.Names":
        """What they are called where it is written: a text half is a model there."""
        return decoder_names(dataclasses.replace(self.config, module="model"))


@contextlib.contextmanager
def description_of(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives the folder whose config and tokenizer files are written beside weights.

    Args:
        path: A model's folder, or its `.gguf` file.
    """
    if path.is_dir() and not has_vision(read_config(path)):
        yield path
        return
    with (folder_of_text if path.is_dir() else folder_of_gguf)(path) as folder:
        yield folder


def open_model(
    source: str, *, dtype: Any = None, packing: "ql.QLoRAConfig | None" = None
) -> Model:
    """Reads a model.

    Args:
        source: A folder, a hub id or a `.gguf` file.
        dtype: Dtype of float parameters; that of the file where not given.
        packing: Which kernels to pack, and how. Without it, 4-bit weights whose bytes
            cannot be moved are read in another form, which is exact.
    """
    return read(open_shapes(source), dtype=dtype, packing=packing)


def open_shapes(source: str) -> Model:
    """As `open_model`, but reads no parameters."""
    path = fetch(source)
    config = read_config(path)
    return Model(path, config, abstract_params(config))


def read(
    model: Model,
    *,
    dtype: Any = None,
    packing: "ql.QLoRAConfig | None" = None,
    place: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> Model:
    """Reads the parameters of a model from `open_shapes`; see `open_model`.

    Args:
        model: The model.
        dtype: As in `open_model`.
        packing: As in `open_model`.
        place: As in `ql.io.load`.
        progress: Whether to show a bar.
    """
    config, base = load(
        model.path,
        dtype,
        packing,
        recode=packing is None,
        place=place,
        progress=progress,
    )
    return Model(model.path, config, base)


def packing_for(
    model: Model, fmt: str, block_size: int, double_quant: bool
) -> "ql.QLoRAConfig | None":
    """Returns how a model's layers are packed as they are read, or None for as stored.

    Raises:
        ValueError: If the model is packed already, in another format, or if the block
            size is not supported.
    """
    stored = _stored_packing(model)
    if fmt == "none":
        return None
    if stored:
        found = stored.get("bnb_4bit_quant_type", "fp4")
        if fmt != found:
            raise ValueError(
                f"`fmt` must be none or {found}, that of the model, which is in 4 bits "
                f"already. Got {fmt!r}."
            )
        return None
    return ql.QLoRAConfig(
        fmt=fmt, block_size=block_size, double_quant=double_quant, targets=LAYERS
    )


def is_packed(model: Model) -> bool:
    """Whether a model's files hold packed weights."""
    return bool(_stored_packing(model))


def _stored_packing(model: Model) -> dict | None:
    if not model.path.is_dir():
        return None
    return ql.io.read_config_json(model.path).get("quantization_config")


def adapters_for(config: TrainConfig, model: Model) -> "ql.QLoRAConfig":
    """Returns which kernels a run adapts, and how.

    Raises:
        ValueError: If the targets do not fit the model.
    """
    targets = ql.train.find_target_paths(config.target_modules, model.base, model.names)
    return ql.QLoRAConfig(
        rank=config.lora_r,
        alpha=config.lora_alpha,
        fmt=None,  # what is to be packed is packed as it is read
        targets=tuple(map(re.escape, targets)),
        dropout=config.lora_dropout,
        rank_stabilized=config.use_rslora,
    )


def open_adapter(model: Model, source: str | None) -> tuple[Any, dict, Any]:
    """Reads an adapter for a model.

    Args:
        model: The model.
        source: A folder that PEFT wrote; a file that `ql.io.save` wrote, or a folder
            with it; or None.

    Returns:
        The base tree, with the biases and modules that the adapter holds in the place
        of its own; the lora tree; and the settings of PEFT, if it has some.

    Raises:
        ValueError: If it cannot be read, or is not one for this model.
    """
    if source is None:
        return model.base, {}, None
    path = ql.io.fetch(source)
    if (path / "adapter_config.json").exists():
        return ql.io.load_peft(path, model.base, model.names)
    file = path / OWN_ADAPTER if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            "`adapter` must be a folder with adapter_config.json or "
            f"{OWN_ADAPTER}, or a file that qlora_jax.io.save wrote. Got {source!r}."
        )
    tree = ql.io.restore(file).tree
    lora = tree["lora"] if isinstance(tree, dict) and "lora" in tree else tree
    ql.combine(model.base, lora)  # refuses what does not fit
    return model.base, lora, None


def holds_base_tensors(source: str) -> bool:
    """Whether an adapter holds biases or whole modules too."""
    path = ql.io.fetch(source)
    if not (path / "adapter_config.json").exists():
        return False
    tensors = ql.io.open_safetensors(path / "adapter_model.safetensors")
    return any(".lora_A." not in key and ".lora_B." not in key for key in tensors)
