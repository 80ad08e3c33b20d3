"""The registry of training objectives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..step import Loss


@dataclass(frozen=True)
class Objective:
    """A training objective: the rows that it takes, its loss and its metrics.

    Attributes:
        name: The name in `qlora-jax train --objective`.
        rows: The form of its rows, as in `qlora_jax.llm.data.read_dataset`.
        loss: A function that returns the loss function to pass to `make_step`. It takes
            a decoder, wrapped by `qlora_jax.linen.wrap`, and keyword arguments.
        settings: The settings of `qlora-jax train` that `loss` takes as keywords. No
            other code may use them, because a run whose objective does not list a
            setting may be resumed with a different value of it.
        metrics: The names of the metrics that the loss returns.
        is_cross_entropy: Whether the exponential of the loss is the perplexity.
        balances_experts: Whether `loss` has the argument `balance` of `decoder_loss`.
        may_train_on_all: Whether prompts may be targets (`train_on: all`).
        uses_teacher: Whether `loss` has an argument `teacher`, another wrapped decoder.
            The loss then gets a pair, the base and the teacher's parameters, instead of
            the base.

    Example:
        >>> from qlora_jax.llm import train
        >>> train.find_objective("dpo").metrics[:2]
        ('rewards/chosen', 'rewards/rejected')
    """

    name: str
    rows: Literal["texts", "pairs", "labelled"]
    loss: Callable[..., Loss]
    settings: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    is_cross_entropy: bool = False
    balances_experts: bool = False
    may_train_on_all: bool = False
    uses_teacher: bool = False

    @property
    def sequences_per_row(self) -> int:
        """The number of sequences that a row of data has in a batch."""
        # A pair has two answers. A labelled answer is followed by a mismatched one.
        return 1 if self.rows == "texts" else 2


OBJECTIVES: dict[str, Objective] = {}


def register_objective(objective: Objective) -> None:
    """Adds an objective, which `qlora-jax train` then offers by its name.

    Args:
        objective: The objective. It replaces another one of the same name.

    Example:
        >>> import dataclasses
        >>> from qlora_jax.llm import train
        >>> dpo = train.find_objective("dpo")
        >>> train.register_objective(dataclasses.replace(dpo, name="my-dpo"))
        >>> train.find_objective("my-dpo").rows
        'pairs'
        >>> del train.objectives.OBJECTIVES["my-dpo"]
    """
    OBJECTIVES[objective.name] = objective


def find_objective(name: str) -> Objective:
    """Returns a registered objective.

    Args:
        name: Its name.

    Raises:
        ValueError: If no objective has this name.

    Example:
        >>> from qlora_jax.llm import train
        >>> train.find_objective("simpo").settings
        ('beta', 'gamma')
    """
    if name not in OBJECTIVES:
        raise ValueError(
            f"`objective` must be one of {', '.join(OBJECTIVES)}. Got {name!r}."
        )
    return OBJECTIVES[name]
