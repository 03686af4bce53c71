"""Several arrays of a tree that go through a collective together, in one message.

Knows trees; must not know what is sent, or along which axes.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

Tree = Any


class Together(NamedTuple):
  """What some leaves of a tree become.

  Attributes:
    takes: of each leaf, whether it takes part.
    send: what arrives, of the leaves that do.
    open: makes of what arrived as many others; takes the leaves, or their shapes, as well.
  """

  takes: tuple[bool, ...]
  send: Callable[[list[jax.Array]], Tree]
  open: Callable[[Tree, list], list[jax.Array]]

  @classmethod
  def at_once(cls, takes: Iterable[bool], run: Callable[[list], list]) -> "Together":
    """Returns that of a collective whose result needs no opening."""
    return cls(tuple(takes), run, lambda arrived, like: arrived)

  @classmethod
  def none(cls, tree: Tree) -> "Together":
    """Returns that of a tree of which no leaf takes part."""
    return cls.at_once([False] * len(jax.tree.leaves(tree)), lambda leaves: leaves)

  def run(self, leaves: list[jax.Array]) -> list[jax.Array]:
    """Returns what the leaves that take part become."""
    return self.open(self.send(leaves), leaves)

  def of_tree(self, tree: Tree) -> Tree:
    """Returns the tree with what those of its leaves become that take part."""
    return self.put(tree, self.run(self.of(tree)))

  @property
  def are_any(self) -> bool:
    """Whether a leaf takes part."""
    return any(self.takes)

  def of(self, tree: Tree) -> list:
    """Returns the leaves that take part."""
    return [leaf for takes, leaf in zip(self.takes, jax.tree.leaves(tree), strict=True) if takes]

  def put(
    self, tree: Tree, made: Iterable, rest: Callable[[jax.Array], jax.Array] = lambda leaf: leaf
  ) -> Tree:
    """Returns the tree with what was made in their places, and `rest` of the other leaves."""
    leaves, structure = jax.tree.flatten(tree)
    given = iter(made)
    whole = [
      next(given) if takes else rest(leaf) for takes, leaf in zip(self.takes, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, whole)
