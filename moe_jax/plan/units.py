"""What each unit of a tick, and what stands before and after the ticks, is made of.

Knows the layer's phases and the parameters' shapes; must not know time, links or schedules.
"""

import dataclasses

from moe_jax.config import Config
from moe_jax.plan import phases
from moe_jax.plan.leaves import DTYPE_BYTES, FLOAT32_BYTES, leaves
from moe_jax.plan.links import AXES
from moe_jax.plan.steps import (
  BACKWARD,
  Sizes,
  Step,
  activation_bytes,
  gather_over,
  logits_bytes,
  sizes,
  sum_over,
  vocabulary,
)

_FLOAT32 = FLOAT32_BYTES
_TOKENS = ("data", "expert", "tensor")  # that split the tokens of a micro-batch
_SEQUENCES = ("data", "expert")  # of these those that split its sequences
_STAGE = ("stage",)
# Times that a tick's begin reads or writes an activation; as its kernels, of pod64 and pod64_10b.
_MOVED = 16
# Numbers of a layer's report: counts, beside its assignments by expert, each in two floats, and
# losses.
COUNTS, LOSSES = 7, 2
# What nothing in its unit waits for: counts are the load-balancing loss's.
_COUNTED = "count over"
_REPORT = "sum the report"
NOT_WAITED_FOR = frozenset({*(f"{_COUNTED} {axis}" for axis in _TOKENS), _REPORT})


def unit(settings: Config, kind: str, at: Sizes | None = None) -> tuple[Step, ...]:
  """Returns the steps of one unit of a tick; of `forward` and `backward` those of one layer.

  Args:
    settings: the deployment.
    kind: of pipeline.table.KINDS.
    at: sizes of the micro-batch; by default those of training.
  """
  return _UNITS[kind](settings, at or sizes(settings))


def layers_per_unit(settings: Config) -> int:
  """Returns how many layers a forward or backward unit runs, one after the other."""
  return settings.model.layers // (settings.mesh.stage * settings.pipeline.chunks)


def transfer(settings: Config, name: str, at: Sizes | None = None) -> Step:
  """Returns the step that hands an activation, or its cotangent, to the next stage of the ring."""
  at = at or sizes(settings)
  return Step(
    name,
    "other",
    "collective-permute",
    axes=("stage",),
    operand_bytes=activation_bytes(settings, at),
  )


def tick(settings: Config) -> Step:
  """Returns what a tick begins with: rows of the table are read, and activations put where its
  units, and the loops round those that are not always due, take them from.
  """
  moved = _MOVED * activation_bytes(settings, sizes(settings))
  return Step("begin the tick", "other", num_bytes=moved, kernels=14)


def begin(settings: Config, share: float = 1.0, is_head_late: bool = False) -> tuple[Step, ...]:
  """Returns the steps before the first tick: master weights, split by ZeRO-1, to compute copies.

  Args:
    settings: the deployment.
    share: of those weights that may be gathered layer by layer, what is gathered here.
    is_head_late: whether the pipeline gathers the head's.
  """
  mesh, held = settings.mesh, leaves(settings.model)
  dtype = DTYPE_BYTES[settings.model.dtype]
  converted = sum(leaf.state_elements(mesh) for leaf in held) * (_FLOAT32 + dtype)
  turned = sum(
    leaf.elements(mesh) * (share if leaf.is_by_layer(mesh) else 1.0)
    for leaf in held
    if leaf.is_turned(mesh) and not leaf.is_streamed(settings)
  )
  # The first layers of both directions; the others are gathered beside those before them.
  ahead = 2 * settings.pipeline.prefetch_layers
  return (
    # Of the targets' weights, which are to sum to 1 over the step.
    Step("sum the weights", "other", "all-reduce", axes=_SEQUENCES, operand_bytes=_FLOAT32),
    Step("cast parameters", "other", num_bytes=converted, kernels=14),
    *_gathers(settings, share, is_head_late),
    *([Step("turn parameters", "other", num_bytes=2 * turned * dtype, kernels=2)] * bool(turned)),
    *[
      dataclasses.replace(step, name=f"{step.name} {number}")
      for step in phases.stream(settings)
      for number in range(ahead)
    ],
  )


def _gathers(settings: Config, share: float, is_head_late: bool) -> list[Step]:
  """Returns the gathers of parameters: XLA's over both axes of their shares at once, the region's
  over one after the other, `data` first.
  """
  mesh, dtype = settings.mesh, DTYPE_BYTES[settings.model.dtype]
  gathered = dict.fromkeys((_SEQUENCES, ("data",), ("expert",)), 0)
  mine = dict.fromkeys(_SEQUENCES, 0)
  for leaf in leaves(settings.model):
    axes, width = leaf.shares(mesh).axes, _FLOAT32 if leaf.is_float32 else dtype
    if not axes or leaf.is_streamed(settings):
      continue
    here = share if leaf.is_by_layer(mesh) else 1.0
    is_outside = leaf.phase in ("embed", "head") and not leaf.is_float32
    is_mine = is_outside and (mesh.data > 1 or (is_head_late and leaf.phase == "head"))
    if here == 1 and not is_mine:
      gathered[tuple(a for a in _SEQUENCES if a in axes)] += leaf.state_elements(mesh) * width
      continue
    for axis, elements in leaf.whole_elements(mesh).items():
      mine[axis] += elements // getattr(mesh, axis) * width * here
  return [
    *(
      Step(f"gather parameters over {'+'.join(axes)}", "other", "all-gather", axes=axes,
           operand_bytes=num_bytes)
      for axes, num_bytes in gathered.items()
      if num_bytes
    ),
    *(
      gather_over(f"gather the first parameters over {axis}", axis, mesh, num_bytes)
      for axis, num_bytes in mine.items()
      if num_bytes
    ),
  ]  # fmt: skip


def end(settings: Config, share: float = 1.0) -> tuple[Step, ...]:
  """Returns the steps after the last tick: gradients summed once, losses, norm, AdamW.

  Args:
    settings: the deployment.
    share: of those gradients that may be summed into shares layer by layer, what is summed here.
  """
  mesh, held = settings.mesh, leaves(settings.model)
  dtype = DTYPE_BYTES[settings.pipeline.gradient_dtype]
  scattered, summed, turned = {}, {}, 0.0
  for leaf in held:
    here = share if leaf.is_by_layer(mesh) else 1.0
    turned += leaf.is_turned(mesh) * leaf.elements(mesh) * here
    for axis, elements in leaf.whole_elements(mesh).items():
      scattered[axis] = scattered.get(axis, 0.0) + elements * here
    split = {*leaf.mesh_axes(), *leaf.shares(mesh).axes}
    axes = tuple(name for name in AXES if name not in split and getattr(mesh, name) > 1)
    if axes:
      summed[axes] = summed.get(axes, 0) + leaf.state_elements(mesh)
  state = sum(leaf.state_elements(mesh) for leaf in held)
  gradients = sum(leaf.elements(mesh) for leaf in held)
  report = settings.model.layers // mesh.stage * (2 * (settings.model.experts + COUNTS) + LOSSES)
  return (
    *(
      [Step("turn gradients", "other", part=BACKWARD, num_bytes=2 * turned * dtype, kernels=2)]
      * bool(turned)
    ),
    *(
      sum_over(f"scatter gradients over {axis}", axis, scattered[axis] * dtype)
      for axis in ("expert", "data")
      if axis in scattered
    ),
    *(
      Step(f"sum gradients over {'+'.join(axes)}", "other", "all-reduce", BACKWARD, axes, n * dtype)
      for axes, n in summed.items()
    ),
    # Two losses, and the squares of the gradient.
    Step("sum losses and norm", "other", "all-reduce", BACKWARD, AXES, 3 * _FLOAT32),
    Step(_REPORT, "other", "all-reduce", BACKWARD, _TOKENS, report * _FLOAT32),
    Step("zero and cast gradients", "other", num_bytes=3 * gradients * _FLOAT32, kernels=160),
    # Weights and two moments are read and written, the gradient read.
    Step("AdamW", "optimizer", num_bytes=6.5 * state * _FLOAT32, kernels=14),
  )  # fmt: skip


def _embed(settings: Config, at: Sizes) -> tuple[Step, ...]:
  gathered = at.sequences * at.positions * settings.model.d_model * at.dtype_bytes
  x = activation_bytes(settings, at)
  return (
    Step("look up", "embed", num_bytes=2 * gathered + x, kernels=2),
    Step("scatter lookup", "embed", "reduce-scatter", axes=("tensor",), operand_bytes=gathered),
    *_of_tied(settings, Step("sum lookup", "embed", "all-reduce", axes=_STAGE, operand_bytes=x)),
  )


def _of_tied(settings: Config, step: Step) -> tuple[Step, ...]:
  """Returns the step where the table is split over stages, as the head's kernel is."""
  return (step,) if settings.model.tied_embeddings else ()


def _embed_gradient(settings: Config, at: Sizes) -> tuple[Step, ...]:
  gathered = at.sequences * at.positions * settings.model.d_model * at.dtype_bytes
  rows = gathered / at.dtype_bytes * _FLOAT32
  x = activation_bytes(settings, at)
  broadcast = Step("broadcast cotangent", "embed", "all-reduce", BACKWARD, _STAGE, x)
  return (
    *_of_tied(settings, broadcast),
    Step("gather cotangent", "embed", "all-gather", BACKWARD, ("tensor",), x),
    Step("add to table", "embed", part=BACKWARD, num_bytes=gathered + 2 * rows, kernels=2),
  )


def broadcast(settings: Config, at: Sizes | None = None) -> Step:
  """Returns the step that brings a finished micro-batch to all stages, where the head needs it."""
  x = activation_bytes(settings, at or sizes(settings))
  return Step("broadcast output", "head", "all-reduce", axes=_STAGE, operand_bytes=x)


def _head_forward(settings: Config, at: Sizes) -> tuple[Step, ...]:
  whole = at.sequences * at.positions
  flops = 2.0 * whole * settings.model.d_model * vocabulary(settings)
  x, each = activation_bytes(settings, at), whole * _FLOAT32
  split = ("stage", "tensor")
  return (
    Step("gather output", "head", "all-gather", axes=("tensor",), operand_bytes=x),
    Step(
      "logits and loss", "head", flops=flops, num_bytes=3 * logits_bytes(settings, at), kernels=10
    ),
    Step("gather sums of exponentials", "head", "all-gather", axes=split, operand_bytes=each),
  )


def _head(settings: Config, at: Sizes) -> tuple[Step, ...]:
  """Losses and their gradient of one micro-batch; every device a share of the vocabulary."""
  forward = {step.name: step for step in _head_forward(settings, at)}
  kernel = settings.model.d_model * vocabulary(settings) * _FLOAT32
  gather, *forward_rest = forward.values()
  return (
    gather,
    *_count(settings),
    *forward_rest,
    dataclasses.replace(
      forward["logits and loss"],
      name="logits and loss, back",
      part=BACKWARD,
      flops=2 * forward["logits and loss"].flops,
      # The logits are read, their gradient is written and read twice.
      num_bytes=(1 + 3 * at.dtype_bytes / _FLOAT32) * logits_bytes(settings, at) + 2 * kernel,
      kernels=12,
    ),
    *phases.transpose(settings, at, forward["gather output"]),
    Step("sum cotangent", "head", "all-reduce", BACKWARD, _STAGE, activation_bytes(settings, at)),
  )


def _count(settings: Config) -> tuple[Step, ...]:
  """The assignments of each expert over the whole micro-batch, of all layers of the stage.

  As direct messages along each axis, for mostly latency counts.
  """
  numbers = settings.model.layers // settings.mesh.stage * settings.model.experts
  return tuple(
    Step(f"{_COUNTED} {axis}", "head", "all-to-all", axes=(axis,),
         operand_bytes=getattr(settings.mesh, axis) * numbers * _FLOAT32)
    for axis in _TOKENS
    if getattr(settings.mesh, axis) > 1
  )  # fmt: skip


_UNITS = {
  "embed": _embed,
  "forward": phases.layer_forward,
  "head": _head,
  "head forward": _head_forward,
  "backward": phases.layer_backward,
  "embed_gradient": _embed_gradient,
}
