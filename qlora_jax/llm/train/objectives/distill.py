"""Distillation: the divergence of a model's predictions from those of a teacher."""

from typing import Any

import qlora_jax as ql

from ...models.decoder import head_arguments
from ..step import Loss
from .registry import Objective, register_objective
from .sft import hidden_states, make_summed_loss


def distillation_loss(
    model: Any, *, teacher: Any, temperature: float = 1.0, balance: float = 0.0
) -> Loss:
    """Returns the loss of distillation, for `make_step`.

    The loss is a function that returns the sum of the divergences at all targets, and
    the number of targets. Its second argument is a pair: the base, and the teacher's
    parameters.
    """

    def compute_divergences(lora, base_and_teacher, batch, dropout_key, mutable=False):
        base, teacher_params = base_and_teacher
        arguments = lora, base, batch, dropout_key
        hidden, *changed = hidden_states(model, *arguments, mutable)
        [teacher_hidden] = hidden_states(teacher, {}, teacher_params, batch, None)
        teacher_head = head_arguments(teacher.config, teacher_params)
        divergences = ql.losses.chunked_kl_divergence(
            hidden,
            teacher_hidden=teacher_hidden,
            temperature=temperature,
            **head_arguments(model.config, base, lora),
            **{f"teacher_{name}": x for name, x in teacher_head.items()},
        )
        return divergences, *changed

    return make_summed_loss(model, compute_divergences, balance)


register_objective(
    Objective(
        name="distill",
        rows="texts",
        loss=distillation_loss,
        settings=("temperature",),
        balances_experts=True,
        may_train_on_all=True,
        uses_teacher=True,
    )
)
