"""One training step: gradients, and an update unless it is skipped."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .arrays import mesh_of, put_on_mesh, with_shardings
from .loss_scale import LossScale

# A function of the lora tree, the base tree, a batch and a PRNG key. It returns the sum
# of the losses of all targets, the number of targets, and optionally metrics.
Loss = Callable[..., tuple]


@dataclass(frozen=True)
class SumOfMeans:
    """A loss that is the sum of several means, such as over pairs and over tokens.

    If a step has several batches, each mean is over all of them, as if they were one.

    Attributes:
        loss: As a `Loss`, but its sums and numbers are arrays with one entry per mean.
        count: A function of a batch that returns only the numbers.
    """

    loss: Loss
    count: Callable[[Any], Array]

    def __call__(self, *args: Any) -> tuple:
        """Returns the sums, the numbers and the metrics of a batch."""
        return self.loss(*args)


# The two jitted functions of a step. The first adds a batch to the sums of the step.
# The second adds the last batch, and updates the adapter.
Programs = tuple[jax.stages.Wrapped, jax.stages.Wrapped]


class State(NamedTuple):
    """The training state.

    Attributes:
        step: The number of steps so far.
        skipped: The number of steps whose update was skipped.
        lora: The lora tree.
        opt_state: The state of the optimizer.
        key: The PRNG key of the run, which stays the same. The dropout keys of a step
            are derived from it and from the number of the step.
        loss_scale: The loss scale, for training in float16. None for no scaling.

    Example:
        >>> import jax, optax
        >>> from qlora_jax.llm import train
        >>> lora = {"w": jax.numpy.ones(3)}
        >>> state = train.State.create(lora, optax.adam(0.1), seed=0)
        >>> int(state.step)
        0
        >>> train.State.shapes(lora, optax.adam(0.1)).opt_state[0].mu["w"].shape
        (3,)
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    lora: PyTree
    opt_state: PyTree
    key: Array
    loss_scale: LossScale | None = None

    @classmethod
    def create(
        cls,
        lora: PyTree,
        optimizer: optax.GradientTransformation,
        seed: int,
        loss_scale: LossScale | None = None,
    ) -> "State":
        """Returns the state before the first step.

        On a mesh, the state of the optimizer has the sharding of the adapters.

        Args:
            lora: The lora tree.
            optimizer: The optimizer.
            seed: The seed of the dropout.
            loss_scale: The initial loss scale, for training in float16.
        """
        step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        key, opt_state = jax.random.key(seed), optimizer.init(lora)
        state = cls(step, skipped, lora, opt_state, key, loss_scale)
        mesh = mesh_of(lora)
        return state if mesh is None else put_on_mesh(state, mesh)

    @classmethod
    def shapes(
        cls,
        lora: PyTree,
        optimizer: optax.GradientTransformation,
        loss_scale: LossScale | None = None,
    ) -> "State":
        """Returns the shapes and shardings of the state that `create` returns.

        Args:
            lora: The lora tree, of `jax.ShapeDtypeStruct` with shardings.
            optimizer: The optimizer.
            loss_scale: The initial loss scale, for training in float16.
        """

        def create(lora):
            return cls.create(lora, optimizer, 0, loss_scale)

        # The shardings are dropped, because with them `create` would call `device_put`
        # while it is traced.
        unsharded = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lora)
        # The results of `eval_shape` lack memory spaces; those of `make_jaxpr` do not.
        avals = jax.make_jaxpr(create)(unsharded).out_avals
        structure = jax.tree.structure(jax.eval_shape(create, unsharded))
        state: State = jax.tree.unflatten(structure, avals)
        # The moments of an array of the adapter have the sharding of that array. None
        # stands for a replicated array.
        opt_state_templates = optax.tree_utils.tree_map_params(
            optimizer,
            lambda x, param: param if x.shape == param.shape else None,
            state.opt_state,
            lora,
            transform_non_params=lambda x: None,
        )
        templates = jax.tree.map(lambda x: None, state)
        templates = templates._replace(lora=lora, opt_state=opt_state_templates)
        return with_shardings(state, templates, jax.tree.leaves(lora)[0])


def unwrap_key(state: State) -> State:
    """Replaces the PRNG key with its integers, which NumPy and Orbax can store."""
    return state._replace(key=jax.random.key_data(state.key))


def wrap_key(state: State) -> State:
    """Undoes `unwrap_key`."""
    return state._replace(key=jax.random.wrap_key_data(state.key))


class Report(NamedTuple):
    """The results of a step.

    Attributes:
        loss: The mean loss: in nats per target token, or per answer or pair of answers.
        grad_norm: The global norm of the gradient, before clipping.
        tokens: The number of target tokens, answers or pairs, by which sums of losses
            are divided. In `metrics.jsonl`, `tokens` counts all tokens instead.
        is_finite: Whether the loss, the gradient and the new adapter are finite.
        metrics: The mean of each metric that the loss function returns, by name. With
            a loss scale, also `loss_scale`, the factor that this step used.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    tokens: Float[Array, ""]
    is_finite: Bool[Array, ""]
    metrics: Mapping[str, Float[Array, ""]] = {}


class _Sums(NamedTuple):
    """Sums over the batches of a step."""

    loss: Float[Array, "*means"]  # of a `SumOfMeans`, one sum for each mean
    num_losses: Float[Array, "*means"]  # the number of target tokens, answers or pairs
    grads: PyTree  # of the summed loss, without the loss scale
    metrics: dict[str, tuple[Array, Array]]  # a sum and a count for each metric


def make_step(loss: Loss, optimizer: optax.GradientTransformation) -> "Step":
    """Returns the function that performs one training step.

    A step may have several batches. Its gradient is that of the mean over all their
    target tokens, as if they were one large batch.

    If the loss or the norm of the gradient is not finite, the adapter and the optimizer
    stay unchanged, and only `step` and `skipped` are increased.

    If only the new adapter is not finite, the old adapter is kept. The old state of the
    optimizer is not kept, because a state in host memory has been updated in place. Do
    not continue training from the returned state: resume from an earlier one, with a
    smaller learning rate.

    If the state has a `LossScale`, the mean loss of each batch is multiplied by it, and
    the gradient is divided by it. Every step then also updates the loss scale.

    Args:
        loss: A function of the lora tree, the base tree, a batch and a PRNG key. It
            returns the sum of the losses of the target tokens, the number of target
            tokens, and optionally a dict of metrics, each a sum and its count.
        optimizer: The optimizer. Its state may be in host memory (`ql.optim.offload`).

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from qlora_jax.llm import train
        >>> def loss(lora, base, batch, key):
        ...     return jnp.sum((lora["w"] - batch) ** 2), batch.size
        >>> state = train.State.create({"w": jnp.zeros(())}, optax.sgd(0.5), seed=0)
        >>> step = train.make_step(loss, optax.sgd(0.5))
        >>> state, report = step(state, {}, [jnp.ones(3), 5 * jnp.ones(1)])
        >>> float(state.lora["w"]), float(report.loss)
        (2.0, 7.0)
    """
    return Step(loss, optimizer)


@dataclass(frozen=True, eq=False)
class Step:
    """The function that performs one training step: see `make_step`."""

    loss: Loss
    optimizer: optax.GradientTransformation

    def __call__(
        self, state: State, base: PyTree, batches: Sequence[PyTree]
    ) -> tuple[State, Report]:
        """Returns the state after a step, and a `Report`.

        Raises:
            ValueError: If there are no batches.
        """
        if len(batches) == 0:  # may also be a stack of batches in an array
            raise ValueError("`batches` must have a batch. Got none.")
        add_batch, finish = self._programs_for(state)
        sums = counts = None
        if isinstance(self.loss, SumOfMeans) and len(batches) > 1:
            counts = sum(map(jax.jit(self.loss.count), batches))
        *first_batches, last_batch = enumerate(batches)
        for index, batch in first_batches:
            sums = add_batch(sums, state, base, batch, np.int32(index), counts)
        index, batch = last_batch
        return finish(sums, state, base, batch, np.int32(index), counts)

    def lower(self, state: State, base: PyTree, batch: PyTree) -> jax.stages.Lowered:
        """Lowers the program of a step of one batch, as `jax.jit(...).lower` does.

        From shapes with shardings, it may be for devices that this machine lacks.
        """
        _, finish = self._programs_for(state)
        return finish.lower(None, state, base, batch, np.int32(0))

    def _programs_for(self, state: State) -> Programs:
        # States of the same shardings and structure share compiled programs.
        leaves, structure = jax.tree.flatten(state)
        is_sharded = mesh_of(state) is not None
        shardings = tuple(x.sharding for x in leaves) if is_sharded else None
        key = shardings, structure
        if key not in self._programs:
            self._programs[key] = self._make_programs(shardings, structure)
        return self._programs[key]

    @functools.cached_property
    def _programs(self) -> dict[tuple, Programs]:
        return {}

    def _make_programs(self, shardings: tuple | None, structure: Any) -> Programs:
        sum_shardings = result_shardings = None
        # On a mesh, results get the shardings of the arguments. If the partitioner
        # chose different ones, the next step would have to be compiled again.
        if shardings is not None:
            state_shardings = jax.tree.unflatten(structure, shardings)
            # The partitioner chooses the shardings that are None.
            sum_shardings = _Sums(None, None, state_shardings.lora, None)  # type: ignore
            result_shardings = state_shardings, None
        add_batch = jax.jit(
            self._add_batch, donate_argnums=0, out_shardings=sum_shardings
        )
        finish = jax.jit(self._finish, donate_argnums=1, out_shardings=result_shardings)
        return add_batch, finish

    def _add_batch(self, sums, state, base, batch, index, counts=None) -> _Sums:
        """Adds the losses and gradients of batch number `index` of a step.

        `counts` are the numbers of a `SumOfMeans` in all batches of the step. If there
        is only this batch, they are None.
        """
        # A resumed run derives the same dropout key for each batch of each step.
        step_key = jax.random.fold_in(state.key, state.step)
        dropout_key = jax.random.fold_in(step_key, index)
        loss_scale = state.loss_scale

        def scaled_loss(lora):
            total, count, *metrics = self.loss(lora, base, batch, dropout_key)
            # The loss may return no metrics: then `dict(*metrics)` is empty.
            count, metrics = jnp.asarray(count, jnp.float32), dict(*metrics)
            weighted_total = total
            if isinstance(self.loss, SumOfMeans):
                # `_update` divides by the first number, so the sums of the other means
                # are weighted to be divided by their own numbers.
                numbers = count if counts is None else counts
                weighted_total = jnp.sum(total * (numbers[0] / jnp.maximum(numbers, 1)))
            if loss_scale is None:
                return weighted_total, (total, count, 1.0, metrics)
            # Scale the mean loss, for which the initial loss scale is meant. The
            # gradient of the sum is larger, and would overflow more often.
            factor = loss_scale.scale / jnp.maximum(_first(count), 1)
            return weighted_total * factor, (total, count, factor, metrics)

        gradient = jax.grad(scaled_loss, has_aux=True)
        grads, (total, count, factor, metrics) = gradient(state.lora)
        if loss_scale is not None:
            # Divide in float32, because float16 may not represent the factor.
            grads = jax.tree.map(lambda g: (g / factor).astype(g.dtype), grads)
        batch_sums = _Sums(total, count, grads, metrics)
        return batch_sums if sums is None else jax.tree.map(jnp.add, sums, batch_sums)

    def _finish(
        self, sums, state, base, batch, index, counts=None
    ) -> tuple[State, Report]:
        """Adds the last batch of a step, and updates the adapter."""
        sums = self._add_batch(sums, state, base, batch, index, counts)
        return _update(self.optimizer, sums, state)


def _update(
    optimizer: optax.GradientTransformation, sums: _Sums, state: State
) -> tuple[State, Report]:
    # Divide once, at the end: in a mean of batch means, the weight of a token would
    # depend on the size of its batch.
    total, numbers, grads, metrics = sums
    num_losses = _first(numbers)
    grads = jax.tree.map(lambda g: (g / num_losses).astype(g.dtype), grads)
    mean, norm = jnp.sum(total / numbers), optax.tree.norm(grads)
    # The old state is donated, so an update must be skipped inside this program.
    skip = ~_all_finite([mean, norm])
    # `ql.optim.offload` takes `skip` too: its state cannot be selected here, because
    # `jnp.where` does not accept arrays in host memory.
    tx = optax.with_extra_args_support(optimizer)
    updates, opt_state = tx.update(grads, state.opt_state, state.lora, skip=skip)

    def select(new: jax.Array, old: jax.Array) -> jax.Array:
        is_on_host = jax.typeof(new).memory_space == jax.memory.Space.Host
        return new if is_on_host else jnp.where(skip, old, new)

    updates = jax.tree.map(select, updates, jax.tree.map(jnp.zeros_like, updates))
    opt_state = jax.tree.map(select, opt_state, state.opt_state)
    lora = optax.apply_updates(state.lora, updates)
    # Finite gradients can still overflow the new adapter.
    is_finite = _all_finite([mean, norm, *jax.tree.leaves(lora)])
    lora = jax.tree.map(functools.partial(jnp.where, is_finite), lora, state.lora)
    skipped = state.skipped + skip.astype(jnp.int32)
    means = {name: x / n for name, (x, n) in metrics.items()}
    loss_scale = state.loss_scale
    if loss_scale is not None:
        means["loss_scale"] = loss_scale.scale
        loss_scale = loss_scale.update(~skip)
    new_state = State(state.step + 1, skipped, lora, opt_state, state.key, loss_scale)
    return new_state, Report(mean, norm, num_losses, is_finite, means)


def _first(numbers: Float[Array, "*means"]) -> Float[Array, ""]:
    return numbers if numbers.ndim == 0 else numbers[0]


def _all_finite(arrays: Sequence[jax.Array]) -> Bool[Array, ""]:
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in arrays]).all()
