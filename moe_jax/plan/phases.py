"""What the phases of a layer are made of, forwards and backwards, on one device.

The one place that says what a layer costs. A layer's backward unit is the steps that are run again,
then every forward step's transpose in reverse. Operations are exact; bytes to and from memory are
those of the kernels that XLA makes of the phase, as sums of its large arrays (read off the compiled
schedule of pod64; tests/plan/pods.py compares). Knows sizes; must not know time, links or
schedules.

Letters as in the README: b, s, n, g, e, f, v are this device's shares.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from moe_jax.config import Config
from moe_jax.plan import cost, dispatches, saving
from moe_jax.plan.leaves import DTYPE_BYTES, FLOAT32_BYTES, leaves
from moe_jax.plan.steps import (
  AGAIN,
  BACKWARD,
  FORWARD,
  Sizes,
  Step,
  activation_bytes,
  cached_bytes,
  even_rounds,
  gather_over,
  group_size,
  sum_over,
)

# Of attention's kernels on a GPU, as model.flash has them (a test holds it): positions of a block,
# the narrowest head, and matrix products over each pair of positions.
FLASH_BLOCK, FLASH_NARROWEST = 64, 16
FLASH_PRODUCTS: Mapping[str, int] = {FORWARD: 2, BACKWARD: 7}
# Of what a layer keeps; and ten more a layer and unit for sums, loops and what a tick begins with.
_STASH_KERNELS = {"inputs": 11, "exchanges": 17, "residuals": 30, "everything": 50}
_FLOAT32 = FLOAT32_BYTES
# Of a layer that runs later, axis by axis in this order: what stands beside it does not wait.
_GATHER = {"data": "gather ahead from copies", "expert": "gather ahead"}
_SCATTER = {"expert": "scatter ahead", "data": "scatter ahead to copies"}
AHEAD = frozenset({*_GATHER.values(), "put and take", *_SCATTER.values(), "take and put"})
# What waits for nothing in its layer: it is written a step later, and read a layer before.
STASHED = frozenset({"keep", "take"})
# What nothing in the layer waits for: weights' gradients and their sums.
_OF_WEIGHTS = ", weights"
LATE = frozenset(
  {f"attention{_OF_WEIGHTS}", f"experts{_OF_WEIGHTS}", "cut weights, back", *STASHED}
)


def layer_forward(settings: Config, at: Sizes) -> tuple[Step, ...]:
  """Returns the forward steps of one layer: attention, dispatch, experts, combine.

  Communication: as the docstrings of model/attention.py and of `dispatches.forward` say; and of
  streamed weights, of a layer to come, an all-to-all over `data` and then an all-gather over
  `expert`.
  """
  *layer, keep = _first_round(settings, at)
  return (*stream(settings), *layer, *_further_rounds(settings, layer), keep)


def _first_round(settings: Config, at: Sizes) -> tuple[Step, ...]:
  """Returns the forward steps of one layer without further rounds of its dispatch."""
  kept = saving.saved_bytes(settings, at)
  # Copied into the stash, which is a loop's and not the layer's.
  keep = Step("keep", "other", num_bytes=2 * kept, kernels=_STASH_KERNELS[settings.pipeline.save])
  return (*_attention(settings, at), *dispatches.forward(settings, at), keep)


def _further_rounds(settings: Config, steps: Sequence[Step]) -> list[Step]:
  """Returns those of a layer's steps that a round repeats, for each further one of an even load."""
  return [
    dataclasses.replace(step, name=f"{step.name}, round {number}")
    for number in range(2, even_rounds(settings) + 1)
    for step in steps
    if step.follows
  ]


def stream(settings: Config) -> tuple[Step, ...]:
  """Returns the gather of one layer's streamed weights, as pipeline.weights makes it."""
  return gather_layer(settings) if settings.pipeline.prefetch_layers else ()


def gather_layer(settings: Config, number: int = 1) -> tuple[Step, ...]:
  """Returns the gathers of one layer's weights that lie in shares, or of several together: between
  copies shares travel.
  """
  mesh, width = settings.mesh, DTYPE_BYTES[settings.model.dtype]
  split, whole, turned = _by_layer(settings, number)
  if not whole:
    return ()
  return (
    *(
      gather_over(name, axis, mesh, split[axis] // getattr(mesh, axis) * width)
      for axis, name in _GATHER.items()
      if axis in split
    ),
    # Into the ring and out of it.
    Step("put and take", "other", num_bytes=(4 * whole + 2 * turned) * width, kernels=2),
  )  # fmt: skip


def scatter_layer(settings: Config, number: int = 1) -> tuple[Step, ...]:
  """Returns the sum over ranks, into shares, of one layer's gradients of those weights, or of
  several together.
  """
  width = DTYPE_BYTES[settings.pipeline.gradient_dtype]
  split, whole, turned = _by_layer(settings, number)
  if not whole:
    return ()
  return (
    *(
      sum_over(name, axis, split[axis] * width) for axis, name in _SCATTER.items() if axis in split
    ),
    # Out of the sums, and what comes back into those of the ranks.
    Step(
      "take and put", "other", part=BACKWARD, num_bytes=(4 * whole + 2 * turned) * width, kernels=2
    ),
  )


def _by_layer(settings: Config, number: int) -> tuple[dict[str, int], int, int]:
  """Returns the elements of so many layers' weights that are gathered, or whose gradients are
  summed, beside ticks: of those split along each axis, as `Leaf.whole_elements`, of all, and of
  those that are turned round for it.
  """
  mesh, split, whole, turned = settings.mesh, collections.Counter(), 0, 0
  for leaf in leaves(settings.model):
    if leaf.is_by_layer(mesh):
      split.update(leaf.whole_elements(mesh))
      whole += leaf.elements(mesh)
      turned += leaf.is_turned(mesh) * leaf.elements(mesh)
  of_layer = lambda elements: elements * mesh.stage // settings.model.layers * number
  by_axis = {axis: of_layer(elements) for axis, elements in split.items()}
  return by_axis, of_layer(whole), of_layer(turned)


def layer_backward(settings: Config, at: Sizes) -> tuple[Step, ...]:
  """Returns the backward steps of one layer: what is run again by the saving policy, then the
  transposes; further rounds before the first, and those are run again whatever is saved.
  """
  forward = _first_round(settings, at)
  again = lambda steps: [
    dataclasses.replace(step, name=f"{step.name}, again", part=AGAIN) for step in steps
  ]
  kept = saving.saved_bytes(settings, at)
  kernels = _STASH_KERNELS[settings.pipeline.save]
  not_made = _elementwise_bytes(settings, at) if settings.pipeline.save == "everything" else 0
  take = Step("take", "other", part=BACKWARD, num_bytes=2 * kept - not_made, kernels=kernels)
  back = [transposed for step in reversed(forward) for transposed in transpose(settings, at, step)]
  further = _further_rounds(settings, [*again(again_unsaved(settings, forward)), *back])
  return (*stream(settings), take, *again(_run_again(settings, at, forward)), *further, *back)


def again_unsaved(settings: Config, forward: Sequence[Step]) -> list[Step]:
  """Returns those of a layer's forward steps that are run once more where nothing is saved."""
  not_again = {"keep", *dispatches.NOT_READ_AGAIN.get(settings.moe.dispatch, ())}
  return [step for step in forward if step.name not in not_again]


def _run_again(settings: Config, at: Sizes, forward: tuple[Step, ...]) -> list[Step]:
  """Returns those of a layer's forward steps that its backward unit runs once more."""
  again = RUN_AGAIN[settings.pipeline.save]
  if again is None:
    return again_unsaved(settings, forward)
  if settings.pipeline.save != "exchanges":
    return [step for step in forward if step.name in again]
  if settings.mesh.expert == 1:
    again |= {"fill rows"}  # no collective brings them
  elif settings.moe.exchange == "flat":
    again -= {"spread rows"}  # spread before they crossed
  return [_up_to_exchange(settings, at, step) for step in forward if step.name in again]


def _up_to_exchange(settings: Config, at: Sizes, step: Step) -> Step:
  """Returns what is run again of a step whose last product's result a collective takes: that one is
  not; of routing what gradients ask for, not who goes where.
  """
  model, tensor, width = settings.model, settings.mesh.tensor, at.dtype_bytes
  is_alone = settings.mesh.expert * tensor == 1
  if step.name == "attention" and tensor > 1:
    n, D, H = model.heads // tensor, model.d_model, model.head_dim
    whole = at.sequences * at.positions
    num_bytes = (whole * (n * H + D) + n * H * D) * width
    less = Step(
      "", "", flops=cost.output_flops(model, whole) / tensor, num_bytes=num_bytes, kernels=1
    )
  elif step.name == "experts" and not is_alone:
    arrived, hidden = saving.row_bytes(settings, at)
    num_bytes = arrived + hidden + saving.expert_bytes(settings, at) // 3
    less = Step("", "", flops=cost.DOWN_SHARE * step.flops, num_bytes=num_bytes, kernels=1)
  elif step.name == "route" and settings.mesh.expert > 1:
    x = activation_bytes(settings, at)
    less = Step("", "", num_bytes=max(0.0, step.num_bytes - 2 * x), kernels=step.kernels // 2)
  else:
    return step
  return dataclasses.replace(
    step, flops=step.flops - less.flops, num_bytes=step.num_bytes - less.num_bytes,
    kernels=step.kernels - less.kernels,
  )  # fmt: skip


def _elementwise_bytes(settings: Config, at: Sizes) -> int:
  """Returns the bytes of the elementwise work that a backward unit runs again unless everything is
  saved: what it makes, and as much that it reads. The transposes' bytes hold it.
  """
  of = lambda save: saving.saved_bytes(
    dataclasses.replace(settings, pipeline=dataclasses.replace(settings.pipeline, save=save)), at
  )
  return 2 * (of("everything") - of("residuals"))


# What a layer's backward unit runs once more, by policy; None is all. "residuals" runs elementwise
# work again, whose bytes stand with the transposes. What "exchanges" runs ends before a collective
# that is not a gather inside a host, or a sum.
_UP_TO_EXCHANGES = frozenset(
  {
    "gather positions",
    "sum squares of queries",
    "sum squares of keys",
    "attention",
    "route",
    "spread rows",
    "cut weights",
    "experts",
    "activate",
  }
)
RUN_AGAIN: Mapping[str, frozenset[str] | None] = {
  "inputs": None,
  "exchanges": _UP_TO_EXCHANGES,
  "residuals": frozenset(),
  "everything": frozenset(),
}


def _attention(settings: Config, at: Sizes) -> tuple[Step, ...]:
  model, tensor = settings.model, settings.mesh.tensor
  width, D = at.dtype_bytes, model.d_model
  n, g, H = model.heads // tensor, model.kv_heads // tensor, model.head_dim
  whole = at.sequences * at.positions
  activation, gathered = activation_bytes(settings, at), whole * D * width
  projected = whole * (n + 2 * g) * H * width
  weights = D * (2 * n + 2 * g) * H * width
  core = whole * 2 * (n + g) * H * width + at.sequences * at.context * g * cached_bytes(settings)
  normed = ()
  if model.qk_norm == "projection":
    normed = tuple(
      Step(f"sum squares of {of}", "attention", "all-reduce", axes=("tensor",),
           operand_bytes=whole * _FLOAT32)
      for of in ("queries", "keys")
    )  # fmt: skip
  return (
    Step("gather positions", "attention", "all-gather", axes=("tensor",), operand_bytes=activation),
    *normed,
    Step(
      "attention", "attention",
      flops=2.0 * whole * D * (2 * n + 2 * g) * H + _pair_flops(settings, at, FORWARD),
      num_bytes=4 * gathered + 4 * projected + weights + core, kernels=9,
    ),
    Step(
      "scatter positions", "attention", "reduce-scatter", axes=("tensor",), operand_bytes=gathered
    ),
  )  # fmt: skip


def keys_and_values(settings: Config, at: Sizes) -> tuple[Step, ...]:
  """Returns the steps of attention that keys and values of all positions take, and no more."""
  model, whole = settings.model, at.sequences * at.positions
  gathered = whole * model.d_model * at.dtype_bytes
  g = 2 * model.kv_heads // settings.mesh.tensor * model.head_dim
  num_bytes = 4 * gathered + (3 * whole + model.d_model) * g * at.dtype_bytes
  gather = _attention(settings, at)[0]
  flops = 2.0 * whole * model.d_model * g
  return gather, Step("keys and values", "attention", flops=flops, num_bytes=num_bytes, kernels=5)


def _pair_flops(settings: Config, at: Sizes, part: str) -> float:
  """Returns the operations of attention's products over (query, key) pairs, in blocks unless there
  is one query for each sequence.
  """
  model, pairs, width = settings.model, 1, settings.model.head_dim
  if at.positions > 1:
    positions, width = flash_shape(at.positions, width)
    pairs = cost.blockwise_pairs(positions, FLASH_BLOCK)
  pairs = at.sequences * (pairs + at.positions * at.context)
  return 2.0 * FLASH_PRODUCTS[part] * pairs * (model.heads // settings.mesh.tensor) * width


def flash_shape(positions: int, head_dim: int) -> tuple[int, int]:
  """Returns positions and a head's width as attention's kernels pad them: whole blocks, and a power
  of two.
  """
  width = max(FLASH_NARROWEST, 1 << (head_dim - 1).bit_length())
  return -(-positions // FLASH_BLOCK) * FLASH_BLOCK, width


_NOT_DIFFERENTIATED = dispatches.NOT_DIFFERENTIATED | {"keep"}
_TRANSPOSE = {
  "all-gather": "reduce-scatter",
  "reduce-scatter": "all-gather",
  "all-to-all": "all-to-all",
  "all-reduce": "all-reduce",
}


def transpose(settings: Config, at: Sizes, step: Step) -> tuple[Step, ...]:
  """Returns what a forward step becomes in the backward pass."""
  if step.name in _NOT_DIFFERENTIATED:
    return ()
  changed = {"name": f"{step.name}, back", "part": BACKWARD}
  if step.is_communication:
    n = group_size(settings, step)
    factor = {"all-gather": n, "reduce-scatter": 1 / n}.get(step.kind, 1)
    sent = step.operand_bytes - step.integer_bytes
    changed |= {"kind": _TRANSPOSE[step.kind], "operand_bytes": sent * factor, "integer_bytes": 0.0}
    return (dataclasses.replace(step, **changed),)
  extra_flops, num_bytes, kernels = _BACKWARD[step.name](settings, at, step)
  whole = dataclasses.replace(
    step, flops=2 * step.flops + extra_flops, num_bytes=num_bytes, kernels=kernels, **changed
  )
  if step.name not in _WEIGHTS or step.follows:
    return (whole,)
  of_weights = _WEIGHTS[step.name](settings, at, step)
  of_rows = dataclasses.replace(
    whole, flops=whole.flops - of_weights.flops, num_bytes=num_bytes - of_weights.num_bytes,
    kernels=kernels - of_weights.kernels,
  )  # fmt: skip
  return (of_rows, of_weights)


def _attention_weights(settings: Config, at: Sizes, step: Step) -> Step:
  """Of the projections: their inputs and the gradients of their results are read, and what they
  make is added to sums.
  """
  model, tensor = settings.model, settings.mesh.tensor
  n, g, H, D = model.heads // tensor, model.kv_heads // tensor, model.head_dim, model.d_model
  whole, elements = at.sequences * at.positions, D * (2 * n + 2 * g) * H
  read = whole * (2 * D + (2 * n + 2 * g) * H) * at.dtype_bytes
  return Step(
    f"attention{_OF_WEIGHTS}", "attention", part=BACKWARD, flops=2.0 * whole * elements,
    num_bytes=read + elements * (at.dtype_bytes + 2 * _FLOAT32), kernels=6,
  )  # fmt: skip


def _experts_weights(settings: Config, at: Sizes, step: Step) -> Step:
  arrived, hidden = saving.row_bytes(settings, at)
  return Step(
    f"experts{_OF_WEIGHTS}", "experts", part=BACKWARD, flops=step.flops,
    num_bytes=2 * arrived + 3 * hidden + saving.expert_bytes(settings, at), kernels=3,
  )  # fmt: skip


_WEIGHTS = {"attention": _attention_weights, "experts": _experts_weights}


def _attention_back(settings: Config, at: Sizes, step: Step) -> tuple[float, float, int]:
  """Beside the transposes of its two products over pairs it makes scores for keys and values, and
  once more for queries, where weights' gradients are made once more too, whatever is saved.
  """
  model, tensor = settings.model, settings.mesh.tensor
  n, g, H, D = model.heads // tensor, model.kv_heads // tensor, model.head_dim, model.d_model
  whole, width = at.sequences * at.positions, at.dtype_bytes
  more = _pair_flops(settings, at, BACKWARD) - 2 * _pair_flops(settings, at, FORWARD)
  gathered, projected = whole * D * width, whole * (n + 2 * g) * H * width
  weights = D * (2 * n + 2 * g) * H * width
  core = whole * (6 * n + 4 * g) * H * width
  # Gradients of weights are added to float32 sums, read and written.
  sums = 4 * weights / width * _FLOAT32 / 2
  return more, 12 * gathered + 18 * projected + 2 * weights + core + sums, 17


def _experts_back(settings: Config, at: Sizes, step: Step) -> tuple[float, float, int]:
  arrived, hidden = saving.row_bytes(settings, at)
  return (
    0.0,
    4 * arrived + (11 if step.follows else 6) * hidden + 2 * saving.expert_bytes(settings, at),
    6,
  )


def _activate_back(settings: Config, at: Sizes, step: Step) -> tuple[float, float, int]:
  """Made again, for the gradient of what it is multiplied by, and its own gradient."""
  _, hidden = saving.row_bytes(settings, at)
  return 0.0, 8 * hidden, 2


def _cut_weights_back(settings: Config, at: Sizes, step: Step) -> tuple[float, float, int]:
  """Cut once more; and gradients are added to float32 sums, read and written."""
  weights = saving.expert_bytes(settings, at)
  return 0.0, 3 * weights + 2 * weights / at.dtype_bytes * _FLOAT32, 4


def _nothing_back(settings: Config, at: Sizes, step: Step) -> tuple[float, float, int]:
  """Integers; but where a round runs again, so do they."""
  return 0.0, 0.0, 0


def _route_back(settings: Config, at: Sizes, step: Step) -> tuple[float, float, int]:
  x, filled = activation_bytes(settings, at), _fill_rows_back(settings, at, step)
  if settings.moe.dispatch in cost.EVERY_ASSIGNMENT:
    return 0.0, 12 * x, 12 - filled[2]
  return 0.0, filled[1] + 12 * x, 12


def _fill_rows_back(settings: Config, at: Sizes, step: Step) -> tuple[float, float, int]:
  return 0.0, 2 * at.rows * settings.model.d_model * at.dtype_bytes, 2


def _combine_back(settings: Config, at: Sizes, step: Step) -> tuple[float, float, int]:
  sent, x = at.rows * settings.model.d_model * at.dtype_bytes, activation_bytes(settings, at)
  return 0.0, sent + 4 * x, 3


def _as_forward(settings: Config, at: Sizes, step: Step) -> tuple[float, float, int]:
  """A move of rows, or a sum, is undone by another."""
  return 0.0, step.num_bytes, step.kernels


_BACKWARD = {
  "pass on": _as_forward,
  "sum at hosts": _as_forward,
  "attention": _attention_back,
  "cut weights": _cut_weights_back,
  "experts": _experts_back,
  "activate": _activate_back,
  "place rows": _nothing_back,
  "pack tokens": _nothing_back,
  "route": _route_back,
  "fill rows": _fill_rows_back,
  "combine": _combine_back,
}
