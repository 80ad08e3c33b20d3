"""The groups of options of `qlora-jax train`."""

import datetime
from dataclasses import dataclass
from typing import Literal

from ..models.sharding import MESH_AXES
from ..train.objectives import find_objective
from .configs import Fmt
from .options import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    REQUIRED,
    Config,
    Limit,
    check_swept,
    option,
)

# The module of each logger; an extra of the package installs it.
LOGGERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


DATE = Limit("a day such as 2026-11-26", _is_date)


@dataclass(frozen=True)
class ModelConfig(Config):
    """The model of a run, how its layers are packed, and how it is computed.

    Example:
        >>> from qlora_jax.llm import app
        >>> app.ModelConfig("folder", fmt="nf4").dtype
        'bfloat16'
    """

    path: str = option(
        REQUIRED,
        "A Hugging Face folder in float or 4 bits, a hub id or a .gguf file.",
        name="model",
        section="model and data",
        is_identity=False,
    )
    fmt: Fmt | None = option(
        None,
        "Number format of the frozen linear layers; none for float (plain LoRA). By "
        "default a 4-bit model keeps its format, and a float model is packed in nf4.",
        section="number format of the base",
    )
    block_size: int | None = option(
        None,
        "Weights per scale; by default the usual number for `fmt`, such as 64 for nf4.",
    )
    double_quant: bool | None = option(
        None,
        "Whether to also quantize the scales; by default true if `fmt` supports it.",
    )
    recode: bool = option(
        False,
        "Whether to pack a 4-bit model again, in `fmt`. Needed if it has zero points "
        "or reordered inputs, which no format here supports.",
    )
    dtype: Literal["bfloat16", "float32"] = option(
        "bfloat16",
        "Dtype of the computation and of float weights; adapters are float32.",
        section="computation and memory",
    )
    remat: bool | Literal["offload"] = option(
        True,
        "Whether to recompute activations in the backward pass, to save memory. "
        "offload also keeps the layers' inputs in host memory (not on GPUs).",
        is_identity=False,
    )
    attention: Literal["xla", "splash"] = option(
        "xla", "xla, which computes all scores, or splash, JAX's kernel for TPUs."
    )
    stream_dtype: Literal["bfloat16", "float32"] = option(
        "float32", "Dtype of the residual stream, to which layers add their outputs."
    )
    mlp_tile: int | None = option(
        None,
        "Maximum number of tokens in the MLP at a time, to save memory.",
        limit=COUNT,
    )
    base_memory: Literal["device", "host"] = option(
        "device",
        "Where the packed layers are stored: device, or host to save device memory "
        "(not on GPUs). From the host, layers are moved when they are needed.",
        is_identity=False,
    )


@dataclass(frozen=True)
class AdapterConfig(Config):
    """The adapters of a run, in the words of `QLoRAConfig`.

    It is a class of its own, because a run finds its targets by PEFT's names of modules
    in the model, and packs the model before it creates adapters.

    Example:
        >>> from qlora_jax.llm import app
        >>> app.AdapterConfig(rank=8).target_modules
        'all-linear'
    """

    rank: int = option(
        16,
        "Rank of the adapters.",
        name="lora_r",
        section="adapters",
        limit=COUNT,
        aliases=("rank",),
    )
    alpha: float | None = option(
        None,
        "Adapters are scaled by `lora_alpha / lora_r`; `lora_r` by default.",
        name="lora_alpha",
        limit=POSITIVE,
        aliases=("alpha",),
    )
    dropout: float = option(
        0.0,
        "Dropout rate of the adapters' input.",
        name="lora_dropout",
        limit=FRACTION,
        aliases=("dropout",),
    )
    rank_stabilized: bool = option(
        False,
        "Whether to scale by `lora_alpha / sqrt(lora_r)` instead.",
        name="use_rslora",
        aliases=("rank_stabilized",),
    )
    use_dora: bool = option(
        False, "Whether to train the magnitudes of outputs separately (DoRA); slower."
    )
    target_modules: str | list[str] = option(
        "all-linear",
        '"all-linear" (except the head), names of modules such as q_proj or '
        "q_proj,v_proj, or a regular expression for full names, as in PEFT.",
    )
    trainable: str | None = option(
        None,
        "Regular expression for paths of float weights to train in full, such as "
        "layers/.*norm/scale.",
    )


@dataclass(frozen=True)
class DataConfig(Config):
    """The rows of a run, and how they are read.

    Example:
        >>> from qlora_jax.llm import app
        >>> app.DataConfig("rows.jsonl").train_on
        'completions'
    """

    path: str | dict[str, float] = option(
        REQUIRED,
        "A file of rows (.jsonl, .json, .csv, .txt, optionally with .gz, or "
        ".parquet), a folder with such files named train and optionally valid and "
        "test, or the id of a data set on the hub. Write several with weights, as "
        '"a.jsonl=0.7,b.jsonl=0.3" or {a.jsonl: 0.7, b.jsonl: 0.3}.',
        name="data",
        section="model and data",
        is_identity=False,
    )
    train_on: Literal["completions", "last", "all"] = option(
        "completions",
        "Which tokens of rows with prompts or messages are targets: completions, last "
        "(only the assistant's last message) or all. With all, the cross entropy of "
        "orpo includes prompts, as in TRL.",
        section="rows",
    )
    keys: dict[str, str] = option(
        {},
        "Mapping from standard keys, such as prompt, to the keys in the file.",
        is_identity=False,
    )
    chat: bool = option(
        True,
        "Whether to convert prompts and completions to messages, if the model has a "
        "chat template.",
    )
    template: str | None = option(
        None, "File with a chat template that replaces the model's.", is_identity=False
    )
    date: str | None = option(
        None,
        "Today's date for templates that contain it, such as 2026-11-26; by default "
        "the day on which the run starts.",
        is_identity=False,
        limit=DATE,
    )
    stream: bool = option(
        False,
        "Whether to leave training rows in their .jsonl files and tokenize them when "
        "they are needed, for data that do not fit in memory.",
        is_identity=False,
    )
    validation_split: float | None = option(
        None,
        "Share of the training rows to validate on, such as 0.05, if there are no "
        "validation rows. `data_seed` selects the rows.",
    )
    too_long: Literal["refuse", "drop", "truncate", "split"] = option(
        "refuse",
        "What to do with rows of more than `max_length` tokens: refuse, drop, "
        "truncate; or split, for rows of `text`.",
    )


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """The optimizer of a run, and its learning rates.

    Example:
        >>> from qlora_jax.llm import app
        >>> app.OptimizerConfig(learning_rate=1e-3).schedule
        'cosine'
    """

    learning_rate: float | list[float] = option(
        2e-4,
        "Peak learning rate. With several, such as 1e-4,3e-4, one adapter is trained "
        "for each, side by side on one base, in subfolders of `out`.",
        limit=POSITIVE,
        section="training",
    )
    schedule: Literal["cosine", "constant", "linear", "wsd"] = option(
        "cosine", "Learning-rate schedule; wsd is warmup, stable, decay."
    )
    warmup: int | None = option(
        None, "Warmup steps; by default a tenth of the steps, at most 20."
    )
    end_learning_rate: float = option(
        0.0, "The final learning rate; unused for constant."
    )
    decay: float = option(
        0.1, "For wsd: the share of the steps in which the learning rate decays."
    )
    name: Literal["adamw", "adamw8bit", "lion", "adafactor"] = option(
        "adamw", "The optimizer.", name="optimizer", section="optimizer"
    )
    offload_optimizer: bool = option(
        False,
        "Whether the optimizer's state is in host memory; not with adafactor.",
        is_identity=False,
    )
    weight_decay: float = option(
        0.0,
        "Decoupled weight decay, multiplied by the learning rate.",
        limit=NOT_NEGATIVE,
    )
    beta1: float = option(0.9, "Decay of the first moment.", limit=FRACTION)
    beta2: float | None = option(
        None,
        "Decay of the second moment, by default 0.999 (lion: 0.99).",
        limit=FRACTION,
    )
    clip: float = option(
        1.0, "Maximum norm of the gradient; 0 for no clipping.", limit=NOT_NEGATIVE
    )

    def __post_init__(self):
        check_swept(self, "learning_rate")
        super().__post_init__()
        if self.offload_optimizer and self.name == "adafactor":
            raise ValueError(
                "`optimizer` must be adamw, adamw8bit or lion with "
                "`offload_optimizer`, because adafactor mixes the values of different "
                "layers. Got adafactor."
            )


@dataclass(frozen=True)
class TrainingConfig(Config):
    """The length of a run, its loss, its batches and its seeds.

    Example:
        >>> from qlora_jax.llm import app
        >>> app.TrainingConfig(steps=100).batch_size
        8
    """

    steps: int | None = option(
        None,
        "Number of training steps; alternatively, set `epochs`.",
        section="training",
        limit=COUNT,
    )
    epochs: float | None = option(
        None,
        "Passes over the data; 1 if `steps` is not set either.",
        is_identity=False,
        limit=POSITIVE,
    )
    objective: str = option(
        "sft",
        "sft for supervised fine-tuning, distill for distillation, or a preference "
        "loss: dpo, ipo, orpo, simpo or kto, whose reference model is the base without "
        "the adapter.",
        section="objective",
    )
    beta: float = option(
        0.1,
        "For preferences: strength of the pull towards the reference (dpo, ipo, kto), "
        "scale of the rewards (simpo) or weight of the odds ratio (orpo).",
        limit=POSITIVE,
    )
    gamma: float = option(
        0.5, "For simpo: the target margin between the rewards.", limit=NOT_NEGATIVE
    )
    teacher: str | None = option(
        None,
        "For distill: the model to learn from, with the same vocabulary. By default "
        "the weights of the model before they are packed.",
        is_identity=False,
    )
    temperature: float = option(
        1.0,
        "For distill: divisor of the logits of both models. The loss is the divergence "
        "of the model from the teacher, times the square of the temperature.",
        limit=POSITIVE,
    )
    batch_size: int = option(
        8,
        "Sequences in a batch; for preferences, pairs of answers; with `packing`, "
        "rows of `max_length` tokens.",
        section="batches",
        limit=COUNT,
    )
    accumulation: int = option(
        1, "Gradient accumulation steps: batches in a training step.", limit=COUNT
    )
    max_length: int = option(
        1024, "Maximum number of tokens of a sequence.", limit=COUNT
    )
    packing: bool = option(False, "Whether several sequences share a row.")
    seed: int | list[int] = option(
        0,
        "Seed of the adapters, the order of the data and the dropout. With several, "
        "one adapter is trained for each, as for `learning_rate`.",
        section="seeds",
        limit=NOT_NEGATIVE,
    )
    data_seed: int | None = option(
        None,
        "Seed of the order of the data; by default the first `seed`.",
        limit=NOT_NEGATIVE,
    )
    on_nan: Literal["stop", "skip"] = option(
        "stop",
        "If the loss or the gradient is not finite: stop, or skip the update.",
        is_identity=False,
    )

    def __post_init__(self):
        check_swept(self, "seed")
        super().__post_init__()
        if self.steps is not None and self.epochs is not None:
            raise ValueError("`steps` or `epochs` must be left out. Got both.")
        objective = find_objective(self.objective)
        if objective.rows == "labelled" and (self.packing or self.batch_size < 2):
            raise ValueError(
                f"{self.objective} needs a `batch_size` of at least 2 and no "
                "`packing`, because it pairs answers with other prompts of the batch. "
                f"Got {self.batch_size} and {self.packing}."
            )
        if self.teacher is not None and not objective.uses_teacher:
            raise ValueError(
                f"`teacher` must be left out with {self.objective}, which has none. "
                f"Got {self.teacher!r}."
            )

    @property
    def row_seed(self) -> int:
        """The seed of the order of the rows; in a sweep, the same for all runs."""
        if self.data_seed is not None:
            return self.data_seed
        return self.seed[0] if isinstance(self.seed, list) else self.seed


@dataclass(frozen=True)
class EvaluationConfig(Config):
    """When and how a run is evaluated on validation rows.

    Example:
        >>> from qlora_jax.llm import app
        >>> app.EvaluationConfig().eval_examples
        120
    """

    eval_every: int | None = option(
        None,
        "Steps between evaluations on the validation rows. There is also one before "
        "the first step and one after the last. By default there are about ten, of "
        "which only the first and the last use all rows and generate answers.",
        section="evaluation",
        limit=COUNT,
    )
    eval_examples: int = option(
        120,
        "Number of validation prompts that the model answers in an evaluation, for "
        "the share of exact answers; 0 for none.",
        limit=NOT_NEGATIVE,
    )
    eval_batch_size: int = option(
        60, "Number of prompts that are answered at a time.", limit=COUNT
    )
    max_new_tokens: int | None = option(
        None,
        "Maximum number of tokens of an answer; by default 16 more than the longest "
        "expected answer has.",
        limit=COUNT,
    )
    samples: int = option(
        3, "Number of answers to print in an evaluation.", limit=NOT_NEGATIVE
    )
    keep_best: bool = option(
        False,
        "Whether to write the adapter of the step with the lowest validation loss, "
        "instead of the last one. Each evaluation then uses all rows.",
    )
    early_stopping_patience: int | None = option(
        None,
        "With `keep_best`: training stops after this many consecutive evaluations "
        "without a new lowest validation loss.",
        limit=COUNT,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.early_stopping_patience is not None and not self.keep_best:
            raise ValueError(
                "`keep_best` must be set with `early_stopping_patience`. Got "
                f"{self.early_stopping_patience}."
            )


@dataclass(frozen=True)
class OutputConfig(Config):
    """What a run writes, and whether it resumes.

    Example:
        >>> from qlora_jax.llm import app
        >>> app.OutputConfig("run").save_every
        100
    """

    out: str = option(
        REQUIRED,
        "The run's folder, new or empty; with `resume`, the folder of the run.",
        section="model and data",
    )
    save_every: int = option(
        100,
        "Steps between saved states.",
        section="checkpoints and results",
        limit=COUNT,
    )
    keep: int = option(2, "Number of states to keep.", limit=COUNT)
    resume: bool = option(
        False, "Whether to continue the run in `out` from its newest state."
    )
    resume_step: int | None = option(
        None, "With `resume`, the step to resume from; later states are deleted."
    )
    push_to_hub: str | None = option(
        None,
        "Repository on the Hugging Face hub to push the adapter to, such as "
        "user/name. If it does not exist, a private repository is created.",
    )
    preview: int | None = option(
        None,
        "Number of rows to show as they would be trained, instead of training. Target "
        "tokens are green on a terminal, and in brackets elsewhere.",
        limit=COUNT,
    )
    log_every: int | None = option(
        None,
        "Steps between progress lines, which are printed if stderr is not a terminal, "
        "and between the steps that go to `log`. Evaluations are always included. By "
        "default, about ten lines are printed, and all steps go to `log`. The file "
        "metrics.jsonl always has all steps.",
        limit=COUNT,
    )
    log: str | list[str] = option(
        [], "More destinations for the metrics: tensorboard, wandb and trackio."
    )
    verbose: bool = option(
        False, "Whether to print a message when `huge_pages` restarts the process."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.resume_step is not None and not self.resume:
            raise ValueError(
                f"`resume` must be set with `resume_step`. Got {self.resume_step}."
            )
        if unknown := [name for name in self.loggers if name not in LOGGERS]:
            raise ValueError(
                f"`log` must only contain {', '.join(LOGGERS)}. Got {unknown}."
            )

    @property
    def loggers(self) -> list[str]:
        """The names in `log`."""
        names = self.log.split(",") if isinstance(self.log, str) else self.log
        return [name.strip() for name in names]


@dataclass(frozen=True)
class DevicesConfig(Config):
    """The devices and processes of a run.

    Example:
        >>> from qlora_jax.llm import app
        >>> app.DevicesConfig(mesh="fsdp=4").mesh_sizes
        {'fsdp': 4}
    """

    mesh: str | dict[str, int] | None = option(
        None,
        "Devices along each axis: data splits the rows of a batch, fsdp splits rows "
        "and weights, and tensor splits heads and the width of the MLP. Written as "
        '"fsdp=4,tensor=2" or {fsdp: 4, tensor: 2}; one device by default.',
        section="devices and processes",
    )
    distributed: bool = option(
        False, "Whether several processes, which share the files, run this command."
    )
    coordinator_address: str | None = option(
        None, "With `distributed`: host and port of the first process."
    )
    num_processes: int | None = option(
        None, "With `distributed`: the number of processes."
    )
    process_id: int | None = option(
        None, "With `distributed`: the index of this process, from 0."
    )
    huge_pages: bool = option(
        True,
        "Whether to restart `qlora-jax` with huge pages on Linux: faster steps on a "
        "CPU, but more memory.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.distributed and not self.mesh_sizes:
            raise ValueError("`mesh` must be given with `distributed`. Got none.")
        names = ("coordinator_address", "num_processes", "process_id")
        # On clusters that JAX detects, none of these is needed.
        settings = [name for name in names if getattr(self, name) is not None]
        if settings and not self.distributed:
            raise ValueError(f"`distributed` must be set with {settings}. Got false.")

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """The sizes of the mesh axes; empty for one device."""
        return parse_mesh(self.mesh)


def parse_mesh(mesh: str | dict[str, int] | None) -> dict[str, int]:
    """Returns the sizes of mesh axes from a dict or text such as "fsdp=4,tensor=2"."""
    sizes = mesh or {}
    try:
        if isinstance(sizes, str):
            pairs = [part.split("=") for part in sizes.split(",")]
            sizes = {name.strip(): int(size) for name, size in pairs}
            if len(sizes) < len(pairs):
                raise ValueError  # an axis occurs twice
        if not {*sizes} <= {*MESH_AXES} or min(sizes.values(), default=1) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"`mesh` must have positive sizes for some of {', '.join(MESH_AXES)}, such "
            f'as "fsdp=4,tensor=2". Got {mesh!r}.'
        ) from None
    # Always in the order of MESH_AXES, which determines the place of each device.
    return {name: sizes[name] for name in MESH_AXES if name in sizes}
