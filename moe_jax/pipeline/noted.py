"""Results inside a traced function, handed out of it or put back into it.

Knows jaxprs; must not know layers, nor what the results are wanted for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

Tree = Any
Wanted = Callable[[jex.JaxprEqn], bool]


def take(run: Callable, is_wanted: Wanted) -> Callable:
  """Returns `run` with a second result, the list of what its wanted equations make.

  Args:
    run: any function of trees of arrays.
    is_wanted: says so of an equation of the function's own jaxpr, not of those that it calls.
  """

  def with_results(*given):
    jaxpr, consts, tree = _trace(run, given)
    made = _made(jaxpr, is_wanted)
    more = _changed(jaxpr, outvars=[*jaxpr.outvars, *made])
    leaves = _evaluate(more, consts, jax.tree.leaves(given))
    num_results = len(jaxpr.outvars)
    return jax.tree.unflatten(tree, leaves[:num_results]), leaves[num_results:]

  return with_results


def is_read(run: Callable, given: tuple, is_wanted: Wanted) -> list[bool]:
  """Returns of each result of `take` whether `put` would read it, the others being given too.

  Args:
    run, is_wanted: as of `take`.
    given: arguments of `run`, shapes or arrays.
  """
  jaxpr, _, _ = _trace(run, given)
  read = {id(v) for eqn in _needed(jaxpr, is_wanted) for v in eqn.invars}
  read |= set(map(id, jaxpr.outvars))
  return [id(v) in read for v in _made(jaxpr, is_wanted)]


def put(run: Callable, is_wanted: Wanted, results: Sequence[jax.Array | None]) -> Callable:
  """Returns `run` with the results of `take` given, computing nothing that only led to them.

  Args:
    run, is_wanted: as of `take`.
    results: as `take` returned them; None where `is_read` says no.
  """

  def with_given(*given):
    jaxpr, consts, tree = _trace(run, given)
    made = zip(_made(jaxpr, is_wanted), results, strict=True)
    known = [(v, result) for v, result in made if result is not None]
    invars = [*jaxpr.invars, *(v for v, _ in known)]
    less = _changed(jaxpr, invars=invars, eqns=_needed(jaxpr, is_wanted))
    leaves = _evaluate(less, consts, [*jax.tree.leaves(given), *(result for _, result in known)])
    return jax.tree.unflatten(tree, leaves)

  return with_given


def _trace(run, given):
  leaves, tree = jax.tree.flatten(given)
  out = {}

  def flat(*leaves):
    results, out["tree"] = jax.tree.flatten(run(*jax.tree.unflatten(tree, leaves)))
    return results

  closed = jax.make_jaxpr(flat)(*leaves)
  return closed.jaxpr, closed.consts, out["tree"]


def _evaluate(jaxpr, consts, leaves):
  return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, consts))(*leaves)


def _changed(jaxpr, **fields):
  """Returns the jaxpr with other arguments, equations or results: names of the old do not fit."""
  return jaxpr.replace(**fields, debug_info=jaxpr.debug_info.with_unknown_names())


def _made(jaxpr, is_wanted):
  return [v for eqn in jaxpr.eqns if is_wanted(eqn) for v in eqn.outvars]


def _needed(jaxpr, is_wanted):
  """Returns the equations that lead to the jaxpr's results where the wanted ones' are given."""
  read, needed = set(map(id, jaxpr.outvars)), []
  for eqn in reversed(jaxpr.eqns):
    if not is_wanted(eqn) and any(id(v) in read for v in eqn.outvars):
      needed.append(eqn)
      read |= set(map(id, eqn.invars))
  return needed[::-1]
