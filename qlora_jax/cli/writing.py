"""`qlora-jax export`: models and adapters for other programs."""

import dataclasses
import pathlib
from dataclasses import dataclass
from typing import Any, get_args

import qlora_jax as ql

from ..models.text_half import has_vision
from .base_model import BaseModel, open_model, open_run, runs_of, training_of
from .configs import FMTS, AdapterFormat, ExportConfig
from .processes import log
from .pushing import check_base, push
from .repacking import Repacked, repack
from .scoring import scorer
from .servers import AS_IS, MERGED, Pair, open_pair, pair_for, write_start


@dataclass(frozen=True)
class Written:
    """The result of `export`.

    Attributes:
        out: The folder or file.
        format: Its format.
        bytes: Its size in bytes.
        cost: What packing changed, if an adapter was merged into 4 bits.
        pair: For a server: what was written, and whether it is exact.

    Example:
        >>> from qlora_jax import cli
        >>> print(cli.Written("new", "merged", 1200))
        new: merged, 1,200 bytes
    """

    out: str
    format: str
    bytes: int
    cost: Repacked | None = None
    pair: Pair | None = None

    def __str__(self):
        written = f"{self.out}: {self.format}, {self.bytes:,} bytes"
        if self.pair is not None:
            return f"{written}; {self.pair}"
        return f"{written}\n{self.cost}" if self.cost else written


def export(config: ExportConfig) -> Written:
    """Writes a model or an adapter in a format that other programs load.

    Merged weights are read, computed and written one at a time. On a 4-bit base the
    adapter is added to the decoded weights, which are those that it was trained on.
    In 4 bits an adapter is merged into the weights of the files, and those are packed:
    memory holds both, and the merged ones.

    Args:
        config: The model, the adapter and the format.

    Returns:
        The path, the format and the size.

    Raises:
        ValueError: If the model or the adapter cannot be read or do not fit, if the
            format does not hold them, or if `out` is not empty.
        OSError: If it cannot be pushed.

    Example:
        >>> import os, tempfile
        >>> from qlora_jax import cli
        >>> from qlora_jax.models.tiny import save_tiny
        >>> model, out = save_tiny(tempfile.mkdtemp()), tempfile.mkdtemp()
        >>> config = cli.ExportConfig(model, "bitsandbytes", out)
        >>> cli.export(config).format
        'bitsandbytes'
        >>> os.path.isfile(out + "/model.safetensors")
        True
    """
    if config.push_to_hub is None:
        return _export(config)
    if config.format in get_args(AdapterFormat):
        for run in runs_of(config.adapter, config.run):
            check_base(run.model, config.model)
    push(config.push_to_hub)  # refuses now what it would later
    written = _export(config)
    log(f"pushed to {push(config.push_to_hub, pathlib.Path(written.out))}")
    return written


def _export(config: ExportConfig) -> Written:
    if config.server is not None:
        return _export_for(config)
    if str(config.format).startswith("gguf") and pathlib.Path(str(config.out)).exists():
        raise ValueError(f"`out` must be new. Got {config.out!r}, which exists.")
    source, out = config.model, config.out
    if config.run is None:
        model = open_model(str(source), config.adapter)
    else:
        model, step = open_run(config.run, config.step, source)
        out = out or f"{config.run}/adapter-{step}"
    path, form = pathlib.Path(str(out)), str(config.format)
    how = {}
    if form in ("merged", "gguf") and config.gguf_type != "Q4_0":
        how = training_of(config, model)
    elif form in FMTS or form == "gguf":
        open_options = dict(fmt=None, block_size=None, double_quant=None)
        trained = training_of(dataclasses.replace(config, **open_options), model)
        if trained:  # but packing keeps more of what is merged into floats
            log(
                f"note: the adapter was trained on {trained['packing'].fmt}. It is "
                f"merged into the weights of {model.name}, which are packed then"
            )
    cost = _WRITERS[form](config, model, path, **how)
    return Written(str(out), form, _size(path), cost)


def _size(path: pathlib.Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _export_for(config: ExportConfig) -> Written:
    """Writes base and adapter for a server, and how to start it on them."""
    name, out = str(config.server), pathlib.Path(str(config.out))
    if out.exists():
        raise ValueError(f"`out` must be new. Got {config.out!r}, which exists.")
    model, how = open_pair(config)
    pair = pair_for(name, model, how)
    source = model.name
    forms = {"base": pair.base, "adapter": pair.adapter}
    with ql.io.new_path(out) as new:
        new.mkdir()
        files = {}
        for part, form in forms.items():
            if form in (AS_IS, MERGED):
                continue
            stem = "model" if pair.adapter == MERGED else part
            files[part] = new / (stem + ".gguf" * form.startswith("gguf"))
            of, given = model, config.adapter or config.run
            if part == "base" and pair.adapter != MERGED:
                of, given = dataclasses.replace(model, lora={}, adapter=None), None
            kind = "Q4_0" if pair.exact and form == "gguf" else None
            one: Any = dict(format=form, adapter=given, gguf_type=kind)
            one |= dict(out=str(files[part]), tokenizer=config.tokenizer)
            one = ExportConfig(source, **one)
            _WRITERS[form](one, of, files[part], **(how if part == "base" else {}))
        write_start(new, pair, model, source, files)
    return Written(str(out), f"for {name}", _size(out), None, pair)


def _write_peft(config: ExportConfig, model: BaseModel, out: pathlib.Path) -> None:
    model = model.read() if model.replaces_weights else model.with_adapter()
    base, lora, names, peft = model.base, model.lora, model.names, model.peft
    if peft is None:
        peft = ql.io.peft_config(base, lora, names, base_model=model.name)
    ql.io.save_peft(out, base, lora, names, peft)


def _write_portable(config: ExportConfig, model: BaseModel, out: pathlib.Path) -> None:
    model = _adapters_alone(config, model)
    others = model.peft.others if model.peft else {}
    source = others.get("base_model_name_or_path") or model.name
    base, lora = model.base, ql.io.portable(model.base, model.lora)
    peft = ql.io.peft_config(base, lora, model.names, base_model=source)
    ql.io.save_peft(out, base, lora, model.names, peft)


def _adapters_alone(config: ExportConfig, model: BaseModel) -> BaseModel:
    """Returns a model with its adapter read; refuses what servers do not load."""
    if model.replaces_weights:
        raise ValueError(
            f"`adapter` must hold adapters alone for {config.format}: servers load no "
            f"biases or modules with them. Got others in {config.adapter!r}: export "
            "the model in the format merged."
        )
    return model.with_adapter()


def _plain(config: ExportConfig, model: BaseModel) -> "ql.io.PlainLoRA":
    model = _adapters_alone(config, model)
    return ql.io.PlainLoRA.of(model.base, model.lora, model.written_names)


def _write_merged(
    config: ExportConfig, model: BaseModel, out: pathlib.Path, **how: Any
) -> None:
    is_changed = how.get("packing") is not None or has_vision(model.config)
    is_copied = not (is_changed or model.path.is_file() or model.replaces_weights)
    model = model.with_adapter() if is_copied else model.read(**how)
    weights, names = model.path if is_copied else model.base, model.written_names
    with model.description() as folder:
        ql.io.save_merged(out, weights, model.lora, names, folder, dtype=config.dtype)


def _write_base(
    config: ExportConfig, model: BaseModel, out: pathlib.Path, **how: Any
) -> Repacked | None:
    stored, usual = model.stored_fmt, FMTS[str(config.format)][0]
    if config.format == "bitsandbytes" and not model.path.is_file():
        usual = stored or usual
    if (stored, usual) == ("q4_0", "int4_f16"):
        usual = "q4_0"  # which is exact
    settings = config.fmt or usual, config.block_size, config.double_quant
    base, cost = _packed(config, model, how, *settings)
    with model.description() as folder:
        names = model.written_names
        if config.format == "bitsandbytes":
            ql.io.save_bitsandbytes(out, base, names, folder)
        else:
            layout = "awq" if config.format == "awq" else "compressed-tensors"
            ql.io.save_packed(out, base, names, folder, layout)
    return cost


def _packed(
    config: ExportConfig, model: BaseModel, how: Any, *settings: Any
) -> tuple[Any, Repacked | None]:
    """Returns the base in 4 bits; an adapter is merged first, at a cost."""
    if model.adapter is None and not model.lora:
        how = how or {"packing": model.packing(*settings)}
        return model.read(**how).base, None
    score = scorer(model, config.data) if config.data else None
    model = dataclasses.replace(model, recode=True)  # floats are exact
    return repack(model.read(), model.packing(*settings), score)


def _write_gguf(
    config: ExportConfig, model: BaseModel, out: pathlib.Path, **how: Any
) -> Repacked | None:
    from ..models.gguf.decoder_out import check_gguf_source, save_gguf

    check_gguf_source(model.path, tokenizer=config.tokenizer)
    kinds = {"fmt": config.gguf_type or "F16", "tokenizer": config.tokenizer}
    if config.gguf_type == "Q4_0" and (model.adapter or model.lora):
        base, cost = _packed(config, model, how, "q4_0", None, None)
        save_gguf(out, model.path, base, {}, **kinds)
        return cost
    # Floats are exact, but in Q4_0, which packs them.
    model = dataclasses.replace(model, recode=config.gguf_type != "Q4_0").read(**how)
    save_gguf(out, model.path, model.base, model.lora, **kinds)
    return None


def _write_gguf_lora(config: ExportConfig, model: BaseModel, out: pathlib.Path) -> None:
    from ..models.gguf.lora_out import save_gguf_lora

    save_gguf_lora(out, model.path, _plain(config, model))


def _write_mlx(config: ExportConfig, model: BaseModel, out: pathlib.Path) -> None:
    ql.io.save_mlx(out, _plain(config, model), model.config.num_layers)


_WRITERS: dict[str, Any] = {
    "peft": _write_peft,
    "peft-portable": _write_portable,
    **dict.fromkeys(FMTS, _write_base),
    "merged": _write_merged,
    "gguf": _write_gguf,
    "gguf-lora": _write_gguf_lora,
    "mlx": _write_mlx,
}
