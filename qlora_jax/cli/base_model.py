"""Finds and reads models, adapters and the adapters of runs."""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

import qlora_jax as ql

from ..models.checkpoint import abstract_params, load, read_config
from ..models.config import DecoderConfig
from ..models.decoder_names import decoder_names
from ..models.download import fetch
from ..models.gguf.decoder_in import gguf_fmt, read_gguf
from ..models.gguf.folder import folder_of_gguf
from ..models.gguf.lora_in import read_gguf_lora
from ..models.text_half import folder_of_text, has_vision
from ..train.data.readers import describe_path
from .configs import ExportConfig, PairsConfig
from .run_folder import CONFIG, STATE, quiet_orbax, read_settings
from .train_config import TrainConfig

OWN_ADAPTER = "adapter.safetensors"
MLX = "adapters.safetensors"
# The head stays in float, as transformers has it, and so do routers.
LAYERS = r"layers/(?!.*/router/).*/kernel"


@dataclass(frozen=True)
class BaseModel:
    """A model and perhaps an adapter, as files or as trees."""

    path: pathlib.Path  # a folder or a .gguf file
    config: DecoderConfig
    base: Any  # parameters; their shapes before `read`
    lora: Any = dataclasses.field(default_factory=dict)
    adapter: pathlib.Path | None = None  # one that is not read yet
    peft: Any = None  # PEFT's settings of the adapter, if known
    recode: bool = False  # whether weights in 4 bits may be packed again

    @property
    def names(self) -> "ql.io.Names":
        """The names of its parameters in a Hugging Face model."""
        return decoder_names(self.config)

    @property
    def written_names(self) -> "ql.io.Names":
        """The names in a model that is written: a text half becomes a model."""
        return decoder_names(dataclasses.replace(self.config, module="model"))

    @property
    def quantization(self) -> dict[str, Any]:
        """What its files, if it has any, say of its packed weights."""
        if self.path.is_file():
            return {"quant_method": "gguf", "fmt": gguf_fmt(self.path)}
        return ql.io.read_quantization(self.path)

    @property
    def stored_fmt(self) -> str | None:
        """The number format of the weights in its files; None for floats."""
        return self.quantization.get("fmt")

    @property
    def stored_packing(self) -> Any:
        """How the first packed weight of its files is packed; None for floats."""
        is_folder = self.path.is_dir()
        found = ql.io.open_safetensors if is_folder else lambda path: read_gguf(path)[1]
        tensors = ql.io.packed_tensors(found(self.path)).values()
        packings = (getattr(tensor, "packing", None) for tensor in tensors)
        return next(filter(None, packings), None)

    @property
    def replaces_weights(self) -> bool:
        """Whether its adapter holds biases or modules of the base too."""
        if self.adapter is None or not _is_peft(self.adapter):
            return False
        tensors = ql.io.open_safetensors(self.adapter / "adapter_model.safetensors")
        return any(".lora_" not in key for key in tensors)

    def description(self) -> contextlib.AbstractContextManager[pathlib.Path]:
        """Gives a folder with the config and tokenizer that belong to its weights."""
        if self.path.is_file():
            return folder_of_gguf(self.path)
        if has_vision(self.config):
            return folder_of_text(self.path)
        return contextlib.nullcontext(self.path)

    def packing(
        self, fmt: str, block_size: int | None, double_quant: bool | None
    ) -> "ql.QLoRAConfig | None":
        """Returns how to pack its layers as they are read; None to keep their form."""
        said = self.quantization
        stored, is_gguf = said.get("fmt"), said.get("quant_method") == "gguf"
        if fmt == "none" or (fmt == stored and not self.recode):
            self._check_stored(block_size=block_size, double_quant=double_quant)
            return None
        if fmt == stored and block_size is None:
            block_size = said.get("group_size")
        if stored is not None and not self.recode and not is_gguf:
            raise ValueError(
                f"`fmt` must be none or {stored}, that of the model, which is in 4 "
                f"bits already: `recode` packs it again. Got {fmt!r}."
            )
        return ql.QLoRAConfig(
            fmt=fmt, block_size=block_size, double_quant=double_quant, targets=LAYERS
        )

    def _check_stored(self, **settings: Any) -> None:
        """Refuses settings that are not those of its packed weights."""
        given = {k: value for k, value in settings.items() if value is not None}
        packing = self.stored_packing if given else None
        for name, value in given.items():
            stored = getattr(packing, name, value)
            if value != stored:
                raise ValueError(
                    f"`{name}` must be {stored}, that of the model, which is in 4 bits "
                    f"already. Got {value}."
                )

    def read(
        self,
        *,
        dtype: Any = None,
        packing: "ql.QLoRAConfig | None" = None,
        place: Callable[[Any], Any] | None = None,
        progress: bool = True,
    ) -> "BaseModel":
        """Returns it with parameters and adapter; arguments are those of `load`."""
        # Such an adapter needs the weights; any other is checked before they are read.
        is_last = self.replaces_weights
        model = self if is_last else self.with_adapter()
        # Of these, 4-bit weights whose bytes cannot be moved have another exact form.
        method = self.quantization.get("quant_method")
        _, base = load(
            self.path,
            dtype,
            packing,
            recode=self.recode or method in ("gguf", "bitsandbytes"),
            place=place,
            progress=progress,
        )
        model = dataclasses.replace(model, base=base)
        return model.with_adapter() if is_last else model

    def with_adapter(self) -> "BaseModel":
        """Returns it with its adapter read, which may replace parameters."""
        if self.adapter is None:
            return self
        peft, others = None, _of_servers(self.adapter, self.config)
        if others is not None:
            base, lora, _ = ql.io.load_peft(others, self.base, self.written_names)
        elif _is_peft(self.adapter):
            base, lora, peft = ql.io.load_peft(self.adapter, self.base, self.names)
        else:
            base, lora = self.base, _read_own(self.adapter)
            ql.combine(base, lora)  # refuses what does not fit
        return dataclasses.replace(self, base=base, lora=lora, peft=peft, adapter=None)


def _is_peft(adapter: pathlib.Path) -> bool:
    is_mlx = (adapter / MLX).exists()  # whose settings have the same name
    return (adapter / "adapter_config.json").exists() and not is_mlx


def _of_servers(
    adapter: pathlib.Path, config: DecoderConfig
) -> "ql.io.PlainLoRA | None":
    """Returns an adapter of llama.cpp or mlx-lm; None if it is another."""
    if adapter.suffix == ".gguf":
        return read_gguf_lora(adapter, config)
    return ql.io.read_mlx(adapter) if (adapter / MLX).exists() else None


def _read_own(adapter: pathlib.Path) -> Any:
    file = adapter / OWN_ADAPTER if adapter.is_dir() else adapter
    if not file.is_file():
        raise ValueError(
            "`adapter` must be a folder with adapter_config.json or "
            f"{OWN_ADAPTER}, or a file of llama.cpp (.gguf) or qlora_jax.io.save. Got "
            f"{str(adapter)!r}."
        )
    tree = ql.io.restore(file).tree
    return tree["lora"] if isinstance(tree, dict) and "lora" in tree else tree


def open_model(
    source: str, adapter: str | None = None, recode: bool = False
) -> BaseModel:
    """Returns a model and an adapter in any form; reads the config only."""
    path = fetch(source)
    config = read_config(path)
    where = None if adapter is None else fetch_adapter(adapter)
    base = abstract_params(config)
    return BaseModel(path, config, base, adapter=where, recode=recode)


def fetch_adapter(adapter: str) -> pathlib.Path:
    """Returns a local path of an adapter; errors name the option `adapter`."""
    try:
        return ql.io.fetch(adapter)
    except FileNotFoundError as error:
        message = str(error).replace("`model`", "`adapter`")
        raise FileNotFoundError(message) from error


def open_adapted(
    source: str, adapter: str | list[str] | None, recode: bool = False
) -> tuple[BaseModel, "dict[str, Any]"]:
    """Returns a model, and its adapters by name if there are several, in one bank."""
    names = [adapter] if isinstance(adapter, str) else adapter or []
    if isinstance(adapter, str) and not pathlib.Path(adapter).exists():
        names = adapter.split(",")
    if len(names) < 2:
        return open_model(source, *names or [None], recode=recode), {}
    model = open_model(source, recode=recode)
    bank = _read_bank(model, names)
    return model, {name: ql.select(bank, i) for i, name in enumerate(names)}


def _read_bank(model: BaseModel, adapters: Sequence[str]) -> "ql.Bank":
    loras = []
    for adapter in adapters:
        one = dataclasses.replace(model, adapter=fetch_adapter(adapter))
        if one.replaces_weights:
            raise ValueError(
                "`adapter` must be adapters alone where there are several. Got "
                f"{adapter!r}, which has weights of the base too."
            )
        loras.append(one.with_adapter().lora)
    return ql.bank(loras, dropout=0.0)


def open_run(
    out: str, step: int | None = None, source: str | None = None
) -> tuple[BaseModel, int | None]:
    """Returns a run's model with the adapter of a state, the last by default; its step.

    The run is not changed, and may be unfinished. `source` replaces the run's model.
    """
    folder = pathlib.Path(out)
    if not (folder / CONFIG).is_file() or not (folder / STATE).is_dir():
        raise ValueError(
            f"`run` must be the folder of a run of train, with {CONFIG} and a folder "
            f"{STATE}. Got {describe_path(folder)}."
        )
    run = TrainConfig(**read_settings(folder / CONFIG))
    source = source or run.model
    model = open_model(source, recode=run.recode)
    base, lora = init_shapes(model.base, adapters_for(run, model))
    with quiet_orbax(), ql.train.Checkpoints(folder / STATE, read_only=True) as states:
        step = states.latest if step is None else step
        lora = states.restore_lora(lora, step)
    peft = ql.io.peft_config(base, lora, model.names, base_model=source)
    return dataclasses.replace(model, base=base, lora=lora, peft=peft), step


def init_shapes(base: Any, settings: "ql.QLoRAConfig") -> tuple[Any, Any]:
    """Returns the shapes of the base and the lora tree of `ql.init`."""
    init = lambda base: ql.init(jax.random.key(0), base, settings)
    return jax.eval_shape(init, base)


def training_of(config: PairsConfig | ExportConfig, model: BaseModel) -> dict[str, Any]:
    """Returns how training packed a model as it read it; {} if it did not.

    `config` has the options `fmt`, `block_size` and `double_quant`, a run, or an
    adapter that lies in its run's folder.
    """
    path = (
        pathlib.Path(config.run or pathlib.Path(config.adapter or "").parent) / CONFIG
    )
    used, dtype = config, None
    if config.fmt is None and path.is_file():
        used = TrainConfig(**read_settings(path))
        dtype = used.dtype
    elif config.fmt is None and config.block_size and model.stored_fmt is None:
        raise ValueError(
            "`block_size` must be given with the `fmt` that training packed the model "
            f"in. Got {config.block_size}."
        )
    double = getattr(used, "double_quant", None)
    packing = model.packing(used.fmt or "none", used.block_size, double)
    return {} if packing is None else {"packing": packing, "dtype": dtype}


def adapters_for(config: TrainConfig, model: BaseModel) -> "ql.QLoRAConfig":
    """Returns the adapters that a run trains."""
    targets = ql.train.find_target_paths(config.target_modules, model.base, model.names)
    return ql.QLoRAConfig(
        rank=config.lora_r,
        alpha=config.lora_alpha,
        fmt=None,  # what is to be packed is packed as it is read
        targets=tuple(map(re.escape, targets)),
        trainable=config.trainable or (),
        dropout=config.lora_dropout,
        rank_stabilized=config.use_rslora,
        use_dora=config.use_dora,
    )
