"""A layer cut into steps, each one collective or one group of matrix products, and what it costs.

The cuts lie where a layer communicates or multiplies large matrices, so that other work can be tied
in between (`pipeline.tie`); the model says nothing of them. A layer that sends nothing is one step.
What is small beside the layer's largest collective or beside all of its products cuts nothing.

Knows a layer as a function, and reads its jaxpr; must not know schedules or models.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.extend.core as jex

from moe_jax.parallel.axes import TENSOR

_COLLECTIVES = ("all_gather", "all_to_all", "ppermute", "psum_invariant", "reduce_scatter")
_NAME = "name"  # as `saving.residual` marks it
_CALLS = ("closed_call", "custom_vjp_call", "jit", "remat2")
# Equations that write into their first operand: which one holds what they write.
_UPDATES = {"dynamic_update_slice": 1, "scatter": 2, "scatter-add": 2}
_SMALL_COLLECTIVE = 0.05  # of the bytes of the largest
_SMALL_PRODUCT = 0.03  # of the FLOPs of all


class Step(NamedTuple):
  """A part of a layer.

  Attributes:
    run: (weights, shared, carry, inputs) -> carry. The first step takes x for carry, the last
      returns (y, statistics, report), those between hand on lists of arrays.
    uses: which leaves of (weights, shared) it reads.
    flops: of its matrix products on this device.
    made_bytes: of all arrays that it makes.
    num_equations: of its jaxpr.
    inside_bytes, between_bytes: that this device sends inside its host and between hosts, in
      collectives that are not small.
  """

  run: Callable
  uses: tuple[int, ...]
  flops: float
  made_bytes: float
  num_equations: int
  inside_bytes: float
  between_bytes: float


def cut(
  layer: Callable, example: tuple, head_apart: bool = False, inside: tuple[str, ...] = (TENSOR,)
) -> tuple[Step, ...]:
  """Returns the layer as steps.

  Args:
    layer: as `Functions.layer`.
    example: (weights, shared, x, inputs) of one layer, shapes or arrays; called inside the region.
    head_apart: whether what comes before the first cut is a step of its own.
    inside: mesh axes along which all devices share a host.
  """
  given, tree = jax.tree.flatten(example)
  out = {}

  def flat(*leaves):
    result = layer(*jax.tree.unflatten(tree, leaves))
    leaves, out["tree"] = jax.tree.flatten(result)
    return leaves

  closed = jax.make_jaxpr(flat)(*given)
  jaxpr, consts = closed.jaxpr, closed.consts
  least = _SMALL_COLLECTIVE * max(map(_sent_bytes, jaxpr.eqns), default=0.0)
  pieces = _pieces(jaxpr.eqns, least, head_apart)
  if len(pieces) == 1:
    uses = tuple(range(len(jax.tree.leaves(example[:2]))))
    return (_step(layer, uses, jaxpr.eqns, least, inside),)
  num_x = len(jax.tree.leaves(example[2]))
  first_x = len(jax.tree.leaves(example[:2]))
  x_vars = jaxpr.invars[first_x : first_x + num_x]
  globals_ = [*jaxpr.constvars, *jaxpr.invars[:first_x], *jaxpr.invars[first_x + num_x :]]

  def step(number):
    takes = x_vars if number == 0 else lives[number - 1]
    is_last = number == len(pieces) - 1
    gives = jaxpr.outvars if is_last else lives[number]
    part = jex.Jaxpr(
      (), [*globals_, *takes], gives, pieces[number], jaxpr.effects,
      debug_info=jaxpr.debug_info.with_unknown_names(),
    )  # fmt: skip
    call = jex.jaxpr_as_fun(jex.ClosedJaxpr(part, ()))

    def run(weights, shared, carry, inputs):
      known = jax.tree.leaves((weights, shared, inputs))
      leaves = call(*consts, *known, *jax.tree.leaves(carry))
      return jax.tree.unflatten(out["tree"], leaves) if is_last else leaves

    eqns = pieces[number]
    read = {id(v) for eqn in eqns for v in eqn.invars}
    uses = tuple(i for i, v in enumerate(jaxpr.invars[:first_x]) if id(v) in read)
    return _step(run, uses, eqns, least, inside)

  lives = _alive_between(pieces, x_vars, globals_, jaxpr.outvars)
  return tuple(step(number) for number in range(len(pieces)))


def whole(layer: Callable, example: tuple) -> Step:
  """Returns the layer as one step, of which nothing is known."""
  return Step(layer, tuple(range(len(jax.tree.leaves(example[:2])))), 0.0, 0.0, 0, 0.0, 0.0)


def _step(run: Callable, uses, eqns, least_sent: float, inside: tuple[str, ...]) -> Step:
  """Returns the step of these equations, with what it costs."""
  sent = {True: 0.0, False: 0.0}
  for eqn in eqns:
    num_bytes = _sent_bytes(eqn)
    if num_bytes >= least_sent:
      sent[is_inside(eqn, inside)] += num_bytes
  return Step(run, uses, _flops_of(eqns), _bytes_of(eqns), len(eqns), sent[True], sent[False])


def _pieces(eqns, least_sent: float, head_apart: bool) -> list[list]:
  """Returns the equations in runs that each hold a collective of at least so many bytes or a large
  product, and what comes after it; the first holds what comes before as well, if that is not to be
  apart.

  A collective begins its run. What comes before a product may be cut off wherever least crosses: of
  what enters a run much is kept for the backward pass.
  """
  sent = [_sent_bytes(e) for e in eqns]
  flops = [_flops_of([e]) for e in eqns]
  if not any(sent):
    return [list(eqns)]
  least_flops = _SMALL_PRODUCT * sum(flops)
  begins, operand, last, has_head = [], None, 0, head_apart
  for place, (eqn, num_bytes, num_flops) in enumerate(zip(eqns, sent, flops, strict=True)):
    is_collective = num_bytes > 0 and num_bytes >= least_sent
    is_product = num_flops > 0 and num_flops >= least_flops
    if not (is_collective or is_product):
      continue
    # Products of one operand stay together: XLA makes one of them.
    if not (is_product and operand is not None and operand is eqn.invars[0]):
      if has_head:
        begins.append(place if is_collective else _narrowest(eqns, last, place))
      has_head = True
      operand = eqn.invars[0] if is_product else None
    last = place + 1
  return [list(eqns[a:b]) for a, b in itertools.pairwise([0, *begins, len(eqns)])]


def _narrowest(eqns, start: int, stop: int) -> int:
  """Returns the last of the places between equations, from start to stop, that the fewest bytes
  cross; but for residuals, which are kept wherever they are made.
  """
  last_use = {id(v): place for place, eqn in enumerate(eqns) for v in eqn.invars}
  crossing = [0.0] * (stop + 1)
  for place, eqn in enumerate(eqns[:stop]):
    if eqn.primitive.name == _NAME:
      continue
    for var in eqn.outvars:
      for between in range(place + 1, min(last_use.get(id(var), 0), stop) + 1):
        crossing[between] += var.aval.size * var.aval.dtype.itemsize
  return max(range(start, stop + 1), key=lambda place: (-crossing[place], place))


def _alive_between(pieces, x_vars, globals_, outvars) -> list[list]:
  """Returns, for each border between pieces, the variables that cross it."""
  known = set(map(id, globals_))
  made, lives = list(x_vars), []
  for number in range(len(pieces) - 1):
    made += [v for eqn in pieces[number] for v in eqn.outvars]
    later = {id(v) for piece in pieces[number + 1 :] for eqn in piece for v in eqn.invars}
    later |= set(map(id, outvars))
    lives.append([v for v in made if id(v) in later and id(v) not in known])
  return lives


def _bytes_of(eqns) -> float:
  """Returns the bytes of all that equations of the top level make, of an update in place those that
  it writes.
  """

  def made(eqn):
    place = _UPDATES.get(eqn.primitive.name)
    return eqn.outvars if place is None else eqn.invars[place : place + 1]

  avals = [v.aval for eqn in eqns for v in made(eqn)]
  return float(sum(aval.size * aval.dtype.itemsize for aval in avals))


def _collectives(eqn) -> list:
  """Returns the collectives of an equation: itself, or those of the function that it calls; of a
  choice by platform those of its default.

  A loop is no call: how often it turns is not known, as of a dispatch's further rounds. Nor is a
  choice that data makes, as of whether anything is stolen.
  """
  if eqn.primitive.name in _COLLECTIVES:
    return [eqn]
  if eqn.params.get("branches_platforms"):
    inner = eqn.params["branches"][-1].eqns  # the default stands last
  elif eqn.primitive.name in _CALLS:
    inner = [e for jaxpr in jex.jaxprs_in_params(eqn.params) for e in jaxpr.eqns]
  else:
    return []
  return [collective for e in inner for collective in _collectives(e)]


def _sent_bytes(eqn) -> float:
  """Returns what this device sends in an equation, as rings and direct exchanges move it."""
  return sum(map(_sent_by_collective, _collectives(eqn)))


def _sent_by_collective(eqn) -> float:
  groups = eqn.params.get("axis_index_groups")
  sizes = [len(groups[0])] if groups else [jax.lax.axis_size(name) for name in _axes(eqn)]
  size = math.prod(sizes)
  if size == 1:
    return 0.0
  num_bytes = lambda variables: sum(v.aval.size * v.aval.dtype.itemsize for v in variables)
  taken, made = num_bytes(eqn.invars), num_bytes(eqn.outvars)
  part = (size - 1) / size
  return {
    "all_gather": part * made,
    "all_to_all": part * taken,
    "ppermute": taken,
    "psum_invariant": 2 * part * taken,
    "reduce_scatter": part * taken,
  }[eqn.primitive.name]


def is_collective(eqn) -> bool:
  """Says whether an equation sends something, or calls a function that does."""
  return bool(_collectives(eqn))


def is_inside(eqn, axes: tuple[str, ...] = (TENSOR,)) -> bool:
  """Says whether all that an equation sends travels over `axes`."""
  return all(set(_axes(collective)) <= set(axes) for collective in _collectives(eqn))


def _axes(eqn) -> tuple[str, ...]:
  names = eqn.params.get("axis_name", eqn.params.get("axes"))
  return (names,) if isinstance(names, str) else tuple(names)


def _flops_of(eqns) -> float:
  """Returns the FLOPs of the matrix products in equations, inside loops and calls as well."""
  return float(sum(_flops(eqn) for eqn in eqns))


def _flops(eqn) -> float:
  if eqn.primitive.name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval
    return 2.0 * eqn.outvars[0].aval.size * math.prod(left.shape[d] for d in contracted)
  if eqn.params.get("cost_estimate"):  # a kernel's own
    return float(eqn.params["cost_estimate"].flops)
  inner = [_flops_of(jaxpr.eqns) for jaxpr in jex.jaxprs_in_params(eqn.params)]
  if eqn.primitive.name == "cond":
    return max(inner)
  return sum(inner) * eqn.params.get("length", 1)
