"""What a training step holds while it runs, beside what it holds from end to end.

Arrays that come and go, packed as XLA packs them: those of head and layers in a tick, and of the
border between two loops of ticks. Which of them are there together is read off XLA's buffer
assignment for described H100s (`python -m tests.plan.agreement memory` compares); the constants
here and in `layer_arrays` are of all configurations alike. Knows sizes and tables; must not know
time.
"""

from moe_jax.config import Config
from moe_jax.pipeline import segments
from moe_jax.pipeline.table import Table
from moe_jax.plan import saving, units
from moe_jax.plan.layer_arrays import LayerArrays, Moment
from moe_jax.plan.leaves import DTYPE_BYTES, FLOAT32_BYTES, Leaf, leaves
from moe_jax.plan.packing import Array, alive_bytes, packed_bytes
from moe_jax.plan.steps import Sizes, activation_bytes, logits_bytes, vocabulary

# Counters, addresses and rows of the table, of each time that a layer's code stands in the program.
SMALL_BYTES = 12 * 1024
_BORDER = (Moment.BETWEEN, Moment.HEAD)  # of two ticks
_PEAK = {Moment.HEAD: "head", Moment.BETWEEN: "between loops"}


def train(settings: Config, at: Sizes, table: Table) -> tuple[int, str]:
  """Returns the bytes of what comes and goes in a step, and where most of it is there.

  Args:
    settings: the deployment.
    at: sizes of a micro-batch on one device.
    table: the schedule.
  """
  runs = segments.units(table)
  ticks = {
    "alone": runs["backward"] & ~runs["forward"],
    "beside": runs["backward"] & runs["forward"],
  }
  found = [
    [
      *_layers(settings, at, kind),
      # A head in every tick is no branch, and the gradient of its weights waits.
      *_head(settings, at, waits=bool((table.head_micro_Q[at_Q] >= 0).all())),
      *_between(settings, at, table),
      # What the next backward unit begins with, read when the one before is through.
      *[Array(saving.saved_bytes(settings, at), each, each) for each in _BORDER],
    ]
    for kind, at_Q in ticks.items()
    if at_Q.any()
  ]
  packed = [packed_bytes(arrays) for arrays in found]
  most = found[packed.index(max(packed))]
  peak = max(Moment, key=lambda moment: alive_bytes(most, moment))
  needed = max(packed) + _small_bytes(settings, table)
  return needed, _PEAK.get(peak, "backward")


def copy_bytes(settings: Config, leaf: Leaf) -> int:
  """Returns the bytes of a weight as the computation takes it, where that is not the optimizer's
  own array.
  """
  mesh, dtype = settings.mesh, DTYPE_BYTES[settings.model.dtype]
  is_cast = not leaf.is_float32 and dtype != FLOAT32_BYTES
  share = is_cast * leaf.state_elements(mesh) * dtype
  if leaf.is_streamed(settings):
    return share + _ring_bytes(settings, leaf)
  if leaf.is_by_layer(mesh) and settings.pipeline.chunks > 1:
    return share + leaf.elements(mesh) * dtype
  if not is_cast and not leaf.shares(mesh).axes:
    return 0
  # Loops read it turned round again, ticks outside of loops as it was gathered.
  copies = 2 if leaf.is_turned(mesh) else 1
  return copies * leaf.elements(mesh) * (FLOAT32_BYTES if leaf.is_float32 else dtype)


def _ring_bytes(settings: Config, leaf: Leaf) -> int:
  """Returns the bytes of a streamed weight in the layers gathered ahead, for both directions."""
  of_layer = leaf.elements(settings.mesh) * settings.mesh.stage // settings.model.layers
  return 2 * settings.pipeline.prefetch_layers * of_layer * DTYPE_BYTES[settings.model.dtype]


def _layers(settings: Config, at: Sizes, kind: str) -> list[Array]:
  layers = LayerArrays(settings, at)
  if settings.mesh.num_devices == 1:
    return layers.on_one_device(kind == "beside")
  return layers.beside() if kind == "beside" else layers.alone()


def _head(settings: Config, at: Sizes, waits: bool) -> list[Array]:
  """Logits and, in the compute dtype, their gradient; and the gathered positions."""
  mesh = settings.mesh
  logits, activation = logits_bytes(settings, at), activation_bytes(settings, at)
  gradient = logits // FLOAT32_BYTES * at.dtype_bytes
  last = Moment.ATTENTION if waits else Moment.HEAD
  found = [
    Array(logits, Moment.HEAD, Moment.HEAD),
    Array(gradient, Moment.HEAD, last),
    Array(mesh.tensor * activation, Moment.HEAD, last),
    Array(3 * activation, Moment.HEAD, Moment.HEAD),
  ]
  if mesh.stage * settings.pipeline.chunks == 1:
    # XLA moves the transposed copy of its weights out of a loop that has a head in every tick.
    weights = settings.model.d_model * vocabulary(settings) * at.dtype_bytes
    found.append(Array(weights, Moment.HEAD, Moment.ATTENTION))
  return found


def _small_bytes(settings: Config, table: Table) -> int:
  """Each loop of ticks has the layer's code once, or in the loop over a chunk's layers and behind
  it.
  """
  loops = len(list(segments.segments(table)))
  return loops * min(2, units.layers_per_unit(settings)) * SMALL_BYTES


def _between(settings: Config, at: Sizes, table: Table) -> list[Array]:
  """A copy of all rows that arrived: the next loop of ticks wants them in another order.

  Those of several experts come out of the gather over `tensor` with the experts innermost, and
  XLA lays the stash out likewise until a loop multiplies them. No token is embedded any more.
  """
  model, mesh, moe = settings.model, settings.mesh, settings.moe
  has_experts = model.experts > mesh.expert and mesh.tensor > 1
  is_gathered_last = moe.dispatch == "capacity" and moe.exchange != "flat"
  if settings.pipeline.multiplies_again or not has_experts or not is_gathered_last:
    return []
  arrived, _ = saving.row_bytes(settings, at)
  embedding = next(leaf for leaf in leaves(model) if leaf.name == "embedding")
  stashed = table.peak_in_flight * units.layers_per_unit(settings) * arrived
  copied = max(0, stashed - copy_bytes(settings, embedding))
  return [Array(copied, Moment.BETWEEN, Moment.BETWEEN)]
