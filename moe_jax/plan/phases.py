"""What the phases of a layer are made of, forwards and backwards, on one device.

The one place that says what a layer costs. A layer's backward unit is the steps that are run again,
then every forward step's transpose in reverse. Operations are exact; bytes to and from memory are
those of the kernels that XLA makes of the phase, as sums of its large arrays (read off the compiled
schedule of pod64; tests/plan/agreement.py compares). Knows sizes; must not know time, links or
schedules.

Letters as in the README: b, s, n, g, e, f, v are this device's shares.
"""

import dataclasses
import math
from collections.abc import Mapping

from moe_jax.config import Config
from moe_jax.plan import cost, saving
from moe_jax.plan.leaves import FLOAT32_BYTES
from moe_jax.plan.steps import AGAIN, BACKWARD, Sizes, Step, activation_bytes

# Positions of an attention block: of the one kernel that a GPU runs.
KERNEL_BLOCK = 128
_STASH_KERNELS = {"inputs": 1, "residuals": 20, "everything": 40}
_FLOAT32 = FLOAT32_BYTES
# Below this many assignments an expert, gathered dispatch leaves out the experts without any.
_FULL_LOAD = 4
_INSIDE_STAGE = ("expert", "tensor")
# The load-balancing loss reads these; no token's way depends on them.
COUNTS = frozenset({"count over expert", "count over tensor"})


def layer_forward(settings: Config, at: Sizes) -> tuple[Step, ...]:
  """Returns the forward steps of one layer: attention, dispatch, experts, combine.

  Communication: as the docstrings of model/attention.py and moe/exchange.py say.
  """
  kept = saving.saved_bytes(settings, at)
  # Written where it was made, then into the stash, which is a loop's and not the layer's.
  keep = Step("keep", "other", num_bytes=4 * kept, kernels=_STASH_KERNELS[settings.pipeline.save])
  return (*_attention(settings, at), *_experts(settings, at), keep)


def layer_backward(settings: Config, at: Sizes) -> tuple[Step, ...]:
  """Returns the backward steps of one layer: what is run again by the saving policy, then the
  transposes.
  """
  forward = layer_forward(settings, at)
  again = RUN_AGAIN[settings.pipeline.save]
  repeated = [
    dataclasses.replace(step, name=f"{step.name}, again", part=AGAIN)
    for step in forward
    if step.name != "keep" and (again is None or step.name in again)
  ]
  kept = saving.saved_bytes(settings, at)
  kernels = _STASH_KERNELS[settings.pipeline.save]
  take = Step("take", "other", part=BACKWARD, num_bytes=3 * kept, kernels=kernels)
  back = [transposed for step in reversed(forward) for transposed in transpose(settings, at, step)]
  return (take, *repeated, *back)


# What a layer's backward unit runs once more, by policy; None is all. "residuals" runs elementwise
# work again, which counts nothing here.
RUN_AGAIN: Mapping[str, frozenset[str] | None] = {
  "inputs": None,
  "residuals": frozenset(),
  "everything": frozenset(),
}
# The dispatches whose cost is known here.
COSTED = ("capacity", "dropless", "dense", "gathered")


def _attention(settings: Config, at: Sizes) -> tuple[Step, ...]:
  model, tensor = settings.model, settings.mesh.tensor
  width, D = at.dtype_bytes, model.d_model
  n, g, H = model.heads // tensor, model.kv_heads // tensor, model.head_dim
  whole = at.sequences * at.positions
  activation, gathered = activation_bytes(settings, at), whole * D * width
  projected = whole * (n + 2 * g) * H * width
  weights = D * (2 * n + 2 * g) * H * width
  core = whole * 2 * n * H * width + at.sequences * (at.positions + at.context) * 2 * g * H * width
  pairs = at.sequences * _pairs(at.positions, at.context)
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
      flops=2.0 * whole * D * (2 * n + 2 * g) * H + 4.0 * pairs * n * H,
      num_bytes=4 * gathered + 4 * projected + weights + core, kernels=11,
    ),
    Step(
      "scatter positions", "attention", "reduce-scatter", axes=("tensor",), operand_bytes=gathered
    ),
  )  # fmt: skip


def _pairs(positions: int, context: int) -> int:
  """Returns the (query, key) pairs that blockwise-causal attention multiplies for one sequence."""
  own = cost.blockwise_pairs(positions, KERNEL_BLOCK) if positions > 1 else 1
  return own + positions * context


def _experts(settings: Config, at: Sizes) -> tuple[Step, ...]:
  if settings.moe.dispatch not in COSTED:
    raise ValueError(
      f"moe.dispatch={settings.moe.dispatch} cannot be planned; choose from {', '.join(COSTED)}"
    )
  if settings.moe.dispatch == "gathered":
    return _gathered_experts(settings, at)
  model, mesh = settings.model, settings.mesh
  width, D = at.dtype_bytes, model.d_model
  sent = at.rows * D * width
  arrived = mesh.tensor * sent
  hidden = mesh.tensor * at.rows * (model.expert_hidden // mesh.tensor) * width
  weights = model.experts // mesh.expert * D * (model.expert_hidden // mesh.tensor) * width
  is_dropless = settings.moe.dispatch == "dropless"
  # Without loss only rows that hold an assignment are computed, whatever the buffers hold.
  computed = at.tokens * model.experts_per_token if is_dropless else at.rows
  flat = settings.moe.exchange == "flat"
  exchanged = arrived if flat else sent
  x = activation_bytes(settings, at)
  there = (
    Step(
      "to experts", "dispatch", "all-to-all", axes=("expert",), operand_bytes=exchanged,
      follows_load=is_dropless,
    ),
    Step(
      "spread rows", "dispatch", "all-gather", axes=("tensor",), operand_bytes=sent,
      follows_load=is_dropless,
    ),
  )  # fmt: skip
  back = (
    Step(
      "sum rows", "combine", "reduce-scatter", axes=("tensor",), operand_bytes=arrived,
      follows_load=is_dropless,
    ),
    Step(
      "to tokens", "combine", "all-to-all", axes=("expert",), operand_bytes=exchanged,
      follows_load=is_dropless,
    ),
  )  # fmt: skip
  return (
    Step("route", "dispatch", flops=2.0 * at.tokens * D * model.experts,
         num_bytes=3 * sent + 4 * x, kernels=19, is_float32=True),
    *_count(settings),
    *(_announce(settings) if is_dropless else ()),
    *(reversed(there) if flat else there),
    Step(
      "experts", "experts",
      flops=6.0 * mesh.tensor * computed * D * (model.expert_hidden // mesh.tensor),
      num_bytes=3 * arrived + 4 * hidden + 3 * weights + 2 * arrived, kernels=25,
      follows_load=is_dropless,
    ),
    *(reversed(back) if flat else back),
    Step("combine", "combine", num_bytes=2 * sent + 2 * x, kernels=2),
  )  # fmt: skip


def _gathered_experts(settings: Config, at: Sizes) -> tuple[Step, ...]:
  """Every token travels to every device, which computes its own experts on all of them.

  Weights of experts that no token chose are not read, where that is likely.
  """
  model, mesh = settings.model, settings.mesh
  x, sum_x = activation_bytes(settings, at), at.tokens * model.d_model * _FLOAT32
  choices, everyone = at.tokens * model.experts_per_token * _FLOAT32, mesh.expert * mesh.tensor
  f, e = model.expert_hidden // mesh.tensor, model.experts // mesh.expert
  tokens = at.tokens * everyone
  assignments = tokens * model.experts_per_token / model.experts
  chosen = e if assignments >= _FULL_LOAD else e * -math.expm1(-assignments)
  rows = chosen * tokens * at.dtype_bytes
  weights = 3 * chosen * model.d_model * f * at.dtype_bytes
  gather = lambda name, phase, each: (
    Step(f"{name} inside", phase, "all-gather", axes=("tensor",), operand_bytes=each),
    Step(f"{name} between", phase, "all-gather", axes=("expert",),
         operand_bytes=each * mesh.tensor),
  )  # fmt: skip
  return (
    Step("route", "dispatch", flops=2.0 * at.tokens * model.d_model * model.experts,
         num_bytes=6 * x, kernels=12, is_float32=True),
    *_count(settings),
    *gather("announce", "dispatch", choices),
    *gather("send tokens", "dispatch", x),
    Step("experts", "experts", flops=6.0 * chosen * tokens * model.d_model * f,
         num_bytes=rows * (3 * model.d_model + 4 * f) + weights, kernels=4 * e),
    *gather("send weights", "combine", choices),
    Step("combine", "combine", num_bytes=2 * rows * model.d_model, kernels=3),
    Step("sum between", "combine", "reduce-scatter", axes=("expert",),
         operand_bytes=sum_x * everyone),
    Step("sum inside", "combine", "reduce-scatter", axes=("tensor",),
         operand_bytes=sum_x * mesh.tensor),
  )  # fmt: skip


def _count(settings: Config) -> tuple[Step, ...]:
  """The assignments of each expert over the whole micro-batch, for the load-balancing loss.

  As direct messages along each axis, for only latency counts.
  """
  return tuple(
    Step(f"count over {axis}", "dispatch", "all-to-all", axes=(axis,),
         operand_bytes=getattr(settings.mesh, axis) * settings.model.experts * _FLOAT32)
    for axis in _INSIDE_STAGE
  )  # fmt: skip


def _announce(settings: Config) -> tuple[Step, ...]:
  """Before rows travel without loss, each source says how many it has, and all agree on rounds."""
  counts = settings.model.experts * _FLOAT32
  tensor = settings.mesh.tensor
  flat = settings.moe.exchange == "flat"
  return (
    Step("announce", "dispatch", "all-to-all", axes=("expert",),
         operand_bytes=counts * (tensor if flat else 1)),
    Step("announce inside", "dispatch", "all-gather", axes=("tensor",), operand_bytes=counts),
    Step("agree on rounds", "dispatch", "all-reduce", axes=_INSIDE_STAGE, operand_bytes=_FLOAT32),
  )  # fmt: skip


_NOT_DIFFERENTIATED = frozenset(
  {
    "keep",
    *COUNTS,
    "announce",
    "announce inside",
    "announce between",
    "agree on rounds",
  }
)
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
    n = math.prod(getattr(settings.mesh, axis) for axis in step.axes)
    factor = {"all-gather": n, "reduce-scatter": 1 / n}.get(step.kind, 1)
    changed |= {"kind": _TRANSPOSE[step.kind], "operand_bytes": step.operand_bytes * factor}
    return (dataclasses.replace(step, **changed),)
  extra_flops, num_bytes, kernels = _BACKWARD[step.name](settings, at, step)
  return (
    dataclasses.replace(
      step, flops=2 * step.flops + extra_flops, num_bytes=num_bytes, kernels=kernels, **changed
    ),
  )


def _attention_back(settings: Config, at: Sizes, step: Step) -> tuple[float, float, int]:
  """The scores are made again, half of the pairs' forward work, whatever is saved."""
  model, tensor = settings.model, settings.mesh.tensor
  n, g, H, D = model.heads // tensor, model.kv_heads // tensor, model.head_dim, model.d_model
  whole, width = at.sequences * at.positions, at.dtype_bytes
  scores = 2.0 * at.sequences * _pairs(at.positions, at.context) * n * H
  gathered, projected = whole * D * width, whole * (n + 2 * g) * H * width
  weights = D * (2 * n + 2 * g) * H * width
  core = whole * (6 * n + 4 * g) * H * width
  # Gradients of weights are added to float32 sums, read and written.
  sums = 4 * weights / width * _FLOAT32 / 2
  return scores, 12 * gathered + 18 * projected + 2 * weights + core + sums, 8


def _experts_back(settings: Config, at: Sizes, step: Step) -> tuple[float, float, int]:
  model, mesh = settings.model, settings.mesh
  width, f = at.dtype_bytes, model.expert_hidden // mesh.tensor
  arrived, hidden = (mesh.tensor * at.rows * wide * width for wide in (model.d_model, f))
  weights = model.experts // mesh.expert * model.d_model * f * width
  sums = 3 * 2 * weights / width * _FLOAT32
  return 0.0, 19 * arrived + 17 * hidden + 6 * weights + sums, 16


def _route_back(settings: Config, at: Sizes, step: Step) -> tuple[float, float, int]:
  sent, x = at.rows * settings.model.d_model * at.dtype_bytes, activation_bytes(settings, at)
  return 0.0, 4 * sent + 14 * x, 8


def _combine_back(settings: Config, at: Sizes, step: Step) -> tuple[float, float, int]:
  sent, x = at.rows * settings.model.d_model * at.dtype_bytes, activation_bytes(settings, at)
  return 0.0, 2 * sent + 3 * x, 2


_BACKWARD = {
  "attention": _attention_back,
  "experts": _experts_back,
  "route": _route_back,
  "combine": _combine_back,
}
