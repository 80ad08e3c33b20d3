"""Dynamic loss scaling, for training in float16."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class LossScale(NamedTuple):
    """A factor for the loss, so that small gradients do not become zero in float16.

    The loss is multiplied by a large factor, and its gradient is divided by the same
    factor (Micikevicius et al. 2018, section 3.2). A step whose gradient overflows
    halves the factor. After many steps without an overflow, the factor is doubled.
    These rules and their constants are those of `torch.amp.GradScaler`.

    Attributes:
        scale: The factor.
        good_steps: The number of steps since the factor last changed.
        growth_interval: The number of good steps, those without an overflow, after
            which the factor is doubled.

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
            growth_interval: The number of steps without an overflow after which the
                scale is doubled.
        """
        good_steps = jnp.zeros((), jnp.int32)
        return cls(jnp.float32(2**16), good_steps, jnp.int32(growth_interval))

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
