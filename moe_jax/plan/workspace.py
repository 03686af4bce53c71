"""What a training step holds at its most demanding point, beside what it holds from end to end.

Three points can be that: the layers of a tick, its head, and the border between two loops of ticks.
Each is a sum of named arrays. Which of them are alive together is read off XLA's buffer assignment
for described H100s (`python -m tests.plan.agreement memory` compares); the three constants below
are of all configurations alike. Knows sizes and tables; must not know time.

XLA:GPU splits products too small to fill the chip and holds their partial sums, and packs buffers
with gaps. Neither is modelled: of small programs it is several percent.
"""

import dataclasses
import math

from moe_jax.config import Config
from moe_jax.pipeline.table import Table
from moe_jax.plan import cost, saving, units
from moe_jax.plan.leaves import DTYPE_BYTES, FLOAT32_BYTES, Leaf, leaves
from moe_jax.plan.steps import Sizes, activation_bytes, logits_bytes, vocabulary

# As model.flash: positions of a block, and the narrowest head that it multiplies.
FLASH_BLOCK, FLASH_NARROWEST = 64, 16
# Cotangents on their way through the experts, in rows with their hidden units; where all was kept,
# what is used up makes room for them.
_COTANGENTS = {"inputs": 0.6, "residuals": 0.6, "everything": 0.0}
# Rows and hidden units in blocks that the loop over further rounds of a dropless dispatch holds.
_FURTHER_ROUND = 5


def train(settings: Config, at: Sizes, table: Table) -> tuple[int, str]:
  """Returns the bytes of the most demanding point of a step, and its name.

  Args:
    settings: the deployment.
    at: sizes of a micro-batch on one device.
    table: the schedule.
  """
  points = {
    "backward": _layers(settings, at, table),
    "head": _head(settings, at),
    "between loops": _between(settings, at, table),
  }
  peak = max(points, key=points.get)
  return int(points[peak]), peak


def copy_bytes(settings: Config, leaf: Leaf) -> int:
  """Returns the bytes of a weight as the computation takes it, where that is not the optimizer's
  own array.
  """
  mesh, dtype = settings.mesh, DTYPE_BYTES[settings.model.dtype]
  is_cast = not leaf.is_float32 and dtype != FLOAT32_BYTES
  is_gathered = mesh.expert > 1 and leaf.is_zero_split(mesh)
  if not is_cast and not is_gathered:
    return 0
  return leaf.elements(mesh) * (FLOAT32_BYTES if leaf.is_float32 else dtype)


def _layers(settings: Config, at: Sizes, table: Table) -> float:
  """A backward layer, with what its saving policy makes again, and a forward layer beside it."""
  save = settings.pipeline.save
  rows = sum(saving.row_bytes(settings, at))
  is_beside = bool(
    ((table.forward_micro_QZ >= 0).any(1) & (table.backward_micro_QZ >= 0).any(1)).any()
  )
  # The forward layer's own is written to the stash when it is through.
  ahead = rows if save == "inputs" else saving.saved_bytes(settings, at)
  found = _COTANGENTS[save] * rows + is_beside * ahead + _sliced_weights(settings)
  if settings.mesh.num_devices == 1:
    # With nothing to hide XLA schedules for little memory, and reads the stash when it must.
    found += rows
  else:
    found += _all_saved(settings, at)
  if settings.moe.dispatch in cost.EVERY_ASSIGNMENT:
    found += _FURTHER_ROUND * sum(saving.placed_bytes(settings, at))
  if settings.pipeline.chunks == 1:
    # A head in every backward tick is no branch, and the gradient of its weights waits.
    found += logits_bytes(settings, at)
  return found + _padded_heads(settings, at, is_beside)


def _all_saved(settings: Config, at: Sizes) -> int:
  pipeline = dataclasses.replace(settings.pipeline, save="everything")
  return saving.saved_bytes(dataclasses.replace(settings, pipeline=pipeline), at)


def _sliced_weights(settings: Config) -> int:
  """One layer's gradient of the experts' weights, before it is added to those of all layers."""
  model, mesh = settings.model, settings.mesh
  if model.layers == mesh.stage:
    return 0
  experts, hidden = model.experts // mesh.expert, model.expert_hidden // mesh.tensor
  return 3 * experts * model.d_model * hidden * FLOAT32_BYTES


def _padded_heads(settings: Config, at: Sizes, is_beside: bool) -> int:
  """Arrays of queries' size that attention's kernels pad: of the backward kernel four that go in
  and three that come out, or of two forward kernels, one run again, four each.
  """
  model, tensor = settings.model, settings.mesh.tensor
  positions = -(-at.positions // FLASH_BLOCK) * FLASH_BLOCK
  width = max(FLASH_NARROWEST, 1 << (model.head_dim - 1).bit_length())
  if (positions, width) == (at.positions, model.head_dim):
    return 0
  number = 8 if is_beside and settings.pipeline.save == "inputs" else 7
  each = at.sequences * positions * model.heads // tensor * width
  return number * each * at.dtype_bytes


def _head(settings: Config, at: Sizes) -> float:
  """Logits and their gradient, and the gathered positions."""
  mesh, pipeline = settings.mesh, settings.pipeline
  activation = activation_bytes(settings, at)
  found = 2 * logits_bytes(settings, at) + mesh.tensor * activation + 3 * activation
  if mesh.stage * pipeline.chunks == 1:
    # Every backward tick has a head: XLA moves the transposed copy of its weights out of the loop.
    found += settings.model.d_model * vocabulary(settings) * at.dtype_bytes
  if units.layers_per_unit(settings) == 1 and pipeline.save != "inputs":
    # A chunk of one layer is no loop, and what its backward unit reads is read before the head.
    found += saving.saved_bytes(settings, at)
  return found


def _between(settings: Config, at: Sizes, table: Table) -> float:
  """A copy of all rows that arrived: the next loop of ticks wants them in another order.

  Those of several experts come out of the gather over `tensor` with the experts innermost, and
  XLA lays the stash out likewise until a loop multiplies them. No token is embedded any more.
  """
  model, mesh, moe = settings.model, settings.mesh, settings.moe
  has_experts = model.experts > mesh.expert and mesh.tensor > 1
  is_gathered_last = moe.dispatch == "capacity" and moe.exchange != "flat"
  if settings.pipeline.save == "inputs" or not has_experts or not is_gathered_last:
    return -math.inf
  arrived, _ = saving.row_bytes(settings, at)
  embedding = next(leaf for leaf in leaves(model) if leaf.name == "embedding")
  stashed = table.peak_in_flight * units.layers_per_unit(settings) * arrived
  return stashed - copy_bytes(settings, embedding)
