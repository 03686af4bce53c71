"""Reads the collectives of a program from its jaxpr, and those that docstrings declare.

Inside the manual region nothing adds a collective later, so the jaxpr holds them all: kind, axes,
elements and the loops round them. Knows jax's primitives; must not know the programs.
"""

import ast
import inspect
import math
import operator
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax.extend import core
from jax.interpreters import partial_eval

_KINDS = {
  "psum": "all-reduce",
  "psum2": "all-reduce",
  "psum_invariant": "all-reduce",
  "pmax": "all-reduce",
  "pmin": "all-reduce",
  "all_gather": "all-gather",
  "all_gather_invariant": "all-gather",
  "reduce_scatter": "reduce-scatter",
  "all_to_all": "all-to-all",
  "ragged_all_to_all": "ragged-all-to-all",
  "ppermute": "collective-permute",
}
_SILENT = ("axis_index", "pvary", "pcast")
_LOOPS = ("scan", "while")
_DECLARATION = re.compile(
  rf"({'|'.join(sorted(set(_KINDS.values())))}) over `(\w+)`, (?:(as many)|(\S[^;]*?) elements)"
)
_OPERATORS = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
}


class Collective(NamedTuple):
  """One collective of one device.

  Attributes:
    kind: as XLA names it.
    axes: mesh axes that it runs over.
    shape: of what the device puts in.
    num_loops: loops round it.
    elements: sent by the device, as a ring or direct algorithm moves them.
  """

  kind: str
  axes: tuple[str, ...]
  shape: tuple[int, ...]
  num_loops: int
  elements: float


def collectives(function: Callable, *arguments, mesh: jax.sharding.Mesh) -> list[Collective]:
  """Returns the collectives of `function` in program order; a loop's body counts once.

  What nothing uses is left out, as the compiler does (a vjp traces a forward pass that it may not
  need).

  Raises:
    ValueError: a primitive talks to other devices and is not known here.
  """
  jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return list(_walk(jaxpr, dict(mesh.shape), 0))


def summary(found: list[Collective]) -> list[tuple[str, str, float]]:
  """Returns (kind, axes, elements) of each collective that has anybody to talk to, sorted."""
  return sorted((c.kind, "+".join(c.axes), c.elements) for c in found if c.elements)


def declared(function: Callable, **sizes: float) -> list[tuple[str, str, float]]:
  """Returns (kind, axis, elements) of what the docstring's `Communication:` declares, in its order.

  Args:
    function: its docstring says "kind over `axis`, arithmetic of names elements" of each; "as many"
      repeats the arithmetic before.
    sizes: of the names; `x.size` is given as `x_size`.

  Raises:
    ValueError: nothing is declared, or its arithmetic has more than sums and products.
  """
  text = " ".join(inspect.getdoc(function).partition("Communication:")[2].split())
  found = _DECLARATION.findall(text)
  if not found:
    raise ValueError(f"{function.__qualname__} declares no collective in its docstring: {text!r}")
  result = []
  for kind, axis, as_many, formula in found:
    result.append((kind, axis, result[-1][2] if as_many else _evaluate(formula, sizes)))
  return result


def _walk(jaxpr: core.Jaxpr, sizes, num_loops) -> Iterator[Collective]:
  for equation in _used(jaxpr):
    name, params = equation.primitive.name, equation.params
    if name in _KINDS:
      axes = params.get("axes", params.get("axis_name"))
      axes = (axes,) if isinstance(axes, str) else tuple(axes)
      groups = params.get("axis_index_groups")  # of a part of the axis
      n = len(groups[0]) if groups else math.prod(sizes[axis] for axis in axes)
      # All others of a ragged exchange say where its rows lie.
      operands = equation.invars[:1] if name == "ragged_all_to_all" else equation.invars
      for operand in operands:
        shape = tuple(operand.aval.shape)
        yield Collective(_KINDS[name], axes, shape, num_loops, _elements(name, n, shape))
    elif name not in _SILENT and _is_over_mesh(params, sizes):
      raise ValueError(f"primitive {name} runs over mesh axes and is not known: {params}")
    for inner in _inner(params):
      yield from _walk(inner, sizes, num_loops + (name in _LOOPS))


def _used(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
  """Returns the equations whose results something asks for; the others a compiled program lacks."""
  asked, used = set(map(id, jaxpr.outvars)), []
  for equation in reversed(jaxpr.eqns):
    if any(id(v) in asked for v in equation.outvars):
      used.append(equation)
      asked |= set(map(id, equation.invars))
  return used[::-1]


def _inner(params) -> Iterator[core.Jaxpr]:
  """Yields the programs inside: where platforms have their own, that of those that have none."""
  platforms = params.get("branches_platforms")
  if platforms is None:
    yield from core.jaxprs_in_params(params)
  else:
    yield params["branches"][platforms.index(None)].jaxpr


def _is_over_mesh(params, sizes):
  axes = params.get("axes", params.get("axis_name"))
  return any(axis in sizes for axis in ((axes,) if isinstance(axes, str) else tuple(axes or ())))


def _elements(name, n, shape):
  size = math.prod(shape)
  factor = {
    "all-reduce": 2 * (n - 1) / n,
    "all-gather": n - 1,
    "reduce-scatter": (n - 1) / n,
    "all-to-all": (n - 1) / n,
    "ragged-all-to-all": (n - 1) / n,  # at most: of rows that are all filled
    "collective-permute": 1,
  }
  return factor[_KINDS[name]] * size


def _evaluate(formula, sizes):
  def value(node):
    match node:
      case ast.BinOp():
        return _OPERATORS[type(node.op)](value(node.left), value(node.right))
      case ast.Constant(value=float() | int() as number):
        return number
      case ast.Name(id=name):
        return sizes[name]
      case ast.Attribute(value=ast.Name(id=name), attr="size"):
        return sizes[f"{name}_size"]
    raise ValueError(f"{formula!r} is not arithmetic of names")

  return float(value(ast.parse(formula.strip(), mode="eval").body))
