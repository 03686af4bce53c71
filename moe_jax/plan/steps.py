"""What one device does in one go: steps of computation and communication, and their sizes.

Knows shapes; must not know which steps a unit has, or time.

Letters as in the README: b, t, n, g, e, f, v are this device's shares.
"""

import dataclasses
import functools
import math

from moe_jax.config import Config, Mesh
from moe_jax.plan import cost
from moe_jax.plan.leaves import DTYPE_BYTES, FLOAT32_BYTES

COMPUTE = "compute"
FORWARD, AGAIN, BACKWARD = "forward", "again", "backward"
# What a step grows with under an uneven load.
ROWS, ROUNDS = "rows", "rounds"
# Of the key-value cache, by serve.kv_dtype: bytes of a number, and of each token and head's scale.
_CACHED_BYTES = {"float32": (4, 0), "bfloat16": (2, 0), "int8": (1, 4), "float8": (1, 4)}


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
    integer_bytes: of these those of integers, which have no gradient.
    flops: of matrix products.
    num_bytes: to and from memory.
    kernels: launched.
    is_float32: whether the products are exact float32 ones.
    follows: ROWS, where it grows with the rows that this rank's experts multiply; ROUNDS, where it
      takes as long in every round, however full; "" where no load changes it.
    among: of a collective over `expert` in which only a part takes part: "hosts", one rank of each
      host, or "ranks", those of one host.
  """

  name: str
  phase: str
  kind: str = COMPUTE
  part: str = FORWARD
  axes: tuple[str, ...] = ()
  operand_bytes: float = 0.0
  integer_bytes: float = 0.0
  flops: float = 0.0
  num_bytes: float = 0.0
  kernels: int = 0
  is_float32: bool = False
  follows: str = ""
  among: str = ""

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
    rows: rows that this device sends in a round: C x E (capacity, dense), B x X (dropless), or to
      the ranks of its host (two_level).
    dtype_bytes: of activations.
  """

  sequences: int
  positions: int
  tokens: int
  context: int
  rows: int
  dtype_bytes: int


@functools.lru_cache(maxsize=4096)
def sizes(settings: Config, positions: int = 0, context: int = 0, parts: int = 1) -> Sizes:
  """Returns the sizes of a micro-batch on one device.

  Args:
    settings: the deployment.
    positions: of each sequence in this pass; 0 is train.sequence.
    context: positions already in the key-value cache.
    parts: into which its sequences fall; the sizes are of one of them.
  """
  model, mesh, train, moe = settings.model, settings.mesh, settings.train, settings.moe
  positions = positions or train.sequence
  ranks = settings.pipeline.micro_batches * mesh.sequence_shares
  sequences = max(1, train.batch // (ranks * parts))
  tokens = max(1, sequences * positions // mesh.tensor)
  assignments = tokens * model.experts_per_token
  if moe.dispatch == "capacity":
    each = min(tokens, max(1, math.ceil(moe.capacity_factor * assignments / model.experts)))
    rows = model.experts * each
  elif moe.dispatch in ("dense", "gathered"):
    rows = model.experts * tokens
  elif moe.dispatch == "two_level":
    rows = moe.expert_ranks_per_host * two_level_rows(settings, tokens)[1]
  else:
    each = min(assignments, max(1, math.ceil(moe.capacity_factor * assignments / mesh.expert)))
    rows = mesh.expert * each
  return Sizes(sequences, positions, tokens, context, rows, DTYPE_BYTES[model.dtype])


def gather_over(name: str, axis: str, mesh: Mesh, share_bytes: float) -> Step:
  """Returns the gather of parameters along an axis, of which each device brings so many bytes:
  between copies they go to each device directly.
  """
  if axis != "data":
    return Step(name, "other", "all-gather", axes=(axis,), operand_bytes=share_bytes)
  return Step(name, "other", "all-to-all", axes=(axis,), operand_bytes=share_bytes * mesh.data)


def sum_over(name: str, axis: str, num_bytes: float) -> Step:
  """Returns the sum of so many bytes of gradients into shares along an axis, as `gather_over`."""
  kind = "all-to-all" if axis == "data" else "reduce-scatter"
  return Step(name, "other", kind, BACKWARD, (axis,), num_bytes)


def two_level_rows(settings: Config, tokens: int) -> tuple[int, int]:
  """Returns the rows that a device of so many tokens sends to each host, and to each rank of its
  own host, in a round; as moe.two_level has them, a test holds the two equal.
  """
  moe, choices = settings.moe, settings.model.experts_per_token
  hosts = settings.mesh.expert // moe.expert_ranks_per_host
  share = lambda number, parts: max(1, math.ceil(moe.capacity_factor * number / parts))
  most_hosts = min(moe.hosts_per_token or choices, choices, hosts)
  to_host = min(tokens, share(tokens * most_hosts, hosts))
  to_rank = share(tokens * choices, moe.expert_ranks_per_host)
  return to_host, min(hosts * to_host * choices, to_rank)


def even_rounds(settings: Config) -> int:
  """Returns the rounds that an even load takes: of a dispatch that serves every assignment, one
  unless its capacity factor is below 1.
  """
  if settings.moe.dispatch not in cost.EVERY_ASSIGNMENT:
    return 1
  return max(1, math.ceil(1 / settings.moe.capacity_factor - 1e-9))


def crossing_row_bytes(settings: Config) -> int:
  """Returns the bytes of a row on its way between hosts: of float8 its elements and one scale."""
  model = settings.model
  if settings.moe.exchange == "hierarchical_float8":
    return model.d_model + FLOAT32_BYTES
  return model.d_model * DTYPE_BYTES[model.dtype]


def cached_bytes(settings: Config) -> int:
  """Returns the bytes of the key and the value of one token and head in the cache, and of their
  scales; a test holds them to the server's.
  """
  number, scale = _CACHED_BYTES[settings.serve.kv_dtype]
  return 2 * (settings.model.head_dim * number + scale)


def group_size(settings: Config, step: Step) -> int:
  """Returns how many devices take part in a collective."""
  mesh, ranks = settings.mesh, settings.moe.expert_ranks_per_host
  part = {"": mesh.expert, "hosts": mesh.expert // ranks, "ranks": ranks}[step.among]
  return math.prod(part if axis == "expert" else getattr(mesh, axis) for axis in step.axes)


def activation_bytes(settings: Config, at: Sizes) -> int:
  """Returns the bytes of what stands between two layers, on one device."""
  return at.tokens * settings.model.d_model * at.dtype_bytes


def vocabulary(settings: Config) -> int:
  """Returns this device's share of the vocabulary."""
  return settings.model.vocab // (settings.mesh.stage * settings.mesh.tensor)


def logits_bytes(settings: Config, at: Sizes) -> int:
  """Returns the bytes of the logits of a micro-batch, float32, on one device."""
  return at.sequences * at.positions * vocabulary(settings) * FLOAT32_BYTES
