"""What one layer keeps of one micro-batch between its forward and its backward unit, in bytes.

Held to the shapes that the executor keeps by a test. Knows sizes; must not know time or schedules.
"""

from moe_jax.config import Config
from moe_jax.plan.leaves import FLOAT32_BYTES
from moe_jax.plan.steps import Sizes

_INT_BYTES = 4
# As moe.grouped: rows of a block, and blocks of an expert under an even load; a test holds them.
_SMALLEST_BLOCK, _LARGEST_BLOCK, _BLOCKS_PER_EXPERT = 64, 512, 8


def saved_bytes(settings: Config, at: Sizes) -> int:
  """Returns what one layer keeps of one micro-batch between its forward and backward units.

  inputs: the layer's input. residuals: that, the gathered positions, attention's queries, keys,
  values, output and logarithms, its sum with the input, rows that arrived and rows that came back,
  gate and up, and where rows lie. everything: those, what elementwise steps made of the hidden
  units, norms in float32, and the turns of the rotary embedding.
  """
  model, tensor = settings.model, settings.mesh.tensor
  activation = at.tokens * model.d_model * at.dtype_bytes
  if settings.pipeline.save == "inputs":
    return activation
  whole = at.sequences * at.positions
  n, g, H = model.heads // tensor, model.kv_heads // tensor, model.head_dim
  arrived, hidden, integers = _kept_rows(settings, at)
  heads = whole * (2 * n + 2 * g) * H * at.dtype_bytes + whole * n * FLOAT32_BYTES
  gathered = whole * model.d_model * at.dtype_bytes
  rows = arrived + arrived // tensor + 2 * hidden + integers
  attention = heads + gathered
  is_dropless = settings.moe.dispatch == "dropless"
  if settings.pipeline.save == "residuals":
    # What enters a step of the tied layer is kept too: the product of gate and up, or the tokens.
    entering = activation if is_dropless else hidden
    weights = at.tokens * model.experts_per_token * FLOAT32_BYTES
    return attention + rows + 2 * activation + entering + weights
  made_of_hidden = 0 if is_dropless else 4 * hidden
  norms = (5 * model.d_model + 2 * model.experts + 8) * at.tokens * FLOAT32_BYTES
  turns = 8 * whole * H // 2 * FLOAT32_BYTES
  return attention + rows + made_of_hidden + norms + turns


def row_bytes(settings: Config, at: Sizes) -> tuple[int, int]:
  """Returns bytes of the rows that reach this rank's experts, and of their hidden units."""
  model, tensor = settings.model, settings.mesh.tensor
  rows = tensor * at.rows * at.dtype_bytes
  return rows * model.d_model, rows * (model.expert_hidden // tensor)


def _kept_rows(settings: Config, at: Sizes) -> tuple[int, int, int]:
  """Returns bytes of the rows that arrived, of one array of hidden units, and of the integers that
  say where rows lie.
  """
  model, mesh = settings.model, settings.mesh
  arrived, hidden = row_bytes(settings, at)
  choices = at.tokens * model.experts_per_token
  if settings.moe.dispatch != "dropless":
    return arrived, hidden, _INT_BYTES * (model.experts + choices + at.rows)
  # Without loss the hidden units lie in blocks of rows of one expert, as moe.grouped cuts them.
  rows, experts = mesh.tensor * at.rows, model.experts // mesh.expert
  wanted = max(1, rows // (experts * _BLOCKS_PER_EXPERT))
  block = min(_LARGEST_BLOCK, max(_SMALLEST_BLOCK, 1 << wanted.bit_length() - 1))
  places = (rows // block + experts) * block
  sources = mesh.expert * mesh.tensor * experts
  integers = _INT_BYTES * (4 * choices + places + rows + model.experts + sources)
  return arrived, places * (model.expert_hidden // mesh.tensor) * at.dtype_bytes, integers
