"""The settings of `qlora-jax train`."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..models.constraints import ROW_AXES
from .options import Config
from .train_groups import (
    AdapterConfig,
    DataConfig,
    DevicesConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    TrainingConfig,
)


def _changeable(default: Any = dataclasses.MISSING) -> Any:
    """Returns a field for a group whose options a resumed run may change."""
    return dataclasses.field(default=default, metadata={"may_change": True})


@dataclass(frozen=True)
class TrainConfig(Config):
    """Fine-tunes a model on data: trains an adapter on a base in 4 bits.

    Attributes:
        model: The model, and how it is packed and computed.
        data: The rows.
        output: What is written, and whether the run is resumed.
        adapter: The adapters.
        optimizer: The optimizer and the learning rates.
        training: Length, loss, batches and seeds.
        evaluation: When and how to evaluate.
        devices: Devices and processes.

    Example:
        >>> from qlora_jax.llm import app
        >>> config = app.TrainConfig(
        ...     model=app.ModelConfig("folder", fmt="nf4"),
        ...     data=app.DataConfig("rows.jsonl"),
        ...     output=app.OutputConfig("run"),
        ...     optimizer=app.OptimizerConfig(learning_rate=1e-3),
        ... )
        >>> config.adapter.rank
        16
        >>> settings = dict(model="folder", fmt="nf4", data="rows.jsonl", out="run")
        >>> settings["learning_rate"] = 1e-3
        >>> app.TrainConfig.from_settings(settings) == config
        True
    """

    model: ModelConfig
    data: DataConfig
    output: OutputConfig = _changeable()
    adapter: AdapterConfig = AdapterConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    # Not yet created, since its check imports Flax.
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = _changeable(EvaluationConfig())
    devices: DevicesConfig = _changeable(DevicesConfig())

    def __post_init__(self):
        # Each group has checked its own options.
        training = self.training
        if self.adapter.dropout and self.model.mlp_tile is not None:
            raise ValueError(
                "`lora_dropout` must be 0 with `mlp_tile`; otherwise all tiles drop "
                f"the same entries. Got {self.adapter.dropout}."
            )
        from ..train.objectives import find_objective  # imports Flax

        objective = find_objective(training.objective)
        if self.data.train_on == "all" and not objective.may_train_on_all:
            raise ValueError(
                f"`train_on` must not be all with {training.objective}, whose loss "
                "depends on answers only. Got all."
            )
        patience = self.evaluation.early_stopping_patience
        if self.is_sweep and patience is not None:
            raise ValueError(
                "`early_stopping_patience` must be left out if several adapters are "
                "trained side by side, because all are trained to the last step. Got "
                f"{patience}."
            )
        # All parts of a batch must have the same number of rows.
        if training.batch_size % self.num_row_parts:
            raise ValueError(
                f"`batch_size` must be a multiple of {self.num_row_parts}, the number "
                "of parts into which `mesh` splits a batch. Got "
                f"{training.batch_size}."
            )

    @classmethod
    def resolve_names(cls, settings: Mapping[str, object]) -> dict[str, object]:
        """Returns settings as a flat dict, with each option under its main name.

        Settings may use aliases, or be nested in their groups. Values stay as they are.

        Args:
            settings: As in `from_settings`.

        Raises:
            ValueError: If a name is unknown, or if an option is set under two names.
        """
        settings = dict(settings)
        # In version 0.2, TensorBoard had a switch of its own.
        if settings.pop("tensorboard", False):
            settings.setdefault("log", "tensorboard")
        return super().resolve_names(settings)

    @property
    def num_row_parts(self) -> int:
        """The number of parts into which `mesh` splits the rows of a batch."""
        sizes = self.devices.mesh_sizes
        return math.prod(sizes.get(name, 1) for name in ROW_AXES)

    @property
    def sweepable(self) -> dict[str, Any]:
        """The options that may have a list of values, for a sweep, and their values."""
        rates, seeds = self.optimizer.learning_rate, self.training.seed
        return {"learning_rate": rates, "seed": seeds}

    @property
    def is_sweep(self) -> bool:
        """Whether several adapters are trained side by side."""
        return any(isinstance(value, list) for value in self.sweepable.values())

    @property
    def eval_steps(self) -> int:
        """The steps between evaluations; by default there are about ten evaluations."""
        # `steps` may be None in the user's settings. `make_run` always sets it.
        return self.evaluation.eval_every or math.ceil((self.training.steps or 0) / 10)
