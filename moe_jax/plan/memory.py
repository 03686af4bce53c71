"""Where the bytes of one GPU go, before anything is compiled: state, stash, workspace, cache.

What the program holds from end to end follows from shapes and the schedule's table; what it needs
beside that while it runs is `workspace`'s to say. Knows sizes and tables; must not know time.
"""

import dataclasses
import functools

from moe_jax.config import Config, Pipeline
from moe_jax.pipeline import segments
from moe_jax.pipeline.schedules import SCHEDULES
from moe_jax.pipeline.table import Table
from moe_jax.plan import saving, steps, units, workspace
from moe_jax.plan.leaves import DTYPE_BYTES, FLOAT32_BYTES, leaves

_INT_BYTES = 4
_INPUT_ARRAYS = 5  # tokens, targets, positions, segments, weights


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one GPU; the names are those of the rehearsal's report where it has them.

  Attributes:
    parameters: master weights, float32, split over `expert` and `data` too; in serving 0.
    optimizer: two moments, as the master weights.
    inputs: the step's tokens, targets, positions, segments and weights.
    gradients: sums over micro-batches.
    compute_copies: weights that are not as the optimizer holds them: gathered, or in the compute
      dtype; of streamed ones the layers that are gathered ahead.
    stash: what units in flight saved.
    buffers: activations and cotangents that wait for another stage.
    kv_cache: keys and values of sequences being served.
    workspace: what comes and goes in a step, where most of it is there.
    peak_unit: where that is.
  """

  parameters: int
  optimizer: int
  inputs: int
  gradients: int
  compute_copies: int
  stash: int
  buffers: int
  kv_cache: int
  workspace: int
  peak_unit: str

  @property
  def activations_and_buffers(self) -> int:
    return self.stash + self.buffers + self.kv_cache + self.workspace

  @property
  def total(self) -> int:
    return (
      self.parameters
      + self.optimizer
      + self.inputs
      + self.gradients
      + self.compute_copies
      + self.activations_and_buffers
    )


def table(pipeline: Pipeline, stages: int) -> Table:
  """Returns the schedule's table; the same object for the same sizes, for what follows is kept."""
  return _table(pipeline.schedule, stages, pipeline.micro_batches, pipeline.chunks)


@functools.lru_cache(maxsize=1024)
def _table(schedule: str, stages: int, micro_batches: int, chunks: int) -> Table:
  return SCHEDULES[schedule](stages, micro_batches, chunks)


def train(settings: Config) -> Memory:
  """Returns the memory of a training step."""
  model, mesh, held = settings.model, settings.mesh, leaves(settings.model)
  at = steps.sizes(settings)
  state = sum(leaf.state_elements(mesh) for leaf in held) * FLOAT32_BYTES
  elements = sum(leaf.elements(mesh) for leaf in held)
  schedule = table(settings.pipeline, mesh.stage)
  # Gradients that leave beside ticks, summed.
  left = sum(leaf.state_elements(mesh) for leaf in held if leaf.is_by_layer(mesh))
  left *= bool(segments.units(schedule)["leaves"].any())
  activation = at.tokens * model.d_model * at.dtype_bytes
  kept = saving.saved_bytes(settings, at) - saving.merged_bytes(settings, at)
  # Between ticks: what waits in inboxes, what was made, and what the head reads where it arrived.
  num_activations = schedule.num_inbox_slots + schedule.num_cotangent_slots + 1
  num_activations += mesh.stage > 1 and not schedule.head_needs_broadcast
  needed, peak_unit = workspace.train(settings, at, schedule)
  return Memory(
    parameters=state,
    optimizer=2 * state,
    inputs=_INPUT_ARRAYS * _INT_BYTES * settings.train.batch // mesh.sequence_shares * at.positions,
    gradients=elements * DTYPE_BYTES[settings.pipeline.gradient_dtype],
    compute_copies=sum(workspace.copy_bytes(settings, leaf) for leaf in held),
    stash=schedule.peak_in_flight * units.layers_per_unit(settings) * kept,
    buffers=num_activations * activation + left * DTYPE_BYTES[settings.pipeline.gradient_dtype],
    kv_cache=0,
    workspace=needed,
    peak_unit=peak_unit,
  )


def serve(settings: Config, sequences: int, cache_tokens: int, prompt_tokens: int) -> Memory:
  """Returns the memory of serving: weights, cache, and the workspace of a prefill's forward pass.

  Args:
    settings: the deployment; train.batch and train.sequence are those of a prefill.
    sequences: held in the cache, over the whole mesh.
    cache_tokens: of each.
    prompt_tokens: of each, in a prefill.
  """
  model, mesh = settings.model, settings.mesh
  at = steps.sizes(settings, positions=prompt_tokens)
  heads = model.kv_heads // mesh.tensor
  per_token = model.layers // mesh.stage * heads * steps.cached_bytes(settings)
  held = -(-sequences // mesh.sequence_shares)
  activation = at.tokens * model.d_model * at.dtype_bytes
  arrived, hidden = saving.row_bytes(settings, at)
  return Memory(
    parameters=0,
    optimizer=0,
    inputs=_INT_BYTES * held * cache_tokens,
    gradients=0,
    compute_copies=weight_bytes(settings),
    stash=0,
    buffers=2 * activation,
    kv_cache=held * cache_tokens * per_token,
    workspace=3 * arrived + 3 * hidden + 3 * mesh.tensor * activation,
    peak_unit="forward",
  )


def weight_bytes(settings: Config) -> int:
  """Returns the bytes of all weights as the computation takes them."""
  dtype = DTYPE_BYTES[settings.model.dtype]
  return sum(
    leaf.elements(settings.mesh) * (FLOAT32_BYTES if leaf.is_float32 else dtype)
    for leaf in leaves(settings.model)
  )
