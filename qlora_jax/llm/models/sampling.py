"""Sampling of the next token."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclass(frozen=True)
class Sampling:
    """Sampling settings.

    The steps are those of transformers: divide the logits by the temperature, drop the
    tokens outside the `top_k` most probable ones, then those outside `top_p`, and draw
    one of the remaining tokens.

    Attributes:
        temperature: Divisor of the logits; 0 to always choose the most probable token.
        top_k: The number of most probable tokens to draw from, plus ties; None for all.
        top_p: Draw from the smallest set of the most probable tokens whose
            probabilities sum to at least `top_p` (Holtzman et al. 2020, section 3.1),
            plus ties. The set always has at least one token.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"`temperature` must be at least 0 and finite. Got {self.temperature}."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k` must be positive or None. Got {self.top_k}.")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"`top_p` must be from 0 to 1. Got {self.top_p}.")
        if self.is_greedy and (self.top_k is not None or self.top_p < 1):
            raise ValueError(
                "`temperature` must be positive with `top_k` or `top_p`: at 0 the most "
                f"probable token is always chosen. Got {self}."
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always chosen."""
        return self.temperature == 0

    def filtered(self, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        """Returns logits divided by the temperature, and -inf for dropped tokens."""
        if self.is_greedy:
            raise ValueError("`temperature` must be positive to filter logits. Got 0.")
        logits = logits / self.temperature
        if self.top_k is None and self.top_p == 1:
            return logits
        # Find the smallest logit that is not dropped, so that ties are treated alike.
        ascending = jnp.sort(logits, axis=-1)
        kth = 0 if self.top_k is None else max(logits.shape[-1] - self.top_k, 0)
        smallest = ascending[..., kth, None]
        ascending = jnp.where(ascending < smallest, -jnp.inf, ascending)
        if self.top_p < 1:
            # In ascending order, a token remains if the sum up to and including it is
            # large enough.
            cumulative = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
            remains = cumulative > 1 - self.top_p
            remains = remains.at[..., -1].set(True)
            first = jnp.argmax(remains, axis=-1, keepdims=True)
            cutoff = jnp.take_along_axis(ascending, first, axis=-1)
            smallest = jnp.maximum(smallest, cutoff)
        return jnp.where(logits < smallest, -jnp.inf, logits)

    def choose(
        self, logits: Float[Array, "B V"], key: Key[Array, ""] | None = None
    ) -> Int[Array, " B"]:
        """Returns a token for each row."""
        if self.is_greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        assert key is not None
        return jax.random.categorical(key, self.filtered(logits)).astype(jnp.int32)


GREEDY = Sampling()
