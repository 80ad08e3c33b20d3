"""Dynamic loss scaling, for training in float16."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class LossScale(NamedTuple):
    """A factor of the loss, which keeps gradients in the range of float16.

    Small gradients would underflow in float16, and large ones would overflow
    (Micikevicius et al. 2018, section 3.2). So the loss is multiplied by the largest
    factor that has not made a gradient overflow recently, and gradients are divided by
    it. The rules and their constants are those of `torch.amp.GradScaler`.

    Attributes:
        scale: The factor.
        good_steps: The number of steps since the last overflow or growth.
        growth_interval: The number of good steps after which the factor is doubled.

    Example:
        >>> from qlora_jax.llm import train
        >>> loss_scale = train.LossScale.create(growth_interval=2)
        >>> for is_finite in (False, True, True):
        ...     loss_scale = loss_scale.update(is_finite)
        ...     print(float(loss_scale.scale), int(loss_scale.good_steps))
        32768.0 0
        32768.0 1
        65536.0 0
    """

    scale: Float[Array, ""]
    good_steps: Int[Array, ""]
    growth_interval: Int[Array, ""]

    @classmethod
    def create(cls, growth_interval: int = 2000) -> "LossScale":
        """Returns the loss scale before the first step, which is 65536.

        Args:
            growth_interval: The number of good steps after which it is doubled.
        """
        counts = jnp.zeros((), jnp.int32), jnp.int32(growth_interval)
        return cls(jnp.float32(2**16), *counts)

    def update(self, is_finite: bool | Bool[Array, ""]) -> "LossScale":
        """Returns the loss scale after a step.

        Args:
            is_finite: Whether the gradient of the step was finite.
        """
        good_steps = self.good_steps + 1
        is_due = good_steps == self.growth_interval
        doubled = self.scale * 2
        grown = jnp.where(is_due & jnp.isfinite(doubled), doubled, self.scale)
        return LossScale(
            jnp.where(is_finite, grown, self.scale / 2),
            jnp.where(is_finite & ~is_due, good_steps, 0),
            self.growth_interval,
        )
