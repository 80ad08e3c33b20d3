"""Settings of each command: dataclasses, filled from YAML files and flags."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ..data.kinds import TrainOn
from ..models.sampling import Sampling
from .options import COUNT, PATH, SEED, Config, Limit, option
from .servers import FMTS_BY_FORMAT, SERVERS

# What computes a model: `Decoder`, or the PyTorch code of transformers.
EngineName = Literal["auto", "jax", "torch"]
Dtype = Literal["float32", "bfloat16", "float16"]
Fmt = Literal[
    "nf4", "fp4", "int4", "int8", "int4_f16", "q4_0", "mxfp4", "nvfp4", "none"
]
# The formats that merge-aware adapters are trained for: those of the files of `export`.
TargetFmt = Literal["nf4", "fp4", "int4_f16", "q4_0", "mxfp4", "nvfp4"]
if TYPE_CHECKING:
    ServerName = str
else:
    ServerName = Literal[tuple(SERVERS)]
AdapterFormat = Literal["peft", "peft-portable", "gguf-lora", "mlx"]
PackedFormat = Literal["bitsandbytes", "awq", "compressed-tensors", "mxfp4", "nvfp4"]
# For a `PackedFormat`, an adapter is merged into the weights in the model's files, and
# the sum is packed. For the following formats, it is merged into the weights that
# training used, which are decoded if they were packed. Q4_0, a type of "gguf", is an
# exception: it merges and packs as a `PackedFormat` does.
_FORMATS_OF_TRAINED_BASE = ("merged", "gguf")
# For a `PackedFormat`, these options describe the exported file. For a server and for
# `_FORMATS_OF_TRAINED_BASE`, they describe how training packed the base.
PACKING_OPTIONS = ("fmt", "block_size", "double_quant")
# Options of `ExportConfig` that only some formats support.
_FORMATS_OF_OPTIONS = {
    "dtype": ("merged",),
    "gguf_type": ("gguf",),
    "tokenizer": ("gguf",),  # only if it is False
    "fmt": ("bitsandbytes", "awq", "compressed-tensors", *_FORMATS_OF_TRAINED_BASE),
    "double_quant": ("bitsandbytes", *_FORMATS_OF_TRAINED_BASE),
    "block_size": (*get_args(PackedFormat), *_FORMATS_OF_TRAINED_BASE),
}


def _check_source(config: "ScoreConfig | GenerateConfig") -> None:
    if config.model is None and config.run is None:
        raise ValueError("`model` must be given if `run` is not. Got None.")
    if None not in (config.adapter, config.run):
        raise ValueError("`adapter` or `run` must be left out. Got both.")


@dataclass(frozen=True)
class ScoreConfig(Config):
    """Scores a model on data: the mean loss over the target tokens.

    Attributes:
        model: A Hugging Face folder in float or 4 bits, or a hub id.
            Required without `run`, whose model is the default.
        data: Required. A file of rows, in any form that train supports. In rows with
            `text` or `input_ids`, all tokens but the first are targets, except where
            `labels` are -100. Rows with `input_ids` need no tokenizer. In other rows,
            `train_on` selects the targets. A .txt file is cut into rows of
            `batch_tokens` tokens.
        adapter: An adapter in the format of PEFT or this library.
        run: Folder of a training run, finished or not. Its newest adapter is used.
        fmt: Number format to pack the linear layers in; none keeps the stored format.
            Defaults to the format of the run if the adapter is in a run's folder.
        block_size: With `fmt`: weights per scale; by default the usual number for
            `fmt`, such as 64 for nf4.
        double_quant: With `fmt`: whether to also quantize the scales; by default true
            if `fmt` supports it.
        dtype: Dtype of the computation; norms, softmax and the loss are float32.
        batch_tokens: Maximum number of tokens in a batch, including padding.
        engine: What computes the model, as in train. Defaults to that of the run if the
            adapter is in a run's folder, and otherwise to auto.
        train_on: Which tokens of rows with prompts or messages are targets, as in
            train. Like the options below, defaults to that of the run if the adapter is
            in a run's folder, and otherwise to the default of train.
        keys: Mapping from standard keys to the keys in the file; {} for standard keys.
        chat: Whether to convert prompts and completions to messages, as in train.
        template: File with a chat template that replaces the model's.

    Example:
        >>> from qlora_jax.llm import app
        >>> app.ScoreConfig(model="folder", data="rows.jsonl").dtype
        'float32'
    """

    usage = "(--model MODEL | --run RUN) --data DATA"
    model: str | None = option(None, section="model and data")
    data: str | None = None
    adapter: str | None = None
    run: str | None = None
    fmt: Fmt | None = None
    block_size: int | None = None
    double_quant: bool | None = None
    dtype: Dtype = option("float32", section="computation")
    batch_tokens: int = option(1024, limit=Limit("at least 2", lambda x: x >= 2))
    engine: EngineName | None = None
    train_on: TrainOn | None = option(None, section="rows")
    keys: dict[str, str] | None = None
    chat: bool | None = None
    template: str | None = None

    def __post_init__(self):
        super().__post_init__()
        _check_source(self)
        if self.data is None:
            raise ValueError("`data` must be given. Got None.")


@dataclass(frozen=True)
class ExportConfig(Config):
    """Writes a model or an adapter in a format that other programs load.

    Attributes:
        model: A Hugging Face folder in float or 4 bits, or a hub id.
            Required without `run`, whose model is the default.
        format: What to write. Either an adapter: for PEFT (peft, the default), for
            servers that load PEFT's folders (peft-portable, with one rank and without
            scaling), for llama.cpp (gguf-lora) or for mlx-lm (mlx). Or a model, with
            the adapter merged if there is one: in float (merged), as GGUF (gguf), or in
            4 bits: bitsandbytes, awq, compressed-tensors (int4), mxfp4 or nvfp4. For a
            merge-aware adapter, the default is the model in the format that it was
            trained for.
        out: The folder to write, new or empty; for gguf and gguf-lora, a new file.
            Required without `run`; with it, by default adapter-STEP (or model-STEP, for
            a merge-aware adapter) in the run's folder, if `format` is left out or peft.
        adapter: An adapter in the format of PEFT or this library.
        run: Folder of a training run, finished or not, whose adapter is exported.
        step: With `run`, the step of the saved state to export; by default the newest.
        fmt: The number format. For bitsandbytes: nf4 (the default) or fp4; for awq and
            compressed-tensors: int4_f16 (the default) or q4_0. For merged, gguf and a
            server: the format in which training packed a float model, by default the
            format of the adapter's run. Leave it out for a model already in 4 bits.
        block_size: Weights per scale; by default 128 for int4_f16, 64 for nf4 and fp4.
        double_quant: For bitsandbytes: whether to also quantize the scales; by default
            true.
        dtype: For merged: dtype of the tensors. By default, the dtype of the run if
            training packed the model; otherwise each tensor keeps its own.
        gguf_type: For gguf: the type of the file, by default F16. Q4_0 copies weights
            in int4_f16 or q4_0 with blocks of 32, and packs float weights.
        tokenizer: For gguf: whether to include the tokenizer.
        server: Target server, instead of `--format`. Selects formats that the server
            supports, and prints the command that starts it.
        push_to_hub: Repository on the Hugging Face hub to push the result to, such as
            user/name. If it does not exist, a private repository is created.

    Example:
        >>> from qlora_jax.llm import app
        >>> app.ExportConfig(model="folder", format="merged", out="new").adapter is None
        True
    """

    usage = "(--model MODEL --out OUT | --run RUN)"
    model: str | None = option(None, section="what to export")
    format: Literal[AdapterFormat, PackedFormat, "merged", "gguf"] | None = None
    out: str | None = option(None, limit=PATH)
    adapter: str | None = None
    run: str | None = None
    step: int | None = None
    fmt: Fmt | None = option(None, section="number formats")
    block_size: int | None = None
    double_quant: bool | None = None
    dtype: Dtype | None = None
    gguf_type: Literal["F16", "Q8_0", "Q4_0"] | None = None
    tokenizer: bool = True
    server: ServerName | None = option(None, name="for", section="other")
    push_to_hub: str | None = None

    def __post_init__(self):
        super().__post_init__()
        set_options = {name for name, value in vars(self).items() if value is not None}
        # `tokenizer` is set only if it is False, because True is the default. If the
        # format is not known yet, `complete_export` sets it, and thus checks again.
        if self.tokenizer or (self.server is None and self.format is None):
            set_options.remove("tokenizer")
        if {"format", "server"} <= set_options:
            raise ValueError("`format` or `for` must be left out. Got both.")
        # The default is a model if the adapter is merge-aware, which is not known here.
        target = self.server or self.format or "peft"
        self._check_source(set_options, target)
        self._check_formats(set_options, target)

    def _check_source(self, set_options: set[str], target: str) -> None:
        """Checks where the model and the adapter come from."""
        if self.run is None and (missing := {"model", "out"} - set_options):
            names = " and ".join(f"`{name}`" for name in sorted(missing))
            raise ValueError(f"{names} must be given if `run` is not. Got None.")
        if self.step is not None and self.run is None:
            raise ValueError(f"`run` must be given with `step`. Got {self.step}.")
        if {"adapter", "run"} <= set_options:
            raise ValueError("`adapter` or `run` must be left out. Got both.")
        has_adapter = bool({"adapter", "run"} & set_options)
        needs_adapter = self.server is not None or target in get_args(AdapterFormat)
        if needs_adapter and not has_adapter:
            raise ValueError(
                f"`adapter` or `run` must be given for {target}. Got none."
            )
        has_default_out = self.server is None and self.format in (None, "peft")
        if self.out is None and not has_default_out:
            raise ValueError(f"`out` must be given for {target}. Got None.")

    def _check_formats(self, set_options: set[str], target: str) -> None:
        """Checks that the set options exist for the target and fit each other."""
        server_options: tuple[str, ...] = ()
        if self.server is not None:
            server_options = PACKING_OPTIONS
            if SERVERS[self.server].loads_gguf:
                server_options += ("tokenizer",)
        for name, formats in _FORMATS_OF_OPTIONS.items():
            is_supported = target in formats or name in server_options
            if name in set_options and not is_supported:
                raise ValueError(
                    f"`{name}` must be left out unless the format is one of "
                    f"{', '.join(formats)}. Got {getattr(self, name)!r} for {target}."
                )
        options = [name for name in PACKING_OPTIONS if name in set_options]
        if self.gguf_type == "Q4_0" and options:
            raise ValueError(
                f"`{options[0]}` must be left out with `gguf_type` Q4_0, which "
                f"sets the number format. Got {getattr(self, options[0])!r}."
            )
        fmts = FMTS_BY_FORMAT.get(target, get_args(Fmt))
        if self.fmt is not None and self.fmt not in fmts:
            raise ValueError(
                f"`fmt` must be {' or '.join(fmts)} for {target}. Got {self.fmt!r}."
            )


@dataclass(frozen=True)
class GenerateConfig(Config):
    """Generates text from a prompt, or chats.

    Attributes:
        model: A Hugging Face folder in float or 4 bits, or a hub id.
            Required without `run`, whose model is the default.
        adapter: An adapter in the format of PEFT or this library.
        run: Folder of a training run, finished or not. Its newest adapter is used.
        prompt: The text to answer. By default it is read from stdin; on a terminal,
            each line is a prompt.
        prompts: A file of rows with a `prompt` (a text or messages) or `messages`, and
            optionally `system` and `tools`. Each row is answered separately.
        out: With `prompts`: a new file for the answers, with one line of JSON for each.
            By default they are written to stdout.
        batch_size: With `prompts`: the number of prompts that are answered at a time.
        chat: Whether prompts are turns of a conversation, rendered with the model's
            chat template, rather than texts to continue. By default true if the model
            has a template.
        system: The system message at the start of the conversation; by default that of
            the run, if all rows of its data have the same. "" for none.
        max_new_tokens: Maximum number of tokens of an answer.
        temperature: Divisor of the logits; with 0, the most probable token is selected.
        top_k: Sample from this many of the most probable tokens; by default from all.
        top_p: Sample from the most probable tokens whose probabilities add up to this.
        seed: Seed of the sampling.
        fmt: Number format to pack the linear layers in; none keeps the stored format.
            Defaults to the format of the run if the adapter is in a run's folder.
        block_size: With `fmt`: weights per scale; by default the usual number for
            `fmt`, such as 64 for nf4.
        double_quant: With `fmt`: whether to also quantize the scales; by default true
            if `fmt` supports it.
        dtype: Dtype of the computation; norms and softmax are float32.
        engine: What computes the model, as in train. Defaults to that of the run if the
            adapter is in a run's folder, and otherwise to auto.
        template: File with a chat template that replaces the model's. Defaults to that
            of the run if the adapter is in a run's folder.

    Example:
        >>> from qlora_jax.llm import app
        >>> app.GenerateConfig(model="folder", prompt="Hello").temperature
        0.0
    """

    usage = "(--model MODEL | --run RUN)"
    model: str | None = option(None, section="model and prompts")
    adapter: str | None = None
    run: str | None = None
    prompt: str | None = None
    prompts: str | None = None
    out: str | None = option(None, limit=PATH)
    batch_size: int = option(16, limit=COUNT)
    chat: bool | None = None
    system: str | None = None
    max_new_tokens: int = option(256, section="sampling", limit=COUNT)
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = option(0, limit=SEED)
    fmt: Fmt | None = option(None, section="number format of the base")
    block_size: int | None = None
    double_quant: bool | None = None
    dtype: Dtype = option("float32", section="computation")
    engine: EngineName | None = None
    template: str | None = option(None, section="chat template")

    def __post_init__(self):
        super().__post_init__()
        _check_source(self)
        if None not in (self.prompt, self.prompts):
            raise ValueError("`prompt` or `prompts` must be left out. Got both.")
        if self.out is not None and self.prompts is None:
            raise ValueError(f"`prompts` must be given with `out`. Got {self.out!r}.")
        Sampling(self.temperature, self.top_k, self.top_p)  # checks its settings
        if self.chat is False and self.system is not None:
            raise ValueError(
                f"`system` must be left out with `chat` false. Got {self.system!r}."
            )
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError(f"`prompt` must have text. Got {self.prompt!r}.")


@dataclass(frozen=True)
class CheckConfig(Config):
    """Checks the results of this machine's devices: matrix products and training.

    Example:
        >>> from qlora_jax.llm import app
        >>> app.CheckConfig()
        CheckConfig()
    """
