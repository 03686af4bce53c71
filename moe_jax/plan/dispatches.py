"""How tokens reach their experts and come back, as steps of one device: every entry of the layer's
dispatch table.

Operations are exact; bytes to and from memory are those of the kernels that XLA makes, as sums of
large arrays. Loads are even, so stealing sends no shadow; of a dispatch in rounds the steps are
those of the first. Knows sizes; must not know time, links or schedules.

Letters as in the README: e, f are this device's shares.
"""

import dataclasses
import math

from moe_jax.config import Config
from moe_jax.moe import few_tokens
from moe_jax.plan import cost, saving, steps
from moe_jax.plan.leaves import FLOAT32_BYTES
from moe_jax.plan.steps import ROUNDS, ROWS, Sizes, Step, activation_bytes

_FLOAT32 = FLOAT32_BYTES
_INSIDE_STAGE = ("expert", "tensor")
# What no gradient passes through: integers.
NOT_DIFFERENTIATED = frozenset(
  {
    "announce",
    "announce inside",
    "announce to hosts",
    "agree on rounds over expert",
    "agree on rounds over tensor",
    "count before stealing",
    "decide",
    "choices to hosts",
    "sizes to ranks",
    "spread sizes",
  }
)
# What the backward pass does not ask for, by dispatch: sums, where other dispatches bring home the
# rows themselves, of which the router's weights take their gradient.
NOT_READ_AGAIN = {
  "two_level": frozenset({"sum at hosts", "to tokens"}),
  "gathered": frozenset({"sum between", "sum inside"}),
}


def forward(settings: Config, at: Sizes) -> tuple[Step, ...]:
  """Returns the forward steps of a layer's dispatch, experts and combine.

  Communication: as the docstrings of moe/exchange.py and of the dispatch say.
  """
  if settings.moe.dispatch == "gathered":
    return _gathered_experts(settings, at)
  model = settings.model
  sent, x = at.rows * model.d_model * at.dtype_bytes, activation_bytes(settings, at)
  follows = ROUNDS if settings.moe.dispatch in cost.EVERY_ASSIGNMENT else ""
  route = Step("route", "dispatch", flops=2.0 * at.tokens * model.d_model * model.experts,
               num_bytes=sent + 3 * x, kernels=18, is_float32=True)  # fmt: skip
  fill = ()
  if follows:
    route = dataclasses.replace(route, num_bytes=4 * x, kernels=16)
    fill = (Step("fill rows", "dispatch", num_bytes=3 * sent, kernels=3, follows=follows),)
  travel = _two_levels if settings.moe.dispatch == "two_level" else _one_level
  there, back = travel(settings, at)
  return (
    route,
    *_ANNOUNCE.get(settings.moe.dispatch, lambda settings, at: ())(settings, at),
    *fill,
    *there,
    *_experts(settings, at),
    *back,
    Step("combine", "combine", num_bytes=sent + 2 * x, kernels=1, follows=follows),
  )


def _experts(settings: Config, at: Sizes) -> tuple[Step, ...]:
  """The experts' products, and cutting their weights out of the stack. Without loss only blocks
  with rows are multiplied, and it is placed which rows those are: the kernels read rows and write
  results where they lie, and make activations on the way.
  """
  model, mesh = settings.model, settings.mesh
  D, f = model.d_model, model.expert_hidden // mesh.tensor
  (arrived, hidden), weights = saving.row_bytes(settings, at), saving.expert_bytes(settings, at)
  cut = Step("cut weights", "experts", num_bytes=2 * weights, kernels=2)
  products = Step(
    "experts", "experts", flops=6.0 * mesh.tensor * at.rows * D * f,
    num_bytes=2 * arrived + 3 * hidden + weights, kernels=2,
  )  # fmt: skip
  if settings.moe.dispatch not in cost.EVERY_ASSIGNMENT:
    return (cut, products, Step("activate", "experts", num_bytes=3 * hidden, kernels=1))
  computed = at.tokens * model.experts_per_token / steps.even_rounds(settings)
  return (
    cut,
    Step("place rows", "experts", kernels=15, follows=ROUNDS),
    dataclasses.replace(
      products, flops=6.0 * mesh.tensor * computed * D * f,
      num_bytes=2 * arrived + 4 * hidden + weights, follows=ROWS,
    ),
  )  # fmt: skip


def _one_level(settings: Config, at: Sizes) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
  """Rows to experts and back: between hosts with this tensor rank's own, then inside the host.

  Of `ragged` only filled rows travel between hosts; the flat exchange has all ranks' rows there.
  """
  model, mesh, moe = settings.model, settings.mesh, settings.moe
  sent = at.rows * model.d_model * at.dtype_bytes
  arrived = mesh.tensor * sent
  follows = ROUNDS if moe.dispatch in cost.EVERY_ASSIGNMENT else ""
  is_flat = moe.exchange == "flat"
  rows = at.rows * mesh.tensor if is_flat else at.rows
  if moe.dispatch == "ragged":
    rows = at.tokens * model.experts_per_token
  exchanged = rows * steps.crossing_row_bytes(settings)
  step = lambda name, phase, kind, axis, operand_bytes: Step(
    name, phase, kind, axes=(axis,), operand_bytes=operand_bytes, follows=follows
  )
  there = (
    step("to experts", "dispatch", "all-to-all", "expert", exchanged),
    step("spread rows", "dispatch", "all-gather", "tensor", sent),
  )
  back = (
    step("sum rows", "combine", "reduce-scatter", "tensor", arrived),
    step("to tokens", "combine", "all-to-all", "expert", exchanged),
  )
  return (there[::-1], back[::-1]) if is_flat else (there, back)


def _two_levels(settings: Config, at: Sizes) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
  """A row for each host of a token's choice, passed on inside that host to the experts' ranks; and
  back, summed where they were passed on.

  Communication: as the docstrings of moe/two_level.py say.
  """
  model, mesh, ranks = settings.model, settings.mesh, settings.moe.expert_ranks_per_host
  to_host = steps.two_level_rows(settings, at.tokens)[0]
  hosts, D, width = mesh.expert // ranks, model.d_model, at.dtype_bytes
  choices = hosts * to_host * model.experts_per_token * _FLOAT32
  crossed, passed = hosts * to_host * D * width, at.rows * D * width
  sizes = ranks * (model.experts // mesh.expert) * _FLOAT32

  def step(name, phase, kind, among, operand_bytes):
    axes = ("expert",) if among else ("tensor",)
    return Step(name, phase, kind, axes=axes, among=among, operand_bytes=operand_bytes,
                follows=ROUNDS)  # fmt: skip

  copied = crossed + 2 * passed
  return (
    (
      step("to hosts", "dispatch", "all-to-all", "hosts", crossed),
      step("choices to hosts", "dispatch", "all-to-all", "hosts", choices),
      Step("pass on", "dispatch", num_bytes=copied, kernels=15, follows=ROUNDS),
      step("to ranks", "dispatch", "all-to-all", "ranks", passed),
      step("sizes to ranks", "dispatch", "all-to-all", "ranks", sizes),
      step("spread rows", "dispatch", "all-gather", "", passed),
      step("spread sizes", "dispatch", "all-gather", "", sizes),
    ),
    (
      step("sum rows", "combine", "reduce-scatter", "", mesh.tensor * passed),
      step("from ranks", "combine", "all-to-all", "ranks", passed),
      step("weights to hosts", "combine", "all-to-all", "hosts", choices),
      Step("sum at hosts", "combine", num_bytes=copied, kernels=3, follows=ROUNDS),
      step("to tokens", "combine", "all-to-all", "hosts", crossed),
    ),
  )


def _gathered_experts(settings: Config, at: Sizes) -> tuple[Step, ...]:
  """Every token travels to every device, which computes its own experts on all of them.

  Weights of experts that no token chose are not read, where that is likely.
  """
  model, mesh = settings.model, settings.mesh
  x, sum_x = activation_bytes(settings, at), at.tokens * model.d_model * _FLOAT32
  choices, everyone = at.tokens * model.experts_per_token * _FLOAT32, mesh.expert * mesh.tensor
  sent = x + 2 * choices  # which experts, and their weights
  f, e = model.expert_hidden // mesh.tensor, model.experts // mesh.expert
  tokens = at.tokens * everyone
  assignments = tokens * model.experts_per_token / model.experts
  chosen = e if assignments >= few_tokens.FULL_LOAD else e * -math.expm1(-assignments)
  rows = chosen * tokens * at.dtype_bytes
  weights = 3 * chosen * model.d_model * f * at.dtype_bytes
  return (
    Step("route", "dispatch", flops=2.0 * at.tokens * model.d_model * model.experts,
         num_bytes=6 * x, kernels=12, is_float32=True),
    Step("pack tokens", "dispatch", num_bytes=2 * sent, kernels=1),
    Step("send tokens inside", "dispatch", "all-gather", axes=("tensor",), operand_bytes=sent,
         integer_bytes=choices),
    Step("send tokens between", "dispatch", "all-to-all", axes=("expert",),
         operand_bytes=sent * everyone, integer_bytes=choices * everyone),
    Step("experts", "experts", flops=6.0 * chosen * tokens * model.d_model * f,
         num_bytes=rows * (3 * model.d_model + 4 * f) + weights, kernels=8),
    Step("combine", "combine", num_bytes=2 * rows * model.d_model, kernels=3),
    Step("sum between", "combine", "all-to-all", axes=("expert",),
         operand_bytes=sum_x * everyone),
    Step("sum inside", "combine", "reduce-scatter", axes=("tensor",),
         operand_bytes=sum_x * mesh.tensor),
  )  # fmt: skip


def _announce(settings: Config, at: Sizes) -> tuple[Step, ...]:
  """Before rows travel without loss, each source says how many it has, and its longest queue."""
  del at
  counts = (_places(settings) + 1) * settings.mesh.expert * _FLOAT32
  tensor = settings.mesh.tensor
  flat = settings.moe.exchange == "flat"
  return (
    Step("announce", "dispatch", "all-to-all", axes=("expert",),
         operand_bytes=counts * (tensor if flat else 1)),
    Step("announce inside", "dispatch", "all-gather", axes=("tensor",), operand_bytes=counts),
  )  # fmt: skip


def _places(settings: Config) -> int:
  """Returns the experts that a device may serve: its own, and with stealing the shadows."""
  shadows = settings.moe.shadows if settings.moe.dispatch == "stealing" else 0
  return settings.model.experts // settings.mesh.expert + shadows


def _decide(settings: Config, at: Sizes) -> tuple[Step, ...]:
  """What stealing adds: all see the counts before they decide. An even load sends no shadow."""
  return (
    Step("count before stealing", "dispatch", "all-reduce", axes=_INSIDE_STAGE,
         operand_bytes=settings.model.experts * _FLOAT32),
    Step("decide", "dispatch", num_bytes=0.0, kernels=40),
    *_announce(settings, at),
  )  # fmt: skip


def _announce_to_hosts(settings: Config, at: Sizes) -> tuple[Step, ...]:
  """Each place of a host hears how many rows its rounds will bring to each rank."""
  to_host, _ = steps.two_level_rows(settings, at.tokens)
  numbers = -(-at.tokens // to_host) * settings.mesh.expert
  return (
    Step("announce to hosts", "dispatch", "all-to-all", axes=("expert",), among="hosts",
         operand_bytes=numbers * _FLOAT32),
    *(
      Step(f"agree on rounds over {axis}", "dispatch", "all-to-all", axes=(axis,),
           operand_bytes=2 * getattr(settings.mesh, axis) * _FLOAT32)
      for axis in _INSIDE_STAGE
    ),
  )  # fmt: skip


# What comes before rows travel.
_ANNOUNCE = {
  "dropless": _announce,
  "ragged": _announce,
  "stealing": _decide,
  "two_level": _announce_to_hosts,
}
