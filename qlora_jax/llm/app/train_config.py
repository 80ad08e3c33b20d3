"""The settings of `qlora-jax train`."""

import datetime
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from ..models.sharding import MESH_AXES, ROW_AXES
from ..train.objectives import find_objective
from .configs import Fmt

# The settings that may have several values, for a sweep, and their types.
SWEPT: dict[str, type] = {"learning_rate": float, "seed": int}


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tunes a model on data: trains an adapter on a base in 4 bits.

    Attributes:
        model: A Hugging Face folder in float or 4 bits, a hub id or a .gguf file.
        data: A file of rows (.jsonl, .json, .csv, .txt, optionally with .gz, or
            .parquet), a folder with such files named train and optionally valid and
            test, or the id of a data set on the hub. Write several with weights, as
            "a.jsonl=0.7,b.jsonl=0.3" or {a.jsonl: 0.7, b.jsonl: 0.3}.
        out: The run's folder, new or empty; with `resume`, the folder of the run.
        lora_r: Rank of the adapters.
        lora_alpha: Adapters are scaled by `lora_alpha / lora_r`; `lora_r` by default.
        lora_dropout: Dropout rate of the adapters' input.
        use_rslora: Whether to scale by `lora_alpha / sqrt(lora_r)` instead.
        use_dora: Whether to train the magnitudes of outputs separately (DoRA); slower.
        target_modules: "all-linear" (except the head), names of modules such as q_proj
            or q_proj,v_proj, or a regular expression for full names, as in PEFT.
        trainable: Regular expression for paths of float weights to train in full, such
            as layers/.*norm/scale.
        fmt: Number format of the frozen linear layers; none for float (plain LoRA). By
            default a 4-bit model keeps its format, and a float model is packed in nf4.
        block_size: Weights per scale; by default the usual number for `fmt`, such as 64
            for nf4.
        double_quant: Whether to also quantize the scales; by default true if `fmt`
            supports it.
        recode: Whether to pack a 4-bit model again, in `fmt`. Needed if it has zero
            points or reordered inputs, which no format here supports.
        learning_rate: Peak learning rate. With several, such as 1e-4,3e-4, one adapter
            is trained for each, side by side on one base, in subfolders of `out`.
        schedule: Learning-rate schedule; wsd is warmup, stable, decay.
        warmup: Warmup steps; by default a tenth of the steps, at most 20.
        end_learning_rate: The final learning rate; unused for constant.
        decay: For wsd: the share of the steps in which the learning rate decays.
        steps: Number of training steps; alternatively, set `epochs`.
        epochs: Passes over the data; 1 if `steps` is not set either.
        objective: sft for supervised fine-tuning, distill for distillation, or a
            preference loss: dpo, ipo, orpo, simpo or kto, whose reference model is the
            base without the adapter.
        beta: For preferences: strength of the pull towards the reference (dpo, ipo,
            kto), scale of the rewards (simpo) or weight of the odds ratio (orpo).
        gamma: For simpo: the target margin between the rewards.
        teacher: For distill: the model to learn from, with the same vocabulary, as in
            `model`; by default the float weights that are packed. A float teacher has
            the type `dtype`.
        temperature: For distill: the divisor of the logits of both models. The loss is
            the divergence of the model from the teacher, times the square of this.
        batch_size: Sequences in a batch; for preferences, pairs of answers; with
            `packing`, rows of `max_length` tokens.
        accumulation: Gradient accumulation steps: batches in a training step.
        max_length: Maximum number of tokens of a sequence.
        packing: Whether several sequences share a row.
        optimizer: The optimizer.
        offload_optimizer: Whether the optimizer's state is in host memory; not with
            adafactor.
        weight_decay: Decoupled weight decay, multiplied by the learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment, by default 0.999 (lion: 0.99).
        clip: Maximum norm of the gradient; 0 for no clipping.
        dtype: Dtype of the computation and of float weights; adapters are float32.
        remat: Whether to recompute activations in the backward pass, to save memory.
            offload also keeps the layers' inputs in host memory (not on GPUs).
        attention: xla, which computes all scores, or splash, JAX's kernel for TPUs.
        stream_dtype: Dtype of the residual stream, to which layers add their outputs.
        mlp_tile: Maximum number of tokens in the MLP at a time, to save memory.
        base_memory: Where the packed layers are stored: device, or host to save device
            memory (not on GPUs). From the host, layers are moved when they are needed.
        seed: Seed of the adapters, the order of the data and the dropout. With several,
            one adapter is trained for each, as for `learning_rate`.
        data_seed: Seed of the order of the data; by default the first `seed`.
        eval_every: Steps between evaluations on the validation rows. There is also one
            before the first step and one after the last. By default there are about
            ten, of which only the first and the last use all rows and generate answers.
        eval_examples: Number of validation prompts that the model answers in an
            evaluation, for the share of exact answers; 0 for none.
        eval_batch_size: Number of prompts that are answered at a time.
        max_new_tokens: Maximum number of tokens of an answer; by default 16 more than
            the longest expected answer has.
        samples: Number of answers to print in an evaluation.
        keep_best: Whether to write the adapter of the step with the lowest validation
            loss, instead of the last one. Each evaluation then uses all rows.
        early_stopping_patience: With `keep_best`: training stops after this many
            consecutive evaluations without a new lowest validation loss.
        save_every: Steps between saved states.
        keep: Number of states to keep.
        resume: Whether to continue the run in `out` from its newest state.
        resume_step: With `resume`, the step to resume from; later states are deleted.
        on_nan: If the loss or the gradient is not finite: stop, or skip the update.
        push_to_hub: Repository on the Hugging Face hub to push the adapter to, such as
            user/name. If it does not exist, a private repository is created.
        preview: Number of rows to show as they would be trained, instead of training.
            Target tokens are green on a terminal, and in brackets elsewhere.
        log_every: Steps between progress lines, which are printed if stderr is not a
            terminal, and between the steps that go to `log`. Evaluations are always
            included. By default, about ten lines are printed, and all steps go to
            `log`. The file metrics.jsonl always has all steps.
        log: More destinations for the metrics: tensorboard, wandb and trackio.
        verbose: Whether to print a message when `huge_pages` restarts the process.
        train_on: Which tokens of rows with prompts or messages are targets:
            completions, last (only the assistant's last message) or all. With all, the
            cross entropy of orpo includes prompts, as in TRL.
        keys: Mapping from standard keys, such as prompt, to the keys in the file.
        chat: Whether to convert prompts and completions to messages, if the model has a
            chat template.
        template: File with a chat template that replaces the model's.
        date: Today's date for templates that contain it, such as 2026-11-26; by default
            the day on which the run starts.
        stream: Whether to leave training rows in their .jsonl files and tokenize them
            when they are needed, for data that do not fit in memory.
        validation_split: Share of the training rows to validate on, such as 0.05, if
            there are no validation rows. `data_seed` selects the rows.
        too_long: What to do with rows of more than `max_length` tokens: refuse, drop,
            truncate; or split, for rows of `text`.
        mesh: Devices along each axis: data splits the rows of a batch, fsdp splits rows
            and weights, and tensor splits heads and the width of the MLP. Written as
            "fsdp=4,tensor=2" or {fsdp: 4, tensor: 2}; one device by default.
        distributed: Whether several processes, which share the files, run this command.
        coordinator_address: With `distributed`: host and port of the first process.
        num_processes: With `distributed`: the number of processes.
        process_id: With `distributed`: the index of this process, from 0.
        huge_pages: Whether to restart `qlora-jax` with huge pages on Linux: faster
            steps on a CPU, but more memory.

    Example:
        >>> from qlora_jax.llm import app
        >>> app.TrainConfig(model="folder", data="rows.jsonl", out="run").lora_r
        16
    """

    model: str
    data: str | dict[str, float]
    out: str
    # Adapters
    lora_r: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: str | list[str] = "all-linear"
    trainable: str | None = None
    # The base
    fmt: Fmt | None = None
    block_size: int | None = None
    double_quant: bool | None = None
    recode: bool = False
    # Training. `Any` is a number or several, which `__post_init__` parses.
    learning_rate: Any = 2e-4
    schedule: Literal["cosine", "constant", "linear", "wsd"] = "cosine"
    warmup: int | None = None
    end_learning_rate: float = 0.0
    decay: float = 0.1
    steps: int | None = None
    epochs: float | None = None
    objective: str = "sft"
    beta: float = 0.1
    gamma: float = 0.5
    teacher: str | None = None
    temperature: float = 1.0
    # Batches
    batch_size: int = 8
    accumulation: int = 1
    max_length: int = 1024
    packing: bool = False
    # The optimizer
    optimizer: Literal["adamw", "adamw8bit", "lion", "adafactor"] = "adamw"
    offload_optimizer: bool = False
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float | None = None
    clip: float = 1.0
    # Computation and memory
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: bool | Literal["offload"] = True
    attention: Literal["xla", "splash"] = "xla"
    stream_dtype: Literal["bfloat16", "float32"] = "float32"
    mlp_tile: int | None = None
    base_memory: Literal["device", "host"] = "device"
    seed: Any = 0
    data_seed: int | None = None
    # Evaluation
    eval_every: int | None = None
    eval_examples: int = 120
    eval_batch_size: int = 60
    max_new_tokens: int | None = None
    samples: int = 3
    keep_best: bool = False
    early_stopping_patience: int | None = None
    # Checkpoints and results
    save_every: int = 100
    keep: int = 2
    resume: bool = False
    resume_step: int | None = None
    on_nan: Literal["stop", "skip"] = "stop"
    push_to_hub: str | None = None
    preview: int | None = None
    log_every: int | None = None
    log: str | list[str] = field(default_factory=list)
    verbose: bool = False
    # Rows
    train_on: Literal["completions", "last", "all"] = "completions"
    keys: dict[str, str] = field(default_factory=dict)
    chat: bool = True
    template: str | None = None
    date: str | None = None
    stream: bool = False
    validation_split: float | None = None
    too_long: Literal["refuse", "drop", "truncate", "split"] = "refuse"
    # Devices and processes
    mesh: str | dict[str, int] | None = None
    distributed: bool = False
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    huge_pages: bool = True

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """The sizes of the mesh axes; empty for one device."""
        return parse_mesh(self.mesh)

    @property
    def loggers(self) -> list[str]:
        """The names in `log`."""
        names = self.log.split(",") if isinstance(self.log, str) else self.log
        return [name.strip() for name in names]

    @property
    def is_sweep(self) -> bool:
        """Whether several adapters are trained side by side."""
        return any(isinstance(getattr(self, name), list) for name in SWEPT)

    @property
    def eval_steps(self) -> int:
        """The steps between evaluations; by default there are about ten evaluations."""
        # `steps` is set once the settings are resolved.
        return self.eval_every or math.ceil((self.steps or 0) / 10)

    def __post_init__(self):
        # Flags and YAML files give text, numbers or lists.
        for name, number_type in SWEPT.items():
            numbers = _parse_numbers(name, number_type, getattr(self, name))
            object.__setattr__(self, name, numbers)
        self._check_ranges()
        self._check_training()
        self._check_run()
        self._check_mesh()

    def _check_ranges(self) -> None:
        for description, is_in_range, names in _RANGES:
            for name in names.split():
                value = getattr(self, name)
                values = value if isinstance(value, list) else [value]
                # None stands for a default that the data or the model decide.
                if not all(x is None or is_in_range(x) for x in values):
                    raise ValueError(f"`{name}` must be {description}. Got {value}.")

    def _check_training(self) -> None:
        """Checks the settings of the adapter, the optimizer and the objective."""
        if self.steps is not None and self.epochs is not None:
            raise ValueError("`steps` or `epochs` must be left out. Got both.")
        if self.lora_dropout and self.mlp_tile is not None:
            raise ValueError(
                "`lora_dropout` must be 0 with `mlp_tile`; otherwise all tiles drop "
                f"the same entries. Got {self.lora_dropout}."
            )
        if self.offload_optimizer and self.optimizer == "adafactor":
            raise ValueError(
                "`optimizer` must be adamw, adamw8bit or lion with "
                "`offload_optimizer`, because adafactor mixes the values of different "
                "layers. Got adafactor."
            )
        objective = find_objective(self.objective)
        if self.train_on == "all" and not objective.may_train_on_all:
            raise ValueError(
                f"`train_on` must not be all with {self.objective}, whose loss depends "
                "on answers only. Got all."
            )
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

    def _check_run(self) -> None:
        """Checks when a run stops, how it resumes and where it logs."""
        if self.is_sweep and self.early_stopping_patience is not None:
            raise ValueError(
                "`early_stopping_patience` must be left out if several adapters are "
                "trained side by side, because all are trained to the last step. Got "
                f"{self.early_stopping_patience}."
            )
        if self.early_stopping_patience is not None and not self.keep_best:
            raise ValueError(
                "`keep_best` must be set with `early_stopping_patience`. Got "
                f"{self.early_stopping_patience}."
            )
        if self.resume_step is not None and not self.resume:
            raise ValueError(
                f"`resume` must be set with `resume_step`. Got {self.resume_step}."
            )
        if unknown := [name for name in self.loggers if name not in LOGGERS]:
            raise ValueError(
                f"`log` must only contain {', '.join(LOGGERS)}. Got {unknown}."
            )

    def _check_mesh(self) -> None:
        # Each device has the same number of rows.
        num_parts = math.prod(self.mesh_sizes.get(name, 1) for name in ROW_AXES)
        if self.batch_size % num_parts:
            raise ValueError(
                f"`batch_size` must be a multiple of {num_parts}, the number of "
                f"parts into which `mesh` splits a batch. Got {self.batch_size}."
            )
        if self.distributed and not self.mesh_sizes:
            raise ValueError("`mesh` must be given with `distributed`. Got none.")
        names = ("coordinator_address", "num_processes", "process_id")
        # On clusters that JAX detects, none of these is needed.
        settings = [name for name in names if getattr(self, name) is not None]
        if settings and not self.distributed:
            raise ValueError(f"`distributed` must be set with {settings}. Got false.")


# The module of each logger; an extra of the package installs it.
LOGGERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
_COUNTS = (
    "lora_r batch_size accumulation max_length save_every keep steps eval_every "
    "log_every preview eval_batch_size max_new_tokens mlp_tile early_stopping_patience"
)


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


# Ranges: a description, a function that checks a value, and the settings in the range.
# `make_schedule` checks the settings of schedules.
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("positive", lambda x: x >= 1, _COUNTS),
    (
        "positive and finite",
        lambda x: 0 < x < math.inf,
        "learning_rate lora_alpha epochs beta temperature",
    ),
    (
        "at least 0",
        lambda x: 0 <= x < math.inf,
        "gamma weight_decay clip seed data_seed eval_examples samples",
    ),
    ("in [0, 1)", lambda x: 0 <= x < 1, "lora_dropout beta1 beta2"),
    ("a day such as 2026-11-26", _is_date, "date"),
)


def _parse_numbers(name: str, number_type: type, value: Any) -> Any:
    """Returns a number, or a list of several from a list or text such as "1,2"."""
    parts = value.split(",") if isinstance(value, str) else value
    parts = parts if isinstance(parts, list | tuple) else [parts]
    try:
        # Convert through text, because int("1.5") fails, but int(1.5) is 1.
        numbers = [number_type(str(part)) for part in parts]
        if not numbers or len({*numbers}) < len(numbers):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"`{name}` must be of type {number_type.__name__}, or several different "
            f"values separated by commas. Got {value!r}."
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


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
