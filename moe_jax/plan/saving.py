"""What one layer keeps of one micro-batch between its forward and its backward unit, in bytes.

Held to the shapes that the executor keeps by a test. Knows sizes; must not know time or schedules.
"""

from moe_jax.config import Config
from moe_jax.plan import cost
from moe_jax.plan.leaves import FLOAT32_BYTES
from moe_jax.plan.steps import Sizes, two_level_rows

_INT_BYTES = 4
ROWS_PER_BLOCK = 64  # of a dropless dispatch, all one expert's; as in moe.grouped: a test holds it


def saved_bytes(settings: Config, at: Sizes) -> int:
  """Returns what one layer keeps of one micro-batch between its forward and backward units.

  inputs: the layer's input. exchanges: that, what attention adds to it, rows as collectives brought
  them both ways but for gathers inside a host, and where rows lie. residuals: the input, the
  gathered positions, attention's queries, keys, values, output and logarithms, its sum with the
  input, rows that arrived and rows that came back, gate and up, and where rows lie. everything:
  those, the product of gate and up of a batched layer, norms in float32, and the turns of the
  rotary embedding.
  """
  model, tensor = settings.model, settings.mesh.tensor
  activation = at.tokens * model.d_model * at.dtype_bytes
  if settings.pipeline.save == "inputs":
    return activation
  whole = at.sequences * at.positions
  n, g, H = model.heads // tensor, model.kv_heads // tensor, model.head_dim
  arrived, hidden, integers = _kept_rows(settings, at)
  if settings.pipeline.save == "exchanges":
    return (1 + (tensor > 1)) * activation + _brought_bytes(settings, at) + integers
  heads = whole * (2 * n + 2 * g) * H * at.dtype_bytes + whole * n * FLOAT32_BYTES
  gathered = whole * model.d_model * at.dtype_bytes
  rows = arrived + arrived // tensor + 2 * hidden + integers + _kept_more(settings, at)
  attention = heads + gathered
  is_dropless = settings.moe.dispatch in cost.EVERY_ASSIGNMENT
  if settings.pipeline.save == "residuals":
    # What enters a step of the tied layer is kept too: of a dropless one the tokens; and the
    # router's logits, of which the layer's last step takes statistics.
    entering = activation if is_dropless else 0
    routed = at.tokens * (model.experts_per_token + model.experts) * FLOAT32_BYTES
    return attention + rows + 2 * activation + entering + routed
  made_of_hidden = 0 if is_dropless else hidden
  norms = (5 * model.d_model + 2 * model.experts + 8) * at.tokens * FLOAT32_BYTES
  return attention + rows + made_of_hidden + norms + turns_bytes(settings, at)


def _brought_bytes(settings: Config, at: Sizes) -> int:
  """Returns bytes of the rows that one layer's collectives brought, there and back, without what
  gathers inside a host make of them.
  """
  arrived, _ = row_bytes(settings, at)
  model, mesh, moe = settings.model, settings.mesh, settings.moe
  sent = arrived // mesh.tensor
  there, back = (arrived if moe.exchange == "flat" else sent), sent
  if mesh.expert == 1:
    there, back = 0, sent * (mesh.tensor > 1)
  if moe.dispatch == "stealing":
    return there + back + _INT_BYTES * (moe.shadows + model.experts)
  if moe.dispatch != "two_level":
    return there + back
  # Between hosts rows, choices and weights; inside a host each row both ways, and where it goes.
  crossed, integers = _between_hosts(settings, at)
  weights = crossed * model.experts_per_token * FLOAT32_BYTES
  return there + back + crossed * model.d_model * at.dtype_bytes + integers + weights


def merged_bytes(settings: Config, at: Sizes) -> int:
  """Returns how many of `saved_bytes` XLA finds to be kept twice: the turns of queries and keys are
  the same.
  """
  return turns_bytes(settings, at) // 2 if settings.pipeline.save == "everything" else 0


def turns_bytes(settings: Config, at: Sizes) -> int:
  """Returns the bytes of the rotary embedding's sines and cosines, each kept twice."""
  return 8 * at.sequences * at.positions * settings.model.head_dim // 2 * FLOAT32_BYTES


def row_bytes(settings: Config, at: Sizes) -> tuple[int, int]:
  """Returns bytes of the rows that reach this rank's experts, and of their hidden units."""
  model, tensor = settings.model, settings.mesh.tensor
  rows = tensor * at.rows * at.dtype_bytes
  return rows * model.d_model, rows * (model.expert_hidden // tensor)


def expert_bytes(settings: Config, at: Sizes) -> int:
  """Returns bytes of one layer's experts on this device, their three matrices."""
  model, mesh = settings.model, settings.mesh
  matrix = model.d_model * (model.expert_hidden // mesh.tensor)
  return model.experts // mesh.expert * 3 * matrix * at.dtype_bytes


def placed_hidden_bytes(settings: Config, at: Sizes) -> int:
  """Returns bytes of an array of hidden units of a dropless dispatch in blocks of one expert each,
  as moe.grouped cuts them.
  """
  width = settings.model.expert_hidden // settings.mesh.tensor
  return _num_places(settings, at) * at.dtype_bytes * width


def _num_places(settings: Config, at: Sizes) -> int:
  rows, experts = _rows_and_experts(settings, at)
  return (rows // ROWS_PER_BLOCK + experts) * ROWS_PER_BLOCK


def _rows_and_experts(settings: Config, at: Sizes) -> tuple[int, int]:
  mesh, moe = settings.mesh, settings.moe
  shadows = moe.shadows if moe.dispatch == "stealing" else 0
  return mesh.tensor * at.rows, settings.model.experts // mesh.expert + shadows


def _kept_more(settings: Config, at: Sizes) -> int:
  """Returns what single dispatches keep besides: which experts are the shadows; rows, choices and
  weights of tokens on their way between hosts, and where they were passed on to.
  """
  model, moe = settings.model, settings.moe
  if moe.dispatch == "stealing":
    return _INT_BYTES * moe.shadows
  if moe.dispatch != "two_level":
    return 0
  crossed, integers = _between_hosts(settings, at)
  return 2 * crossed * model.d_model * at.dtype_bytes + integers


def _between_hosts(settings: Config, at: Sizes) -> tuple[int, int]:
  """Returns the rows of a two_level dispatch that cross hosts, and the bytes of their choices and
  of where they are passed on to.
  """
  hosts = settings.mesh.expert // settings.moe.expert_ranks_per_host
  crossed = hosts * two_level_rows(settings, at.tokens)[0]
  choices = crossed * settings.model.experts_per_token
  return crossed, _INT_BYTES * (at.rows + 2 * choices)


def _kept_rows(settings: Config, at: Sizes) -> tuple[int, int, int]:
  """Returns bytes of the rows that arrived, of one array of hidden units, and of the integers that
  say where rows lie.
  """
  model, mesh = settings.model, settings.mesh
  arrived, hidden = row_bytes(settings, at)
  choices = at.tokens * model.experts_per_token
  if settings.moe.dispatch not in cost.EVERY_ASSIGNMENT:
    return arrived, hidden, _INT_BYTES * (choices + at.rows)
  rows, experts = _rows_and_experts(settings, at)
  sources = mesh.expert * mesh.tensor * experts
  integers = 4 * choices + _num_places(settings, at) + rows + sources
  return arrived, placed_hidden_bytes(settings, at), _INT_BYTES * integers
