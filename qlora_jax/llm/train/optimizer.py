"""Learning rate schedules and optimizers."""

from collections.abc import Callable
from typing import Literal, get_args

import optax

from ... import optim
from .outputs import plural

ScheduleName = Literal["cosine", "constant", "linear", "wsd"]
OptimizerName = Literal["adamw", "lion", "adafactor"]


def make_schedule(
    name: ScheduleName,
    learning_rate: float,
    steps: int,
    *,
    warmup: int = 0,
) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates so far.

    It rises linearly from 0 during the warmup. Then "cosine" and "linear" decay to 0
    after `steps` updates; "constant" does not change. "wsd" (warmup, stable, decay; Hu
    et al. 2024, MiniCPM, section 4) stays at the peak, and decays linearly to 0 over
    the last tenth of the steps.

    Args:
        name: The schedule.
        learning_rate: The peak learning rate.
        steps: The number of steps of the run, including the warmup.
        warmup: The number of warmup steps.

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> from qlora_jax.llm import train
        >>> schedule = train.make_schedule("wsd", 1.0, 20, warmup=2)
        >>> [float(schedule(step)) for step in (0, 1, 2, 18, 19, 20)]
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
    # Each schedule starts at the boundary before it, and counts steps from there.
    schedules, boundaries = [], []
    if warmup:
        schedules.append(optax.linear_schedule(0.0, learning_rate, warmup))
        boundaries.append(warmup)
    num_steps = steps - warmup
    if name == "cosine":
        schedules.append(optax.cosine_decay_schedule(learning_rate, num_steps))
    elif name == "linear":
        schedules.append(optax.linear_schedule(learning_rate, 0.0, num_steps))
    else:
        schedules.append(optax.constant_schedule(learning_rate))
    if name == "wsd":
        decay_steps = min(num_steps, max(1, round(steps / 10)))
        schedules.append(optax.linear_schedule(learning_rate, 0.0, decay_steps))
        boundaries.append(steps - decay_steps)
    return optax.join_schedules(schedules, boundaries)


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
        name: "adamw" (Loshchilov and Hutter 2019), "lion" (Chen et al. 2023), or
            "adafactor" (Shazeer and Stern 2018) without its relative step.
        schedule: The learning rate, or a function of the step.
        clip: The largest global norm of the gradient, or None for no clipping.
        weight_decay: The share of a weight that an update subtracts at learning rate 1.
        beta1: The decay of the first moment. Unused by adafactor.
        beta2: The decay of the second moment, by default 0.999. For lion, the decay of
            the momentum, by default 0.99. Unused by adafactor, which varies the decay.
        offload: Whether to keep the state in host memory between steps
            (`ql.optim.offload`).

    Raises:
        ValueError: If `name` is unknown.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from qlora_jax.llm import train
        >>> optimizer = train.make_optimizer("lion", 0.5, clip=None)
        >>> updates, _ = optimizer.update(x := jnp.array([3.0, -4.0]),
        ...                               optimizer.init(x), x)
        >>> updates.tolist()
        [-0.5, 0.5]
    """
    if beta2 is None:
        beta2 = 0.99 if name == "lion" else 0.999
    factories: dict[str, Callable[..., optax.GradientTransformation]] = {
        "adamw": optax.adamw,
        "lion": optax.lion,
    }
    if name in factories:
        create = factories[name]
        tx = create(schedule, b1=beta1, b2=beta2, weight_decay=weight_decay)
    elif name == "adafactor":
        # `optax.adafactor` would scale the learning rate by the size of the weights.
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
    # `offload` updates one parameter at a time, and the norm is that of all.
    tx = optim.offload(tx) if offload else tx
    return tx if clip is None else optax.chain(optax.clip_by_global_norm(clip), tx)
