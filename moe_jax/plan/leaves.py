"""Every parameter of the model by shape, and how much of it one device holds in each form.

The same leaves as the model declares, with the same rules of sharding; a test holds the two equal.
Knows sizes and axes; must not know jax or what a parameter is for.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

from moe_jax.config import Config, Mesh, Model

# Logical axis -> mesh axes, as parallel.sharding.RULES; a test holds the two equal.
_RULES: Mapping[str, tuple[str, ...]] = {
  "layers": ("stage",), "vocab": ("stage", "tensor"), "input_vocab": ("tensor",),
  "heads": ("tensor",), "kv_heads": ("tensor",), "experts": ("expert",), "hidden": ("tensor",),
}  # fmt: skip
FLOAT32_BYTES = 4
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2}


class Shares(NamedTuple):
  """How ZeRO-1 splits an array further; as parallel.sharding.Shares.

  Attributes:
    dimension: that is split, or None where none divides.
    axes: along which, the first one major; () where it is not split.
  """

  dimension: int | None
  axes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One array of the parameter tree.

  Attributes:
    name: path, for messages.
    phase: that it belongs to, of cost.PHASES.
    shape: global; layers stand first where every layer has one.
    axes: logical axis of each dimension.
    is_float32: whether the computation takes it in float32 whatever the model's dtype.
  """

  name: str
  phase: str
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  is_float32: bool = False

  def split(self, mesh: Mesh) -> tuple[int, ...]:
    """Returns in how many parts each dimension lies."""
    return _split(self.axes, mesh)

  def elements(self, mesh: Mesh) -> int:
    """Returns the elements that a device computes with."""
    parts = self.split(mesh)
    return math.prod(size // part for size, part in zip(self.shape, parts, strict=True))

  def mesh_axes(self) -> frozenset[str]:
    """Returns the mesh axes that it is split over."""
    return frozenset(name for axis in self.axes for name in _RULES.get(axis, ()))

  def shares(self, mesh: Mesh) -> Shares:
    """Returns the shares in which ZeRO-1 splits the leaf's state over `expert` and `data` as well.

    Source: as parallel.sharding.shares.
    """
    return _shares(self.shape, self.axes, mesh)

  def is_by_layer(self, mesh: Mesh) -> bool:
    """Whether the pipeline may gather it, and sum its gradient, layer by layer: a large matrix that
    several ranks of `expert` or `data` hold alike.

    Source: as train.streaming.
    """
    if self.axes[0] != "layers" or self.is_float32:
      return False
    return bool(self.shares(mesh).dimension)

  def is_turned(self, mesh: Mesh) -> bool:
    """Whether it is turned round when copies gather it, and its gradient when they sum it: XLA has
    the dimension that is split outermost. What lies in shares over `expert` too is small, and is
    not counted.
    """
    dimension, axes = self.shares(mesh)
    return axes == ("data",) and bool(dimension)

  def is_streamed(self, settings: Config) -> bool:
    """Whether a step's copy lies in the shares of ZeRO-1, and each use gathers a layer's."""
    return settings.pipeline.prefetch_layers > 0 and self.is_by_layer(settings.mesh)

  def whole_elements(self, mesh: Mesh) -> dict[str, int]:
    """Returns, for each axis of its shares, the elements that are split along it: those of a device
    before a gradient is summed along it, and when a weight is gathered along it.
    """
    found, elements = {}, self.elements(mesh)
    for axis in self.shares(mesh).axes:
      found[axis] = elements
      elements //= getattr(mesh, axis)
    return found

  def state_elements(self, mesh: Mesh) -> int:
    """Returns the elements that a device holds of master weights, and of each moment."""
    return self.elements(mesh) // math.prod(getattr(mesh, name) for name in self.shares(mesh).axes)


# A search asks for the same arrays on the same meshes again and again.
@functools.lru_cache(maxsize=4096)
def _split(axes: tuple[str, ...], mesh: Mesh) -> tuple[int, ...]:
  of = lambda axis: math.prod(getattr(mesh, name) for name in _RULES.get(axis, ()))
  return tuple(map(of, axes))


@functools.lru_cache(maxsize=4096)
def _shares(shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh) -> Shares:
  of_experts = ["expert" in _RULES.get(axis, ()) for axis in axes]
  free = ("data",) if any(of_experts) else ("expert", "data")
  alike = tuple(name for name in free if getattr(mesh, name) > 1)
  parts = _split(axes, mesh)
  by_size = sorted(range(len(shape)), key=lambda dimension: -shape[dimension])
  for names in filter(None, (alike, alike[:1], alike[1:])):
    ranks = math.prod(getattr(mesh, name) for name in names)
    for dimension in by_size:
      if not of_experts[dimension] and shape[dimension] % (parts[dimension] * ranks) == 0:
        return Shares(dimension, names)
  return Shares(None, ())


@functools.lru_cache(maxsize=256)
def leaves(model: Model) -> tuple[Leaf, ...]:
  """Returns every leaf of the parameter tree."""
  D, N, G, H = model.d_model, model.heads, model.kv_heads, model.head_dim
  E, F, V = model.experts, model.expert_hidden, model.vocab
  layer = (
    Leaf("attention_norm", "attention", (D,), ("model",), True),
    Leaf("query", "attention", (D, N, H), ("model", "heads", "head_dim")),
    Leaf("key", "attention", (D, G, H), ("model", "kv_heads", "head_dim")),
    Leaf("value", "attention", (D, G, H), ("model", "kv_heads", "head_dim")),
    Leaf("out", "attention", (N, H, D), ("heads", "head_dim", "model")),
    *_qk_norms(model),
    Leaf("expert_norm", "dispatch", (D,), ("model",), True),
    Leaf("router", "dispatch", (D, E), ("model", "all_experts"), True),
    *([Leaf("router_bias", "dispatch", (E,), ("all_experts",), True)] * model.router_bias),
    Leaf("gate_up", "experts", (E, D, 2, F), ("experts", "model", "gate_up", "hidden")),
    Leaf("down", "experts", (E, F, D), ("experts", "hidden", "model")),
  )
  stacked = [
    dataclasses.replace(leaf, shape=(model.layers, *leaf.shape), axes=("layers", *leaf.axes))
    for leaf in layer
  ]
  shared = [
    Leaf(
      "embedding", "embed", (V, D), ("vocab" if model.tied_embeddings else "input_vocab", "model")
    ),
    Leaf("final_norm", "head", (D,), ("model",), True),
  ]
  if not model.tied_embeddings:
    shared.append(Leaf("head", "head", (D, V), ("model", "vocab")))
  return (*stacked, *shared)


def _qk_norms(model: Model) -> tuple[Leaf, ...]:
  H = model.head_dim
  shapes = {
    "none": (),
    "head": (((H,), ("head_dim",)), ((H,), ("head_dim",))),
    "projection": (
      ((model.heads, H), ("heads", "head_dim")),
      ((model.kv_heads, H), ("kv_heads", "head_dim")),
    ),
  }[model.qk_norm]
  names = ("query_norm", "key_norm")
  return tuple(
    Leaf(name, "attention", shape, axes, True)
    for name, (shape, axes) in zip(names, shapes, strict=False)
  )
