"""What one device does in one go: steps of computation and communication, and their sizes.

Knows shapes; must not know which steps a unit has, or time.

Letters as in the README: b, t, n, g, e, f, v are this device's shares.
"""

import dataclasses
import functools
import math

from moe_jax.config import Config
from moe_jax.plan.leaves import DTYPE_BYTES, FLOAT32_BYTES

COMPUTE = "compute"
FORWARD, AGAIN, BACKWARD = "forward", "again", "backward"


@dataclasses.dataclass(frozen=True)
class Step:
  """One piece of work of one device, once.

  Attributes:
    name: unique within its unit.
    phase: of cost.PHASES, "optimizer" or "other".
    kind: COMPUTE, or the kind of collective, of links.KINDS.
    part: FORWARD, AGAIN or BACKWARD.
    axes: of a collective, outermost first.
    operand_bytes: of a collective: what this device puts in.
    flops: of matrix products.
    num_bytes: to and from memory.
    kernels: launched.
    is_float32: whether the products are exact float32 ones.
    follows_load: whether it grows with the rows that reach this rank's experts.
  """

  name: str
  phase: str
  kind: str = COMPUTE
  part: str = FORWARD
  axes: tuple[str, ...] = ()
  operand_bytes: float = 0.0
  flops: float = 0.0
  num_bytes: float = 0.0
  kernels: int = 0
  is_float32: bool = False
  follows_load: bool = False

  @property
  def is_communication(self) -> bool:
    return self.kind != COMPUTE


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What one device works on in one micro-batch, in elements and bytes.

  Attributes:
    sequences: b.
    positions: S of this pass: 1 in decode.
    tokens: t, of this tensor rank.
    context: key positions that each query's row has in the cache before this pass.
    rows: C x E (capacity, dense) or B x X (dropless): rows that this device sends in a round.
    dtype_bytes: of activations.
  """

  sequences: int
  positions: int
  tokens: int
  context: int
  rows: int
  dtype_bytes: int


@functools.lru_cache(maxsize=4096)
def sizes(settings: Config, positions: int = 0, context: int = 0) -> Sizes:
  """Returns the sizes of a micro-batch on one device.

  Args:
    settings: the deployment.
    positions: of each sequence in this pass; 0 is train.sequence.
    context: positions already in the key-value cache.
  """
  model, mesh, train, moe = settings.model, settings.mesh, settings.train, settings.moe
  positions = positions or train.sequence
  sequences = max(1, train.batch // (settings.pipeline.micro_batches * mesh.expert))
  tokens = max(1, sequences * positions // mesh.tensor)
  assignments = tokens * model.experts_per_token
  if moe.dispatch == "capacity":
    each = min(tokens, max(1, math.ceil(moe.capacity_factor * assignments / model.experts)))
    rows = model.experts * each
  elif moe.dispatch in ("dense", "gathered"):
    rows = model.experts * tokens
  else:
    each = min(assignments, max(1, math.ceil(moe.capacity_factor * assignments / mesh.expert)))
    rows = mesh.expert * each
  return Sizes(sequences, positions, tokens, context, rows, DTYPE_BYTES[model.dtype])


def activation_bytes(settings: Config, at: Sizes) -> int:
  """Returns the bytes of what stands between two layers, on one device."""
  return at.tokens * settings.model.d_model * at.dtype_bytes


def vocabulary(settings: Config) -> int:
  """Returns this device's share of the vocabulary."""
  return settings.model.vocab // (settings.mesh.stage * settings.mesh.tensor)


def logits_bytes(settings: Config, at: Sizes) -> int:
  """Returns the bytes of the logits of a micro-batch, float32, on one device."""
  return at.sequences * at.positions * vocabulary(settings) * FLOAT32_BYTES
