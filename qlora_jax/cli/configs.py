"""Settings of each command: dataclasses, filled from YAML files and flags."""

from dataclasses import dataclass
from typing import Literal, get_args

from ..models.sampling import Sampling

Dtype = Literal["float32", "bfloat16", "float16"]
Fmt = Literal[
    "nf4", "fp4", "int4", "int8", "int4_f16", "q4_0", "mxfp4", "nvfp4", "none"
]
ServerName = Literal["vllm", "sglang", "llama.cpp", "ollama", "mlx", "transformers"]
AdapterFormat = Literal["peft", "peft-portable", "gguf-lora", "mlx"]
BaseFormat = Literal["bitsandbytes", "awq", "compressed-tensors", "mxfp4", "nvfp4"]
_PACKING = ("fmt", "block_size", "double_quant")  # in training, for a server
# The number formats of each `BaseFormat`; the first is the default.
FMTS: dict[str, tuple[str, ...]] = {"bitsandbytes": ("nf4", "fp4")}
FMTS |= dict.fromkeys(("awq", "compressed-tensors"), ("int4_f16", "q4_0"))
FMTS |= {"mxfp4": ("mxfp4",), "nvfp4": ("nvfp4",)}
_FLOATS = ("merged", "gguf")  # which take the base as training packed it
# The options that only some formats have.
_OPTIONS = {
    "dtype": ("merged",),
    "gguf_type": ("gguf",),
    "fmt": (*get_args(BaseFormat)[:3], *_FLOATS),
    "double_quant": ("bitsandbytes", *_FLOATS),
    "block_size": (*get_args(BaseFormat), *_FLOATS),
}


def _check_source(config: "ScoreConfig | GenerateConfig") -> None:
    """Refuses settings without a model, or with an adapter and a run."""
    if config.model is None and config.run is None:
        raise ValueError("`model` must be given without `run`. Got None.")
    if None not in (config.adapter, config.run):
        raise ValueError("`adapter` or `run` must be left out. Got both.")


@dataclass(frozen=True)
class ScoreConfig:
    """Scores a model on data: the mean loss over the tokens that count.

    Attributes:
        model: A Hugging Face folder, in float or 4 bits, a hub id or a .gguf file; with
            `run`, by default that of the run.
        data: A file of rows, as train takes it. Rows of `text`, or of `input_ids` and
            optional `labels` (-100 for tokens that do not count), which need no
            tokenizer: without labels all tokens but the first count. Of other kinds the
            tokens of completions and of the assistant's messages count. A .txt file is
            cut into rows of `batch_tokens`.
        adapter: An adapter of PEFT, mlx-lm, llama.cpp (.gguf) or this library; or
            several, such as a,b, with a result for each.
        run: The folder of a run of train, finished or not, whose last adapter to take.
        fmt: Number format to pack the linear layers in; none for those of the file. By
            default what the adapter's run packed them in, if its folder says so.
        block_size: For `fmt`: weights that share a scale; by default 64, or its own.
        double_quant: For `fmt`: whether scales are quantized too; by default if it can.
        dtype: Dtype of the computation; norms, softmax and the loss are float32.
        batch_tokens: The most tokens that are computed at once, with padding.
        recode: Whether to read weights in 4 bits whose zero points or order of inputs
            no format here has: in float.

    Example:
        >>> from qlora_jax import cli
        >>> cli.ScoreConfig(model="folder", data="rows.jsonl").dtype
        'float32'
    """

    model: str | None = None
    data: str | None = None
    adapter: str | list[str] | None = None
    run: str | None = None
    fmt: Fmt | None = None
    block_size: int | None = None
    double_quant: bool | None = None
    dtype: Dtype = "float32"
    batch_tokens: int = 1024
    recode: bool = False

    def __post_init__(self):
        _check_source(self)
        if self.data is None:
            raise ValueError("`data` must be given. Got None.")
        if self.batch_tokens < 1:
            raise ValueError(
                f"`batch_tokens` must be positive. Got {self.batch_tokens}."
            )


@dataclass(frozen=True)
class ExportConfig:
    """Writes a model or an adapter in a format that other programs load.

    Attributes:
        model: A Hugging Face folder, in float or 4 bits, a hub id or a .gguf file; with
            `run`, by default that of the run.
        format: What to write: the adapter for PEFT (by default), or for servers of
            PEFT's folders too (peft-portable: one rank, no scaling), for llama.cpp
            (gguf-lora) or for mlx-lm (mlx); or the model, with the adapter added if
            there is one: in float, as GGUF, or in 4 bits, for bitsandbytes, for AWQ or
            as compressed-tensors has it (int4, mxfp4 or nvfp4).
        out: The folder to write, new or empty; for gguf and gguf-lora, the file. With
            `run`, the adapter for PEFT goes to adapter-STEP in its folder by default.
        adapter: An adapter of PEFT, mlx-lm, llama.cpp (.gguf) or this library.
        run: The folder of a run of train, finished or not, whose adapter to take.
        step: With `run`, the step of the state to take; by default the last saved one.
        fmt: The number format: for bitsandbytes nf4 (by default) or fp4, for awq and
            compressed-tensors int4_f16 (by default) or q4_0; for merged, gguf and a
            server, what a float model was packed in for training, by default what the
            adapter's run says. A model which is in 4 bits already is written as it is.
        block_size: For a base in 4 bits: weights that share a scale; by default 128 for
            int4_f16, 64 for bitsandbytes.
        double_quant: For bitsandbytes: whether the scales are quantized too; by default
            they are.
        dtype: For merged: dtype of the tensors; by default each tensor's.
        gguf_type: For gguf: how weights are stored, by default F16. Q4_0 keeps those of
            int4_f16 and q4_0 in blocks of 32 as they are, and packs floats.
        tokenizer: For gguf: whether the file holds the tokenizer.
        data: For an adapter that is merged into 4 bits: rows, as score takes them, to
            compute the loss on before and after.
        server: In the place of a format (also spelled `--for`): what this server reads
            right, and how to start it; see pairs.
        push_to_hub: The repository on the Hugging Face hub to push it to as well, such
            as user/name; a private one is made if there is none.

    Example:
        >>> from qlora_jax import cli
        >>> cli.ExportConfig(model="folder", format="merged", out="new").adapter is None
        True
    """

    model: str | None = None
    format: Literal[AdapterFormat, BaseFormat, "merged", "gguf"] | None = None
    out: str | None = None
    adapter: str | None = None
    run: str | None = None
    step: int | None = None
    fmt: Fmt | None = None
    block_size: int | None = None
    double_quant: bool | None = None
    dtype: Dtype | None = None
    gguf_type: Literal["F16", "Q8_0", "Q4_0"] | None = None
    tokenizer: bool = True
    data: str | None = None
    server: ServerName | None = None
    push_to_hub: str | None = None

    def __post_init__(self):
        given = {name for name in vars(self) if getattr(self, name) is not None}
        if {"format", "server"} <= given:
            raise ValueError("`format` or `for` must be left out. Got both.")
        what = self.server or self.format or "peft"
        if self.server is None:
            object.__setattr__(self, "format", what)
        if self.run is None and (missing := {"model", "out"} - given):
            names = " and ".join(f"`{name}`" for name in sorted(missing))
            raise ValueError(f"{names} must be given without `run`. Got None.")
        if self.step is not None and self.run is None:
            raise ValueError(f"`run` must be given with `step`. Got {self.step}.")
        if {"adapter", "run"} <= given:
            raise ValueError("`adapter` or `run` must be left out. Got both.")
        is_paired = self.server is not None or self.format in get_args(AdapterFormat)
        if is_paired and not {"adapter", "run"} & given:
            raise ValueError(f"`adapter` or `run` must be given for {what}. Got none.")
        if self.data is not None and not (self._packs and {"adapter", "run"} & given):
            raise ValueError(
                "`data` must be left out unless an adapter is merged into 4 bits. Got "
                f"{self.data!r} for {what}."
            )
        if self.out is None and self.format != "peft":
            raise ValueError(f"`out` must be given for {what}. Got None.")
        for name, only in _OPTIONS.items():
            is_right = what in only or self.server is not None and name in _PACKING
            if name in given and not is_right:
                raise ValueError(
                    f"`{name}` must be left out for other formats than "
                    f"{', '.join(only)}. Got {getattr(self, name)!r} for {what}."
                )
        if self.gguf_type == "Q4_0" and self.fmt is not None:
            raise ValueError(
                "`fmt` must be left out with Q4_0, in which the weights of `model` are "
                f"packed. Got {self.fmt!r}."
            )
        allowed = FMTS.get(what, get_args(Fmt))
        if self.fmt is not None and self.fmt not in allowed:
            raise ValueError(
                f"`fmt` must be {' or '.join(allowed)} for {what}. Got {self.fmt!r}."
            )

    @property
    def _packs(self) -> bool:
        """Whether it writes weights in 4 bits."""
        is_q4 = self.format == "gguf" and self.gguf_type == "Q4_0"
        return is_q4 or self.format in get_args(BaseFormat)


@dataclass(frozen=True)
class PairsConfig:
    """Says for each server what to write of a model and an adapter, and how exact.

    Attributes:
        model: A Hugging Face folder, in float or 4 bits, a hub id or a .gguf file; with
            `run`, by default that of the run.
        adapter: An adapter of PEFT, mlx-lm, llama.cpp (.gguf) or this library. One in
            the folder of its run was trained as that says.
        run: The folder of a run of train, finished or not, whose adapter to take.
        fmt: The number format that a float model was packed in for training.
        block_size: For `fmt`: weights that share a scale.

    Example:
        >>> from qlora_jax import cli
        >>> cli.PairsConfig(model="folder", adapter="adapter").fmt is None
        True
    """

    model: str | None = None
    adapter: str | None = None
    run: str | None = None
    fmt: Fmt | None = None
    block_size: int | None = None

    def __post_init__(self):
        if self.model is None and self.run is None:
            raise ValueError("`model` must be given without `run`. Got None.")


@dataclass(frozen=True)
class InspectConfig:
    """Lists the tensors of a model or an adapter without reading them.

    Attributes:
        path: A folder of a model, an adapter or a run, a .safetensors or a .gguf file.

    Example:
        >>> from qlora_jax import cli
        >>> cli.InspectConfig("folder").path
        'folder'
    """

    path: str


@dataclass(frozen=True)
class GenerateConfig:
    """Generates text from a prompt, or chats.

    Attributes:
        model: A Hugging Face folder, in float or 4 bits, a hub id or a .gguf file; with
            `run`, by default that of the run.
        adapter: An adapter of PEFT, mlx-lm, llama.cpp (.gguf) or this library; or
            several, such as a,b, with a result for each.
        run: The folder of a run of train, finished or not, whose last adapter to take.
        prompt: The text to answer. Without it, the text is read from stdin; on a
            terminal, a line at a time.
        prompts: A file of rows with a `prompt`, a text or messages, or `messages`, and
            perhaps `system` and `tools`: each is answered by itself.
        out: With `prompts`: the file for the answers, new, a line of JSON for each;
            stdout by default.
        batch_size: Prompts that are answered at once.
        chat: Whether texts are turns of a conversation, in the model's chat template;
            otherwise it continues the text. By default true if it has a template.
        system: The system's message at the start of the conversation.
        max_new_tokens: The most tokens of an answer.
        temperature: Divisor of the logits; at 0 the most probable token is taken.
        top_k: How many of the most probable tokens may be drawn; all by default.
        top_p: The share of probability kept: the least probable tokens are dropped.
        seed: Seed of the sampling.
        fmt: Number format to pack the linear layers in; none for those of the file. By
            default what the adapter's run packed them in, if its folder says so.
        block_size: For `fmt`: weights that share a scale; by default 64, or its own.
        double_quant: For `fmt`: whether scales are quantized too; by default if it can.
        dtype: Dtype of the computation; norms and softmax are float32.
        recode: Whether to read weights in 4 bits whose zero points or order of inputs
            no format here has (in float), and to pack those in 4 bits again in `fmt`.

    Example:
        >>> from qlora_jax import cli
        >>> cli.GenerateConfig(model="folder", prompt="Hello").temperature
        0.0
    """

    model: str | None = None
    adapter: str | list[str] | None = None
    run: str | None = None
    prompt: str | None = None
    prompts: str | None = None
    out: str | None = None
    batch_size: int = 16
    chat: bool | None = None
    system: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    fmt: Fmt | None = None
    block_size: int | None = None
    double_quant: bool | None = None
    dtype: Dtype = "float32"
    recode: bool = False

    def __post_init__(self):
        _check_source(self)
        for name in ("max_new_tokens", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`{name}` must be positive. Got {value}.")
        if None not in (self.prompt, self.prompts):
            raise ValueError("`prompt` or `prompts` must be left out. Got both.")
        if self.out is not None and self.prompts is None:
            raise ValueError(f"`prompts` must be given with `out`. Got {self.out!r}.")
        Sampling(self.temperature, self.top_k, self.top_p)  # refuses wrong settings
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"`seed` must be from 0 to 2**32 - 1. Got {self.seed}.")
        if self.chat is False and self.system is not None:
            raise ValueError("`system` must be left out without `chat`. Got both.")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError(f"`prompt` must have text. Got {self.prompt!r}.")


@dataclass(frozen=True)
class CheckConfig:
    """Checks this machine's devices: products, a step of training, times, memory.

    Attributes:
        out: The file to write the report to, as JSON, for an issue or for the table of
            docs/compatibility.
        rounds: How often a time is measured; the median is reported.

    Example:
        >>> from qlora_jax import cli
        >>> cli.CheckConfig().rounds
        7
    """

    out: str | None = None
    rounds: int = 7

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"`rounds` must be positive. Got {self.rounds}.")
