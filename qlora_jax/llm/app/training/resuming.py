"""What must stay the same when a run is resumed, and the step to resume from."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ...data.dataset import Dataset
from ...reading import reading
from ...train.arrays import describe_changes
from ...train.checkpoints import Checkpoints
from ...train.objectives import OBJECTIVES, find_objective
from ..open_model import OpenModel, hash_files
from ..options import options_of
from ..processes import all_or_none, log
from ..run_folder import METRICS, STATE
from ..train_config import TrainConfig


def make_fingerprint(
    config: TrainConfig, model: OpenModel, data: Dataset, teacher: OpenModel | None
) -> dict[str, Any]:
    """Returns everything that determines the adapter that a run trains, as JSON values.

    It is saved with each state. A run is only resumed if it has not changed.
    """
    options = options_of(TrainConfig)
    fingerprint = {
        name: value
        for name, value in config.to_settings().items()
        if not options[name].may_change and value is not None
    }
    if config.schedule == "constant":
        del fingerprint["steps"]  # without decay, a resumed run may have more steps
    # Settings that only other objectives use have no effect, so they are left out.
    objective = find_objective(config.objective)
    names = {name for x in OBJECTIVES.values() for name in x.settings}
    for name in names - {*objective.settings}:
        fingerprint.pop(name, None)
    fingerprint["model's files"] = hash_files(model.path)
    if model.engine.name != "jax":
        # The option may change, such as from auto to torch, but not the actual engine.
        # States of version 0.2 lack the engine, which was always "jax".
        fingerprint["engine"] = model.engine.name
    if teacher is not None:
        fingerprint["teacher's files"] = hash_files(teacher.path)
    if data.mix:
        fingerprint["rows and weights"] = data.mix
    fingerprint["data"] = data.hash
    return json.loads(json.dumps(fingerprint))


def check_fingerprint(
    saved: Mapping[str, Any], current: Mapping[str, Any], out: str
) -> None:
    """Raises ValueError if a run is resumed with other settings, and lists them.

    `saved` is the fingerprint in the state, and `current` is that of the resumed run.
    """
    # A state from an earlier version lacks the options that were added since. It was
    # trained with what are now their defaults.
    options = options_of(TrainConfig).values()
    defaults = {
        option.name: option.default for option in options if not option.may_change
    }
    saved, current = defaults | {**saved}, defaults | {**current}
    differences = describe_changes(saved, current, _describe_value, missing="not set")
    if differences:
        raise ValueError(
            f"`resume` must be used with the settings of the run in {out}. Got others: "
            f"{'; '.join(differences)}. Use the same settings, or start a new run in "
            "another `out`."
        )


def _describe_value(value: object) -> str:
    if value is None:
        return "not set"
    # The same number may be 16 in one fingerprint and 16.0 in the other.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return repr(value)


def find_resumed_step(
    config: TrainConfig, fingerprint: Mapping[str, Any], checkpoints: Checkpoints
) -> int | None:
    """Returns the step to resume after, or None to start at step 0.

    `config` has the settings that the data decide. Raises ValueError if the settings
    differ from those saved at that step, if it is after the last step, or if a finished
    run lacks its metrics.
    """
    step = checkpoints.latest
    folder, steps = pathlib.Path(config.out), config.steps or 0
    if step is None:
        if config.resume:
            log(
                f"{folder} has no saved state. Training starts again at step 0, and "
                f"overwrites {METRICS}."
            )
        return None
    with reading(folder / STATE / str(step)):
        saved = {**checkpoints.metadata(step)["settings"]}
    with all_or_none():
        check_fingerprint(saved, fingerprint, config.out)
        if step > steps:
            raise ValueError(
                f"`steps` must be at least {step}, the step from which the run "
                f"resumes. Got {steps}."
            )
        if step == steps and not (folder / METRICS).is_file():
            raise ValueError(
                f"{folder} must have {METRICS}, from which the results of a finished "
                "run are written. It is missing."
            )
    log(f"Resuming after step {step:,} of {steps:,}")
    return step
