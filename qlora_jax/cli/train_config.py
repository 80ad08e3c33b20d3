"""Settings of `qlora-jax train`."""

import datetime
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from ..models.sharding import MESH_AXES, ROW_AXES
from .configs import Fmt

# What may have several values, and their type.
SWEPT: dict[str, type] = {"learning_rate": float, "seed": int}


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tunes a model on data: an adapter on a base in 4 bits.

    Attributes:
        model: A Hugging Face folder, in float or 4 bits, a hub id or a .gguf file.
        data: A file of rows (.jsonl, .json, .csv, .txt, each perhaps with .gz, or
            .parquet), a folder with such files called train and perhaps valid and test,
            or the id of a data set on the hub. Or several with their weights, as
            "a.jsonl=0.7,b.jsonl=0.3" or {a.jsonl: 0.7, b.jsonl: 0.3}.
        out: The run's folder, new or empty; with `resume`, that of the run.
        lora_r: Rank of the adapters.
        lora_alpha: Adapters are scaled by `lora_alpha / lora_r`; by default the rank.
        lora_dropout: Rate of dropout on the adapters' input.
        use_rslora: Whether to scale by `lora_alpha / sqrt(lora_r)`.
        use_dora: Whether to train the magnitudes of outputs separately (DoRA); slower.
        target_modules: "all-linear" (but the head), names of modules such as q_proj or
            q_proj,v_proj, or a regular expression for full names, as in PEFT.
        trainable: A regular expression for paths of float weights that are trained in
            full beside the adapters, such as layers/.*norm/scale.
        fmt: Number format of the frozen linear layers; none for float (plain LoRA). By
            default that of a model in 4 bits, and nf4 for one in float.
        block_size: Weights that share a scale; by default 64, or what `fmt` has.
        double_quant: Whether the scales are quantized too; by default where `fmt` can.
        recode: Whether to pack a model in 4 bits again, in `fmt`: also one with zero
            points or an order of its inputs, which no format here has.
        learning_rate: The highest learning rate; or several, such as 1e-4,3e-4, which
            train an adapter each, side by side over one base, in folders in `out`.
        schedule: How it falls: cosine, linear, constant, wsd (warmup, stable, decay).
        warmup: Steps in which it rises; by default a tenth of the steps, 20 at most.
        end_learning_rate: The last learning rate; none for constant.
        decay: For wsd: the share of the steps in which it falls.
        steps: Steps of training; or see `epochs`.
        epochs: Passes over the data; 1 where neither is given.
        objective: sft, supervised fine-tuning, or a loss of preferences: dpo, ipo,
            orpo, simpo, or kto. Their reference is the model without the adapter.
        beta: For preferences: how much the model is kept near the reference (dpo, ipo,
            kto), the scale of the rewards (simpo) or the weight of the odds (orpo).
        gamma: For simpo: the margin between the rewards.
        batch_size: Sequences of a batch, or pairs of answers; with packing, rows of
            `max_length` tokens.
        accumulation: Batches of a step.
        max_length: The most tokens of a sequence.
        packing: Whether several sequences share a row.
        optimizer: adamw, adamw8bit, lion or adafactor.
        offload_optimizer: Whether its state is in host memory; not with adafactor.
        weight_decay: Share of a weight that an update at learning rate 1 takes off.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment, by default 0.999 (lion: 0.99).
        clip: The largest norm of the gradient; 0 for no limit.
        dtype: Dtype of the computation and of float weights; adapters are float32.
        remat: Whether the backward pass recomputes activations, for less memory; or
            offload, which keeps the layers' inputs in host memory too (not on GPUs).
        attention: xla, which forms all scores, or splash, JAX's kernel for TPUs.
        stream_dtype: Dtype of the residual stream, to which layers add.
        mlp_tile: The most tokens that the MLP takes at a time, to save memory.
        base_memory: Where the packed layers are: device; or host, from which each layer
            is moved when it is computed, for less memory (not on GPUs).
        seed: Seed of the adapters, the order of the data and the dropout; or several,
            as for `learning_rate`.
        data_seed: Seed of the order of the data; by default `seed`, the first of it.
        eval_every: Steps between evaluations on the validation rows, before the first
            step and after the last. By default about ten, of which those in between
            compute only the loss of some rows.
        eval_examples: How many validation rows with a prompt the model answers in an
            evaluation, for the share of exact answers; 0 for none.
        eval_batch_size: Prompts that it answers at once.
        max_new_tokens: The most tokens of an answer; by default the longest right + 16.
        samples: How many of the answers are shown.
        keep_best: Whether the adapter is that of the step with the lowest validation
            loss, over all validation rows at each evaluation, not that of the last.
        early_stopping_patience: Evaluations in a row without a lower validation loss
            after which training ends; with `keep_best`.
        save_every: Steps between states.
        keep: How many states to keep.
        resume: Whether to go on with the run in `out`, from its newest state.
        resume_step: With `resume`, the step to go on from; later states are deleted.
        on_nan: Whether to stop or skip a step whose loss or gradient is not finite.
        push_to_hub: The repository on the Hugging Face hub to push the adapter to, such
            as user/name; a private one is made if there is none.
        preview: How many rows to show as they would be trained, instead of training:
            their targets are green on a terminal, and in brackets elsewhere.
        log_every: Steps between lines of progress where stderr is no terminal, and
            between steps that `log` gets; evaluations have both. By default about ten
            lines, and all steps. The file metrics.jsonl has all steps.
        log: Where to log each step, too: tensorboard, wandb, trackio; some of them.
        verbose: Whether to say on stderr that the process is started again.
        train_on: The trained tokens of rows with prompts or messages: completions, or
            last, the assistant's last message alone, or all. With all, the cross
            entropy of orpo is that of prompts too, as in TRL.
        keys: Other names of the rows' keys: the name here to the name in the file.
        chat: Whether prompts and completions become messages of a user and an assistant
            where the model has a chat template.
        template: A file with a chat template, in place of the model's.
        date: Today's date for templates that write it, such as 2026-11-26; by default
            the day on which the run begins.
        stream: Whether training rows stay in their .jsonl files, and become tokens when
            they are needed: for data that do not fit in memory.
        validation_split: The share of the training rows, such as 0.05, to validate on
            instead; chosen by `data_seed`. For data without validation rows.
        too_long: What to do with a row of more tokens than `max_length`: refuse, drop
            or truncate; or split, which is for rows of `text`.
        mesh: The devices, by what they split: the rows of a batch (data), rows and
            weights (fsdp), heads and the width of the MLP (tensor). As
            "fsdp=4,tensor=2" or {fsdp: 4, tensor: 2}; one device by default.
        distributed: Whether this is one of several processes, which run this command
            with the same files and the same folder `out`.
        coordinator_address: With `distributed`: host and port of the first process.
        num_processes: Likewise, the number of processes.
        process_id: Likewise, this process's number, from 0.
        huge_pages: Whether `qlora-jax` starts its process again with huge pages for
            memory, where Linux has them: faster steps on a CPU for more memory.

    Example:
        >>> from qlora_jax import cli
        >>> cli.TrainConfig(model="folder", data="rows.jsonl", out="run").lora_r
        16
    """

    model: str
    data: str | dict[str, float]
    out: str
    lora_r: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: str | list[str] = "all-linear"
    trainable: str | None = None
    fmt: Fmt | None = None
    block_size: int | None = None
    double_quant: bool | None = None
    recode: bool = False
    learning_rate: Any = 2e-4
    schedule: Literal["cosine", "constant", "linear", "wsd"] = "cosine"
    warmup: int | None = None
    end_learning_rate: float = 0.0
    decay: float = 0.1
    steps: int | None = None
    epochs: float | None = None
    objective: Literal["sft", "dpo", "ipo", "orpo", "simpo", "kto"] = "sft"
    beta: float = 0.1
    gamma: float = 0.5
    batch_size: int = 8
    accumulation: int = 1
    max_length: int = 1024
    packing: bool = False
    optimizer: Literal["adamw", "adamw8bit", "lion", "adafactor"] = "adamw"
    offload_optimizer: bool = False
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float | None = None
    clip: float = 1.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: bool | Literal["offload"] = True
    attention: Literal["xla", "splash"] = "xla"
    stream_dtype: Literal["bfloat16", "float32"] = "float32"
    mlp_tile: int | None = None
    base_memory: Literal["device", "host"] = "device"
    seed: Any = 0
    data_seed: int | None = None
    eval_every: int | None = None
    eval_examples: int = 120
    eval_batch_size: int = 60
    max_new_tokens: int | None = None
    samples: int = 3
    keep_best: bool = False
    early_stopping_patience: int | None = None
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
    train_on: Literal["completions", "last", "all"] = "completions"
    keys: dict[str, str] = field(default_factory=dict)
    chat: bool = True
    template: str | None = None
    date: str | None = None
    stream: bool = False
    validation_split: float | None = None
    too_long: Literal["refuse", "drop", "truncate", "split"] = "refuse"
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
        return self.eval_every or math.ceil((self.steps or 0) / 10)

    def __post_init__(self):
        for name, kind in SWEPT.items():
            object.__setattr__(self, name, _numbers(name, kind, getattr(self, name)))
        for what, is_right, names in _RANGES:
            for name in names.split():
                value = getattr(self, name)
                several = value if isinstance(value, list) else [value]
                if not all(x is None or is_right(x) for x in several):
                    raise ValueError(f"`{name}` must be {what}. Got {value}.")
        if self.is_sweep and self.early_stopping_patience is not None:
            raise ValueError(
                "`early_stopping_patience` must be left out where several adapters are "
                "trained side by side, all to the last step. Got "
                f"{self.early_stopping_patience}."
            )
        if self.steps is not None and self.epochs is not None:
            raise ValueError("`steps` or `epochs` must be left out. Got both.")
        if self.lora_dropout and self.mlp_tile is not None:
            raise ValueError(
                "`lora_dropout` must be 0 with `mlp_tile`: all tiles would drop the "
                f"same entries. Got {self.lora_dropout}."
            )
        if self.offload_optimizer and self.optimizer == "adafactor":
            raise ValueError(
                "`optimizer` must be adamw, adamw8bit or lion with "
                "`offload_optimizer`, since adafactor mixes layers. Got adafactor."
            )
        if self.early_stopping_patience is not None and not self.keep_best:
            raise ValueError(
                "`keep_best` must be set with `early_stopping_patience`. Got "
                f"{self.early_stopping_patience}."
            )
        if self.train_on == "all" and self.objective not in ("sft", "orpo"):
            raise ValueError(
                "`train_on` must be completions with preferences: a prompt is no "
                f"preference. Got all, and {self.objective}."
            )
        if self.objective == "kto" and (self.packing or self.batch_size < 2):
            raise ValueError(
                "kto must have `batch_size` 2 at least and no `packing`: it takes "
                "answers to other prompts of the batch. Got "
                f"{self.batch_size} and {self.packing}."
            )
        if self.resume_step is not None and not self.resume:
            raise ValueError(
                f"`resume` must be set with `resume_step`. Got {self.resume_step}."
            )
        if unknown := [name for name in self.loggers if name not in LOGGERS]:
            raise ValueError(
                f"`log` must have names of {', '.join(LOGGERS)}. Got {unknown}."
            )
        rows = math.prod(self.mesh_sizes.get(name, 1) for name in ROW_AXES)
        if self.batch_size % rows:
            raise ValueError(
                f"`batch_size` must be a multiple of {rows}, the devices among which "
                f"`mesh` splits the rows of a batch. Got {self.batch_size}."
            )
        if self.distributed and not self.mesh_sizes:
            raise ValueError("`mesh` must be given with `distributed`. Got none.")
        names = ("coordinator_address", "num_processes", "process_id")
        given = [name for name in names if getattr(self, name) is not None]
        if given and not self.distributed:
            raise ValueError(f"`distributed` must be set with {given}. Got false.")


# The module of each logger, which the extra of its name brings.
LOGGERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
_COUNTS = "lora_r batch_size accumulation max_length save_every keep steps eval_every"
_COUNTS += (
    " log_every preview eval_batch_size max_new_tokens mlp_tile early_stopping_patience"
)
_POSITIVE = "learning_rate lora_alpha epochs beta"
_NOT_NEGATIVE = "gamma weight_decay clip seed data_seed eval_examples samples"
# A range in words, its check, and the settings in it; `make_schedule` has others.
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("positive", lambda x: x >= 1, _COUNTS),
    ("positive and finite", lambda x: 0 < x < math.inf, _POSITIVE),
    ("at least 0", lambda x: 0 <= x < math.inf, _NOT_NEGATIVE),
    ("in [0, 1)", lambda x: 0 <= x < 1, "lora_dropout beta1 beta2"),
    ("a day such as 2026-11-26", lambda x: _is_date(x), "date"),
)


def _numbers(name: str, kind: type, value: Any) -> Any:
    """Returns a number, or a list of several from a list or text such as "1,2"."""
    parts = value.split(",") if isinstance(value, str) else value
    parts = parts if isinstance(parts, list | tuple) else [parts]
    try:
        found = [kind(str(part)) for part in parts]
        if not found or len({*found}) < len(found):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"`{name}` must be of type {kind.__name__}, or several that differ, with "
            f"commas between them. Got {value!r}."
        ) from None
    return found[0] if len(found) == 1 else found


def parse_mesh(mesh: str | dict[str, int] | None) -> dict[str, int]:
    """Returns the sizes of mesh axes from JSON or text such as "fsdp=4,tensor=2"."""
    found = mesh or {}
    try:
        if isinstance(found, str):
            pairs = [part.split("=") for part in found.split(",")]
            found = {name.strip(): int(size) for name, size in pairs}
            if len(found) < len(pairs):
                raise ValueError
        if not {*found} <= {*MESH_AXES} or min(found.values(), default=1) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"`mesh` must have positive sizes for some of {', '.join(MESH_AXES)}, such "
            f'as "fsdp=4,tensor=2". Got {mesh!r}.'
        ) from None
    return {name: found[name] for name in MESH_AXES if name in found}


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True
