"""Every parameter of the model by shape, and how much of it one device holds in each form.

The same leaves as the model declares, with the same rules of sharding; a test holds the two equal.
Knows sizes and axes; must not know jax or what a parameter is for.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

from moe_jax.config import Config, Mesh, Model

# Logical axis -> mesh axes, as parallel.sharding.RULES; a test holds the two equal.
_RULES: Mapping[str, tuple[str, ...]] = {
  "layers": ("stage",), "vocab": ("stage", "tensor"), "input_vocab": ("tensor",),
  "heads": ("tensor",), "kv_heads": ("tensor",), "experts": ("expert",), "hidden": ("tensor",),
}  # fmt: skip
FLOAT32_BYTES = 4
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2}


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

  def zero_dimension(self, mesh: Mesh) -> int | None:
    """Returns the dimension that ZeRO-1 splits over `expert` as well, or None.

    Source: as parallel.sharding.zero_dimension.
    """
    return _zero_dimension(self.shape, self.axes, mesh)

  def is_zero_split(self, mesh: Mesh) -> bool:
    """Whether ZeRO-1 splits the leaf's state over `expert` as well."""
    return self.zero_dimension(mesh) is not None

  def is_by_layer(self, mesh: Mesh) -> bool:
    """Whether the pipeline may gather it, and sum its gradient, layer by layer: a large matrix that
    every rank of `expert` holds alike.

    Source: as train.streaming.
    """
    if mesh.expert == 1 or self.axes[0] != "layers" or self.is_float32:
      return False
    return bool(self.zero_dimension(mesh))

  def is_streamed(self, settings: Config) -> bool:
    """Whether a step's copy lies in the shares of ZeRO-1, and each use gathers a layer's."""
    return settings.pipeline.prefetch_layers > 0 and self.is_by_layer(settings.mesh)

  def state_axes(self, mesh: Mesh) -> list[frozenset[str]]:
    """Returns, for each dimension, the mesh axes of more than one device that its state is split
    over.
    """
    found = [set(_RULES.get(axis, ())) for axis in self.axes]
    zero = self.zero_dimension(mesh)
    if zero is not None:
      found[zero].add("expert")
    return [frozenset(name for name in axes if getattr(mesh, name) > 1) for axes in found]

  def state_elements(self, mesh: Mesh) -> int:
    """Returns the elements that a device holds of master weights, and of each moment."""
    whole = self.elements(mesh)
    return whole // mesh.expert if self.is_zero_split(mesh) else whole


# A search asks for the same arrays on the same meshes again and again.
@functools.lru_cache(maxsize=4096)
def _split(axes: tuple[str, ...], mesh: Mesh) -> tuple[int, ...]:
  of = lambda axis: math.prod(getattr(mesh, name) for name in _RULES.get(axis, ()))
  return tuple(map(of, axes))


@functools.lru_cache(maxsize=4096)
def _zero_dimension(shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh) -> int | None:
  if any("expert" in _RULES.get(axis, ()) for axis in axes):
    return None
  parts = _split(axes, mesh)
  by_size = sorted(range(len(parts)), key=lambda dimension: -shape[dimension])
  fits = lambda dimension: shape[dimension] % (parts[dimension] * mesh.expert) == 0
  return next(filter(fits, by_size), None)


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
