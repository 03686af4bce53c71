"""What a token at an expert takes and how fast weights travel, from a deployment's sizes and a
chip's table: by these a change of place has to pay for itself.

Knows widths and chips; must not know loads, placements or devices.
"""

from moe_jax import config
from moe_jax.plan.hardware import Chip

ITEM_BYTES = {"bfloat16": 2, "float32": 4}


def weights(settings: config.Config) -> int:
  """Returns how many weights of one expert a device holds."""
  model = settings.model
  return 3 * model.d_model * model.expert_hidden // settings.mesh.tensor


def token_seconds(settings: config.Config, chip: Chip) -> float:
  """Returns the seconds of one token at one expert, there and back, forward and backward.

  Raises:
    ValueError: the chip's table has no figure for the model's dtype.
  """
  model = settings.model
  # Each tensor rank sends its share of a token's width.
  row_bytes = 4 * ITEM_BYTES[model.dtype] * model.d_model / settings.mesh.tensor
  # A multiply-add is two; the backward pass has twice the forward's products.
  computed_s = 3 * 2 * weights(settings) / chip.flops_per_s(model.dtype)
  return computed_s + row_bytes / link_bytes_per_s(settings, chip)


def link_bytes_per_s(settings: config.Config, chip: Chip) -> float:
  """Returns the rate into one device from other ranks of `expert`: between hosts, unless the
  deployment says that they share one.
  """
  if settings.moe.expert_ranks_per_host == settings.mesh.expert > 1:
    return chip.inside_bytes_per_s
  return chip.between_bytes_per_s
