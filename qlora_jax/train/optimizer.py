"""Learning rate schedules and optimizers."""

from typing import Any, Literal, get_args

import optax

from .. import optim
from .._jax.progress import plural

ScheduleName = Literal["cosine", "constant", "linear", "wsd"]
OptimizerName = Literal["adamw", "adamw8bit", "lion", "adafactor"]


def make_schedule(
    name: ScheduleName,
    learning_rate: float,
    steps: int,
    *,
    warmup: int = 0,
    end: float = 0.0,
    decay: float = 0.1,
) -> optax.Schedule:
    """Returns the learning rate, a function of the number of updates made so far.

    It rises linearly from 0 during the warmup. Then "cosine" and "linear" fall to `end`
    at the last step, "constant" stays, and "wsd" (warmup, stable, decay; Hu et al.
    2024, MiniCPM, section 4) stays and falls linearly over the last steps.

    Args:
        name: The schedule.
        learning_rate: The highest one.
        steps: Steps of the run, with the warmup.
        warmup: Steps of the warmup.
        end: The last learning rate; "constant" has none.
        decay: For "wsd": the share of the steps in which it falls, in (0, 1].

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> from qlora_jax import train
        >>> schedule = train.make_schedule("wsd", 1.0, 20, warmup=2, decay=0.4)
        >>> [float(schedule(step)) for step in (0, 1, 2, 12, 16, 20)]
        [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if name not in get_args(ScheduleName):
        raise ValueError(
            f"`name` must be one of {get_args(ScheduleName)}. Got {name!r}."
        )
    if not 0 <= warmup < steps:
        raise ValueError(
            f"`warmup` must be at least 0 and less than the {plural(steps, 'step')}. "
            f"Got {warmup}."
        )
    if not 0 <= end <= learning_rate:
        raise ValueError(
            f"`end` must be at least 0 and at most `learning_rate`. Got {end}."
        )
    if not 0 < decay <= 1:
        raise ValueError(f"`decay` must be in (0, 1]. Got {decay}.")
    rest = steps - warmup
    parts = [optax.linear_schedule(0.0, learning_rate, warmup)] if warmup else []
    joints = [warmup] if warmup else []
    if name == "cosine":
        share = end / learning_rate if learning_rate else 0.0
        parts.append(optax.cosine_decay_schedule(learning_rate, rest, share))
    elif name == "linear":
        parts.append(optax.linear_schedule(learning_rate, end, rest))
    else:
        parts.append(optax.constant_schedule(learning_rate))
    if name == "wsd":
        last = min(rest, max(1, round(decay * steps)))
        parts.append(optax.linear_schedule(learning_rate, end, last))
        joints.append(steps - last)
    return optax.join_schedules(parts, joints)


def make_optimizer(
    name: OptimizerName,
    schedule: optax.ScalarOrSchedule,
    *,
    clip: float | None = 1.0,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float | None = None,
    offload: bool = False,
) -> optax.GradientTransformation:
    """Returns the optimizer of the adapters.

    Args:
        name: "adamw" (Loshchilov and Hutter 2019), "adamw8bit" (the same with moments
            in 8 bits: `ql.optim.adamw8bit`), "lion" (Chen et al. 2023), or "adafactor"
            (Shazeer and Stern 2018) without its relative step.
        schedule: The learning rate, or a function of the step.
        clip: The largest global norm of the gradient; None for no limit.
        weight_decay: Share of a weight that an update at learning rate 1 subtracts.
        beta1: Decay of the first moment. Adafactor has none.
        beta2: Decay of the second moment, 0.999 by default; for lion, that of the
            momentum, 0.99 by default. Adafactor has a schedule for it.
        offload: Whether its state is in host memory between steps, and on the device
            one layer at a time (`ql.optim.offload`). Not for adafactor.

    Raises:
        ValueError: If `name` is not one of these, or adafactor with `offload`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from qlora_jax import train
        >>> optimizer = train.make_optimizer("lion", 0.5, clip=None)
        >>> updates, _ = optimizer.update(x := jnp.array([3.0, -4.0]),
        ...                               optimizer.init(x), x)
        >>> updates.tolist()
        [-0.5, 0.5]
    """
    if offload and name == "adafactor":
        raise ValueError(
            "`name` must be adamw, adamw8bit or lion with `offload`, since adafactor "
            "mixes layers. Got adafactor."
        )
    if beta2 is None:
        beta2 = 0.99 if name == "lion" else 0.999
    plain = {"adamw": optax.adamw, "adamw8bit": optim.adamw8bit, "lion": optax.lion}
    if name in plain:
        make: Any = plain[name]
        tx = make(schedule, b1=beta1, b2=beta2, weight_decay=weight_decay)
    elif name == "adafactor":
        tx = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(schedule),
        )
    else:
        raise ValueError(
            f"`name` must be one of {get_args(OptimizerName)}. Got {name!r}."
        )
    tx = optim.offload(tx, layerwise=True) if offload else tx
    return tx if clip is None else optax.chain(optax.clip_by_global_norm(clip), tx)
