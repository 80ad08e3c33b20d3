"""The settings of `qlora-jax train`."""

import datetime
import math
from dataclasses import dataclass
from typing import Literal

from ..data.kinds import TrainOn
from ..models.constraints import MESH_AXES, ROW_AXES
from .configs import Dtype, EngineName, Fmt, TargetFmt
from .options import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    REQUIRED,
    SEED,
    Config,
    Limit,
    option,
)

# The Python module of each logger. The extra of `qlora-jax` that installs a logger has
# the same name as the logger.
LOGGERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


# `True` is 1, and `False` is 0.
TRUE_OR_COUNT = Limit(
    "true, false or a positive number", lambda x: x is False or x >= 1
)
DATE = Limit("a day such as 2026-11-26", _is_date)


@dataclass(frozen=True)
class TrainConfig(Config):
    """Fine-tunes a model on data: trains an adapter on a base in 4 bits.

    Attributes:
        model: A Hugging Face folder in float or 4 bits, or a hub id.
        data: A file of rows (.jsonl, .json, .csv, .txt or .parquet), a folder with such
            files named train and optionally valid and test, or the id of a data set on
            the hub. Write several with weights, as "a.jsonl=0.7,b.jsonl=0.3" or
            {a.jsonl: 0.7, b.jsonl: 0.3}.
        out: The run's folder, new or empty; with `resume`, the folder of the run.
        fmt: Number format of the frozen linear layers; none for float (plain LoRA). By
            default a 4-bit model keeps its format, and a float model is packed in nf4.
        block_size: Weights per scale; by default the usual number for `fmt`, such as 64
            for nf4.
        double_quant: Whether to also quantize the scales; by default true if `fmt`
            supports it.
        rank: Rank of the adapters.
        lora_alpha: Adapters are scaled by `lora_alpha / rank`. By default, `lora_alpha`
            is equal to `rank`, or keeps the scaling of `adapter`.
        lora_dropout: Dropout rate of the adapters' input.
        use_rslora: Whether to scale by `lora_alpha / sqrt(rank)` instead.
        use_dora: Whether to train the magnitudes of outputs separately (DoRA); slower.
        target_modules: "all-linear" (except the head), names of modules such as q_proj
            or q_proj,v_proj, or a regular expression for full names, as in PEFT.
        trainable: Regular expression for paths of float weights to train in full, such
            as layers/.*norm/scale.
        merge_aware: Whether to train the adapters as parts of the 4-bit weights of one
            file, which `export` writes. They cannot be used beside a base. Give the
            number format of the file, or true for that of the base. If the base has
            this format, the file has blocks of the same size, otherwise of the usual
            one. Use a finer base than the file, such as int8 or none, so that small
            changes are kept.
        adapter: An adapter to start from, with the same `rank` and modules.
        train_on: Which tokens of rows with prompts or messages are targets:
            completions, last (only the assistant's last message) or all. With all,
            prompts are targets too; with orpo, only in its cross entropy, as in TRL.
        keys: Mapping from standard keys, such as prompt, to the keys in the file.
        chat: Whether to convert prompts and completions to messages, if the model has a
            chat template.
        template: File with a chat template that replaces the model's.
        date: Today's date for templates that contain it, such as 2026-11-26; by default
            the day on which the run starts.
        validation_split: Share of the training rows to validate on, such as 0.05. The
            data must have no validation rows then. `seed` selects the rows.
        too_long: What to do with rows of more than `max_length` tokens: error, drop,
            truncate; or split, for rows of `text`.
        learning_rate: Peak learning rate.
        steps: Number of training steps; alternatively, set `epochs`.
        epochs: Passes over the data, which decide `steps`. The last step has the rows
            that remain. 1 if `steps` is not set either.
        schedule: Learning-rate schedule; wsd is warmup, stable, decay.
        warmup: Warmup steps; by default a tenth of the steps, at most 20.
        on_nan: If the loss or the gradient is not finite: stop, or skip the update.
        batch_size: Sequences in a batch; for preferences, pairs of answers; with
            `packing`, rows of `max_length` tokens.
        accumulation: Gradient accumulation steps: batches in a training step.
        max_length: Maximum number of tokens of a sequence.
        packing: Whether several sequences share a row.
        seed: Seed of the adapters, the order of the data and the dropout.
        objective: sft for supervised fine-tuning, distill for distillation, or a
            preference loss: dpo, ipo, orpo, simpo or kto, whose reference model is the
            base without the adapter.
        beta: For preferences: strength of the pull towards the reference (dpo, ipo,
            kto), scale of the rewards (simpo) or weight of the odds ratio (orpo).
        gamma: For simpo: the target margin between the rewards.
        teacher: For distill: the model to learn from, with the same vocabulary. By
            default the weights of the model before they are packed.
        temperature: For distill: divisor of the logits of both models. The loss is the
            divergence of the model from the teacher, times the square of the
            temperature.
        optimizer: The optimizer.
        offload_optimizer: Whether the optimizer's state is in host memory.
        weight_decay: Decoupled weight decay, multiplied by the learning rate.
        beta2: Decay of the second moment, by default 0.999 (lion: 0.99); adafactor does
            not use it.
        clip: Maximum norm of the gradient; 0 for no clipping.
        eval_every: Steps between evaluations on the validation rows. There is also one
            after the last step. By default there are about ten. Those between the first
            and the last generate no answers, and use a sample of the rows if there are
            many.
        eval_on_start: Whether to evaluate before the first step too.
        eval_examples: Number of validation prompts that the model answers in an
            evaluation, for the share of exact answers; 0 for none.
        keep_best: Whether to write the adapter of the step with the lowest validation
            loss, instead of the last one. Each evaluation then uses all rows. With a
            number, training also stops after this many consecutive evaluations without
            a new lowest loss.
        save_every: Steps between saved states.
        resume: Whether to continue the run in `out` from its newest state.
        preview: Number of rows to show as they would be trained, instead of training.
            Target tokens are green on a terminal, and in brackets elsewhere.
        log: More destinations for the metrics: tensorboard, wandb and trackio.
        dtype: Dtype of the computation and of float weights; adapters are float32. auto
            is float32 on processors that do not multiply faster in bfloat16, and
            otherwise bfloat16. float16, for GPUs without bfloat16, scales the loss.
        remat: Whether to recompute activations in the backward pass, to save memory.
            offload also keeps the layers' inputs in host memory (not on GPUs).
        attention: xla, which computes all scores; blocks, which needs less memory;
            splash, JAX's kernel for TPUs; or cudnn, for NVIDIA GPUs from Ampere on.
        stream_dtype: Dtype of the residual stream, to which layers add their outputs.
        mlp_tile: Maximum number of tokens in the MLP at a time, to save memory.
        base_memory: Where the packed layers are stored: device, or host to save device
            memory (not on GPUs). Layers in host memory are moved to the device when
            they are needed.
        engine: What computes the model: jax, our decoder; torch, the PyTorch code of
            transformers, which needs the extra torch; or auto, which is torch for types
            of models that the decoder does not support.
        mesh: Devices along each axis: data splits the rows of a batch, fsdp splits rows
            and weights, and tensor splits heads and the width of the MLP. Written as
            "fsdp=4,tensor=2" or {fsdp: 4, tensor: 2}; one device by default.
        distributed: Whether several processes, which share the files, run this command:
            true on clusters that JAX detects. Elsewhere, host and port of the first
            process, the number of processes, and the index of this one from 0, such as
            host0:9876,4,0.

    Example:
        >>> from qlora_jax.llm import app
        >>> config = app.TrainConfig("folder", "rows.jsonl", "run", learning_rate=1e-3)
        >>> config.rank
        16
        >>> settings = dict(model="folder", data="rows.jsonl", out="run")
        >>> settings["learning_rate"] = "1e-3"
        >>> app.TrainConfig.from_settings(settings) == config
        True
    """

    common = frozenset(
        """model data out fmt rank lora_alpha lora_dropout target_modules train_on
        validation_split learning_rate steps epochs batch_size accumulation max_length
        packing seed objective save_every resume preview dtype attention mesh""".split()
    )

    # The model and the data may move, because the fingerprint of a run has hashes of
    # their contents.
    model: str = option(REQUIRED, section="model and data", may_change=True)
    data: str | dict[str, float] = option(REQUIRED, may_change=True)
    out: str = option(REQUIRED, limit=PATH, may_change=True)

    fmt: Fmt | None = option(None, section="number format of the base")
    block_size: int | None = None
    double_quant: bool | None = None

    rank: int = option(16, section="adapters", limit=COUNT)
    lora_alpha: float | None = option(None, limit=POSITIVE)
    lora_dropout: float = option(0.0, limit=FRACTION)
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: str | list[str] = "all-linear"
    trainable: str | None = None
    merge_aware: bool | TargetFmt = False
    adapter: str | None = None

    train_on: TrainOn = option("completions", section="rows")
    keys: dict[str, str] = option({}, may_change=True)
    chat: bool = True
    template: str | None = option(None, may_change=True)
    date: str | None = option(None, may_change=True, limit=DATE)
    validation_split: float | None = None
    too_long: Literal["error", "drop", "truncate", "split"] = "error"

    learning_rate: float = option(2e-4, limit=POSITIVE, section="training")
    steps: int | None = option(None, limit=COUNT)
    epochs: float | None = option(None, limit=POSITIVE)
    schedule: Literal["cosine", "constant", "linear", "wsd"] = "cosine"
    warmup: int | None = None
    on_nan: Literal["stop", "skip"] = option("stop", may_change=True)

    batch_size: int = option(8, section="batches", limit=COUNT)
    accumulation: int = option(1, limit=COUNT)
    max_length: int = option(1024, limit=COUNT)
    packing: bool = False
    seed: int = option(0, limit=SEED)

    objective: str = option("sft", section="objective")
    beta: float = option(0.1, limit=POSITIVE)
    gamma: float = option(0.5, limit=NOT_NEGATIVE)
    teacher: str | None = option(None, may_change=True)
    temperature: float = option(1.0, limit=POSITIVE)

    optimizer: Literal["adamw", "lion", "adafactor"] = option(
        "adamw", section="optimizer"
    )
    offload_optimizer: bool = option(False, may_change=True)
    weight_decay: float = option(0.0, limit=NOT_NEGATIVE)
    beta2: float | None = option(None, limit=FRACTION)
    clip: float = option(1.0, limit=NOT_NEGATIVE)

    eval_every: int | None = option(
        None, section="evaluation", limit=COUNT, may_change=True
    )
    eval_on_start: bool = option(True, may_change=True)
    eval_examples: int = option(120, limit=NOT_NEGATIVE, may_change=True)
    keep_best: bool | int = option(False, limit=TRUE_OR_COUNT, may_change=True)

    save_every: int = option(
        100, section="checkpoints and results", limit=COUNT, may_change=True
    )
    resume: bool = option(False, may_change=True)
    preview: int | None = option(None, limit=COUNT, may_change=True)
    log: str | list[str] = option([], may_change=True)

    dtype: Literal["auto"] | Dtype = option("auto", section="computation and memory")
    remat: bool | Literal["offload"] = option(True, may_change=True)
    attention: Literal["xla", "blocks", "splash", "cudnn"] = "xla"
    stream_dtype: Literal["bfloat16", "float32"] = "float32"
    mlp_tile: int | None = option(None, limit=COUNT)
    base_memory: Literal["device", "host"] = option("device", may_change=True)
    engine: EngineName = option("auto", may_change=True)

    mesh: str | dict[str, int] | None = option(
        None, section="devices and processes", may_change=True
    )
    distributed: bool | str = option(False, may_change=True)

    def __post_init__(self):
        super().__post_init__()
        self._check_adapters()
        self._check_objective()
        self._check_evaluation_and_output()
        self._check_devices()

    def _check_adapters(self) -> None:
        if self.merge_aware and (self.lora_dropout or self.use_dora):
            raise ValueError(
                "`merge_aware` must be false with `lora_dropout`, which the packed "
                f"weights could not have, and with `use_dora`. Got {self.merge_aware}, "
                f"lora_dropout={self.lora_dropout} and use_dora={self.use_dora}."
            )
        if self.adapter is not None and self.use_dora:
            raise ValueError(
                "`use_dora` must be false with `adapter`, because training can only "
                f"start from a plain LoRA. Got true, and {self.adapter!r}."
            )
        if self.lora_dropout and self.mlp_tile is not None:
            raise ValueError(
                "`lora_dropout` must be 0 with `mlp_tile`; otherwise all tiles drop "
                f"the same entries. Got {self.lora_dropout}."
            )

    def _check_objective(self) -> None:
        from ..train.objectives import find_objective  # imports Flax

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
        if self.train_on == "all" and not objective.may_train_on_all:
            raise ValueError(
                f"`train_on` must not be all with {self.objective}, whose loss "
                "depends on answers only. Got all."
            )

    def _check_evaluation_and_output(self) -> None:
        if unknown := [name for name in self.loggers if name not in LOGGERS]:
            raise ValueError(
                f"`log` must only contain {', '.join(LOGGERS)}. Got {unknown}."
            )

    def _check_devices(self) -> None:
        # All parts of a batch must have the same number of rows.
        if self.batch_size % self.num_row_parts:
            raise ValueError(
                f"`batch_size` must be a multiple of {self.num_row_parts}, the number "
                f"of parts into which `mesh` splits a batch. Got {self.batch_size}."
            )
        if self.distributed and not self.mesh_sizes:
            raise ValueError("`mesh` must be given with `distributed`. Got none.")
        if isinstance(self.distributed, str):
            parts = self.distributed.split(",")
            if len(parts) != 3 or not (parts[1] + parts[2]).isdecimal():
                raise ValueError(
                    "`distributed` must be true, false, or address, number and index "
                    f"of processes, such as host0:9876,4,0. Got {self.distributed!r}."
                )

    @property
    def loggers(self) -> list[str]:
        """The names in `log`."""
        names = self.log.split(",") if isinstance(self.log, str) else self.log
        return [name.strip() for name in names]

    @property
    def patience(self) -> int | None:
        """The number in `keep_best`; None if training does not stop early."""
        return None if isinstance(self.keep_best, bool) else self.keep_best

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """The sizes of the mesh axes; empty for one device."""
        return parse_mesh(self.mesh)

    @property
    def num_row_parts(self) -> int:
        """The number of parts into which `mesh` splits the rows of a batch."""
        return math.prod(self.mesh_sizes.get(name, 1) for name in ROW_AXES)

    @property
    def eval_steps(self) -> int:
        """The steps between evaluations; by default there are about ten evaluations."""
        # `steps` may be None in the user's settings. `make_run` always sets it.
        return self.eval_every or math.ceil((self.steps or 0) / 10)


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
    # Always in the order of MESH_AXES, which determines where each device is.
    return {name: sizes[name] for name in MESH_AXES if name in sizes}
