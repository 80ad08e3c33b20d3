"""Finds and reads models, adapters and the adapters of runs."""

import contextlib
import dataclasses
import os
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
from ..models.download import fetch, weights_of
from ..models.gguf.decoder_in import gguf_fmt, read_gguf
from ..models.gguf.folder import folder_of_gguf
from ..models.gguf.lora_in import read_gguf_lora
from ..models.text_half import folder_of_text, has_vision
from ..train.data.readers import describe_path
from .configs import ExportConfig, GenerateConfig, PairsConfig, ScoreConfig
from .processes import log
from .run_folder import CONFIG, STATE, quiet_orbax, read_settings
from .train_config import TrainConfig

_PACKING = ("fmt", "block_size", "double_quant")
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
    name: str = ""  # of its weights: as given, or that of a copy that was taken
    source: str = ""  # where they were found, in words

    @property
    def is_local(self) -> bool:
        """Whether its name is that of its files here."""
        return pathlib.Path(self.name).expanduser().exists()

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
    where = None if adapter is None else _fetch_adapter(adapter)
    base, (name, found) = abstract_params(config), weights_of(source, path)
    recode = recode or any(run.recode for run in runs_of(adapter))
    model = BaseModel(path, config, base, {}, where, None, recode, name, found)
    if not model.is_local:
        log(f"weights: {found}")
    return model


def _fetch_adapter(adapter: str) -> pathlib.Path:
    """Returns a local path of an adapter; errors name the option `adapter`."""
    try:
        return ql.io.fetch(adapter)
    except FileNotFoundError as error:
        message = str(error).replace("`model`", "`adapter`")
        raise FileNotFoundError(message) from error


def open_adapted(
    config: ScoreConfig | GenerateConfig,
) -> tuple[BaseModel, dict[str, Any], dict[str, Any]]:
    """Returns a model, several adapters by name, and how to read the weights.

    Of one adapter, which is the model's, there are no names.
    """
    if config.run is not None:
        model, _ = open_run(config.run, None, config.model)
        return model, {}, training_of(config, model)
    names = _names(config.adapter)
    adapter = names[0] if len(names) == 1 else None
    model = open_model(str(config.model), adapter, config.recode)
    how = training_of(config, model)
    if adapter is not None or not names:
        return model, {}, how
    bank = _read_bank(model, names)
    return model, {name: ql.select(bank, i) for i, name in enumerate(names)}, how


def _names(adapters: str | Sequence[str] | None) -> list[str]:
    """Returns the adapters in an option: one path, several, or text such as "a,b"."""
    if not isinstance(adapters, str):
        return [*(adapters or [])]
    return [adapters] if pathlib.Path(adapters).exists() else adapters.split(",")


def runs_of(
    adapters: str | Sequence[str] | None, run: str | None = None
) -> list[TrainConfig]:
    """Returns the settings of a run, or of the runs in whose folders adapters lie."""
    if run is not None:
        return [TrainConfig(**read_settings(pathlib.Path(run) / CONFIG))]
    runs = []
    for adapter in _names(adapters):
        path = pathlib.Path(adapter).parent / CONFIG
        # A file of another program may have this name.
        with contextlib.suppress(OSError, TypeError, ValueError):
            runs.append(TrainConfig(**read_settings(path)))
    return runs


def _read_bank(model: BaseModel, adapters: Sequence[str]) -> "ql.Bank":
    loras = []
    for adapter in adapters:
        one = dataclasses.replace(model, adapter=_fetch_adapter(adapter))
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
    model = open_model(source or run.model, recode=run.recode)
    base, lora = init_shapes(model.base, adapters_for(run, model))
    with quiet_orbax(), ql.train.Checkpoints(folder / STATE, read_only=True) as states:
        step = states.latest if step is None else step
        lora = states.restore_lora(lora, step)
    peft = ql.io.peft_config(base, lora, model.names, base_model=model.name)
    return dataclasses.replace(model, base=base, lora=lora, peft=peft), step


def init_shapes(base: Any, settings: "ql.QLoRAConfig") -> tuple[Any, Any]:
    """Returns the shapes of the base and the lora tree of `ql.init`."""
    init = lambda base: ql.init(jax.random.key(0), base, settings)
    return jax.eval_shape(init, base)


def training_of(
    config: PairsConfig | ExportConfig | ScoreConfig | GenerateConfig, model: BaseModel
) -> dict[str, Any]:
    """Returns how training packed a model as it read it; {} if it did not.

    By default that is what a run says: that of `config`, or of an adapter in its run's
    folder. A line on stderr names each run that was trained on other weights.
    """
    runs = runs_of(config.adapter, config.run)
    settings: Any = runs[0] if runs and not _differs(config, runs[0]) else config
    if settings.fmt is None and model.stored_fmt is None:
        for name in _PACKING[1:]:
            if (value := getattr(settings, name, None)) is not None:
                raise ValueError(
                    f"`{name}` must be given with the `fmt` that training packed the "
                    f"model in. Got {value}."
                )
    for run in runs:
        is_other = os.path.realpath(model.name) != os.path.realpath(run.model)
        if is_other or _differs(settings, run):
            fmt = settings.fmt or model.stored_fmt or "none"
            log(
                f"note: {run.out} was trained on {run.model} with fmt {run.fmt}. The "
                f"base here is another one: {model.name} with fmt {fmt}"
            )
    double = getattr(settings, "double_quant", None)
    packing = model.packing(settings.fmt or "none", settings.block_size, double)
    if packing is None:
        return {}
    is_of_run = isinstance(settings, TrainConfig)
    return {"packing": packing} | ({"dtype": settings.dtype} if is_of_run else {})


def _differs(settings: Any, run: TrainConfig) -> bool:
    """Whether settings that are given pack a model otherwise than a run did."""
    pairs = [(getattr(settings, x, None), getattr(run, x)) for x in _PACKING]
    return any(value not in (None, trained) for value, trained in pairs)


def read_as_trained(model: BaseModel, how: dict[str, Any], dtype: Any) -> BaseModel:
    """Returns a model with weights packed as in training, for products in `dtype`."""
    model = model.read(**{"dtype": dtype, **how})
    is_packed = lambda x: isinstance(x, ql.QTensor)
    cast = lambda x: x if is_packed(x) else x.astype(dtype)
    base = jax.tree.map(cast, model.base, is_leaf=is_packed)
    return dataclasses.replace(model, base=base)


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
