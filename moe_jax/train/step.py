"""One optimizer step: the manual region opened once, and around it, under `jit`, the optimizer.

Inside the region a device runs the pipeline on its own share and sums each gradient once, into the
part of the optimizer state that it holds (ZeRO-1). Knows the model's functions, the schedule and
the optimizer; must not know data, files or the loop.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.model import transformer
from moe_jax.model.transformer import Inputs, Parameters
from moe_jax.moe import router
from moe_jax.moe.layer import Report
from moe_jax.parallel import collectives, messages, sharding
from moe_jax.parallel.axes import ALL, STAGE, TOKENS
from moe_jax.pipeline import executor
from moe_jax.pipeline.reduction import completed
from moe_jax.pipeline.schedules import SCHEDULES, forward_only
from moe_jax.pipeline.table import Table, check
from moe_jax.train import router_bias, streaming
from moe_jax.train.state import State


class Losses(NamedTuple):
  """What the forward passes of a step found, summed over devices.

  Attributes:
    cross_entropy: mean over weighted targets, nats per token, float32.
    total: with the weighted auxiliary losses.
    auxiliary: each auxiliary loss of each layer, unweighted, leaves [L], likewise.
    report: the layers' reports, leaves [L, ...] in the pipeline's placement, summed over
      micro-batches.
    ticks: of the schedule, as executed.
  """

  cross_entropy: jax.Array
  total: jax.Array
  auxiliary: router.Losses
  report: Report
  ticks: jax.Array


class Metrics(NamedTuple):
  """What a training step reports.

  Attributes:
    losses: of the parameters that it began with.
    gradient_norm: before clipping, float32.
    is_finite: whether loss and gradient are, and so whether the parameters changed.
    skipped_steps: as in the State that it leaves.
    skipped_in_a_row: likewise.
  """

  losses: Losses
  gradient_norm: jax.Array
  is_finite: jax.Array
  skipped_steps: jax.Array
  skipped_in_a_row: jax.Array


def inputs_spec() -> Inputs:
  """Returns the PartitionSpec of a batch: leaves [U, B / U, S], sequences over `data` and
  `expert`."""
  return Inputs(*[sharding.spec(("micro_batches", "sequences", "positions"))] * len(Inputs._fields))


def table(settings: config.Config) -> Table:
  """Returns the schedule of the deployment, proved legal."""
  pipeline = settings.pipeline
  schedule = SCHEDULES[pipeline.schedule](
    settings.mesh.stage, pipeline.micro_batches, pipeline.chunks
  )
  check(schedule)
  return schedule


def loss_and_gradients(settings: config.Config, mesh: Mesh) -> Callable:
  """Returns (parameters, inputs) -> (Losses, gradients as Parameters, their global norm).

  Parameters come in the compute dtype, laid out by `streaming.specs`; gradients leave in float32,
  in the shares of ZeRO-1 (`sharding.zero_spec`). Until then they are summed whole on every device,
  of streamed weights too.

  Communication: the pipeline's; then each gradient that it has not summed, once: into its shares as
  `streaming.remaining` does, and all-reduces over the other axes on which the parameter is
  replicated. Then losses and norm in one all-reduce over all axes, and what layers report in one
  over those of tokens.
  """
  specs = transformer.specs(settings.model)
  shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), settings.model))
  gradient_specs = jax.tree.map(lambda s, a: sharding.zero_spec(s, a.shape, mesh), specs, shapes)
  functions = transformer.loss_functions(settings)
  schedule = table(settings)
  to_weights = streaming.to_weights(settings, mesh)
  summed = streaming.summed(settings, mesh)
  to_shared = streaming.to_shared(settings, mesh)

  def region(parameters: Parameters, inputs: Inputs):
    layers, shared = collectives.varying(parameters)
    result = executor.run(
      functions, schedule, to_weights(layers), to_shared(shared), inputs,
      save=settings.pipeline.save, gradient_dtype=jnp.dtype(settings.pipeline.gradient_dtype),
      summed=summed,
    )  # fmt: skip
    gradients = _reduce(settings, mesh, result, specs, shapes)
    squares = jax.tree.map(functools.partial(_squares, mesh), gradients, gradient_specs)
    losses, squares = _sum_losses(result, sum(jax.tree.leaves(squares)))
    return losses, gradients, jnp.sqrt(squares)

  in_specs = (streaming.specs(settings, mesh), inputs_spec())
  out_gradients = jax.tree.map(lambda s: sharding.with_axes_of_one(s, mesh), gradient_specs)
  return jax.shard_map(
    region, mesh=mesh, in_specs=in_specs, out_specs=(_losses_spec(), out_gradients, P())
  )


def evaluate(settings: config.Config, mesh: Mesh) -> Callable:
  """Returns (parameters, inputs) -> Losses, by the forward-only schedule."""
  functions = transformer.loss_functions(settings)
  schedule = forward_only(table(settings))

  def region(parameters: Parameters, inputs: Inputs) -> Losses:
    layers, shared = collectives.varying(parameters)
    (losses,) = _sum_losses(executor.run(functions, schedule, layers, shared, inputs))
    return losses

  return jax.shard_map(
    region, mesh=mesh, in_specs=(transformer.specs(settings.model), inputs_spec()),
    out_specs=_losses_spec(),
  )  # fmt: skip


def train_step(
  settings: config.Config, mesh: Mesh, optimizer: optax.GradientTransformationExtraArgs
):
  """Returns (State, inputs) -> (State, Metrics), to be jitted with the state donated.

  A step whose loss or gradient is not finite leaves parameters and optimizer as they were and is
  counted.
  """
  gradients_of = loss_and_gradients(settings, mesh)
  to_compute = compute_parameters(settings, mesh, streaming.specs(settings, mesh))

  def step(state: State, inputs: Inputs) -> tuple[State, Metrics]:
    computed = to_compute(state.parameters)
    losses, gradients, norm = gradients_of(computed, normalised(inputs))
    is_finite = jnp.isfinite(losses.total) & jnp.isfinite(norm)
    with jax.named_scope("optimizer"):
      updates, optimizer_state = optimizer.update(
        gradients, state.optimizer, state.parameters, norm=norm
      )
      parameters = optax.apply_updates(state.parameters, updates)
      parameters = router_bias.moved(settings.moe, parameters, computed, losses.report)
      keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, old)
      skipped = 1 - is_finite.astype(jnp.int32)
      state = State(
        step=state.step + 1,
        parameters=keep(parameters, state.parameters),
        optimizer=keep(optimizer_state, state.optimizer),
        skipped_steps=state.skipped_steps + skipped,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
      )
    skips = (state.skipped_steps, state.skipped_in_a_row)
    return state, Metrics(losses, norm, is_finite, *skips)

  return step


def evaluate_step(settings: config.Config, mesh: Mesh) -> Callable:
  """Returns (State, inputs) -> Losses, to be jitted."""
  evaluate_region, to_compute = evaluate(settings, mesh), compute_parameters(settings, mesh)
  return lambda state, inputs: evaluate_region(to_compute(state.parameters), normalised(inputs))


def compute_parameters(
  settings: config.Config, mesh: Mesh, specs: Parameters | None = None
) -> Callable[[Parameters], Parameters]:
  """Returns the function from master weights (float32, split by ZeRO-1) to the region's parameters.

  Args:
    settings: the deployment.
    mesh: that they lie on.
    specs: as they are to lie there; default whole, by `transformer.specs`.

  Communication: all-gather over the axes of its shares, in the compute dtype, of what ZeRO-1 splits
  and `specs` does not.
  """
  held = transformer.specs(settings.model)
  specs = specs or held
  dtype = jnp.dtype(settings.model.dtype)
  place = lambda leaf, s: jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, s))

  def convert(parameters: Parameters) -> Parameters:
    split = lambda leaf, s: place(leaf, sharding.zero_spec(s, leaf.shape, mesh))
    # Placed as the masters lie, or XLA gathers float32 and converts what it gathered; and behind a
    # barrier, or it moves the conversion there again.
    parameters = jax.tree.map(split, transformer.cast(parameters, dtype), held)
    return jax.tree.map(place, jax.lax.optimization_barrier(parameters), specs)

  return convert


def normalised(inputs: Inputs) -> Inputs:
  """Returns `inputs` with target weights that sum to 1 over the whole step."""
  weights = inputs.weights_bS
  return inputs._replace(weights_bS=weights / jnp.maximum(weights.sum(), 1.0))


def _losses_spec() -> Losses:
  return Losses(cross_entropy=P(), total=P(), auxiliary=P(STAGE), report=P(STAGE), ticks=P())


def _sum_losses(result: executor.Result, *more: jax.Array) -> tuple:
  """Returns the Losses, and of scalars the sums over all devices, which travel with them."""
  mine = jnp.stack([result.loss, result.auxiliary_loss, *more])
  cross_entropy, auxiliary_loss, *sums = jax.lax.psum(mine, ALL)
  auxiliary, report = messages.sum_few((result.auxiliary, result.reports), TOKENS)
  total = cross_entropy + auxiliary_loss
  return Losses(cross_entropy, total, auxiliary, report, result.ticks), *sums


def _squares(mesh: Mesh, gradient: jax.Array, spec: P) -> jax.Array:
  """Returns this device's share of the sum of the gradient's squares: devices may hold the same."""
  alike = math.prod(mesh.shape[name] for name in sharding.replicated_axes(spec))
  return collectives.varying(jnp.sum(jnp.square(gradient)) / alike)


def _reduce(
  settings: config.Config,
  mesh: Mesh,
  result: executor.Result,
  specs: Parameters,
  shapes: Parameters,
) -> Parameters:
  """Returns the gradients in float32, summed over the axes on which the parameters are replicated,
  those that the pipeline left together.
  """
  remaining = streaming.remaining(settings, mesh)
  left, gradients = remaining.of_tree((result.left, Parameters(*result.gradients)))
  layers = completed(streaming.summed(settings, mesh), gradients.layers, left)

  def over_the_rest(gradient, spec, shape):
    taken = sharding.shares(spec, shape.shape, mesh).axes
    alike = sharding.replicated_axes(spec)
    axes = tuple(name for name in alike if name not in taken and mesh.shape[name] > 1)
    gradient = jax.lax.psum(gradient, axes) if axes else gradient
    return gradient.astype(jnp.float32)

  return jax.tree.map(over_the_rest, gradients._replace(layers=layers), specs, shapes)
