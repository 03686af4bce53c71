"""FLOPs that the program multiplies, by phase, from formulas: an oracle for counts made otherwise.

Model FLOPs (plan.cost), and padded rows, masked pairs in diagonal blocks, layers computed again.
"""

import dataclasses
import math

from moe_jax.config import Config
from moe_jax.plan import cost
from moe_jax.plan.cost import BACKWARD_PER_FORWARD, ByPhase


def expert_rows(settings: Config) -> int:
  """Returns how many rows the experts of one layer multiply in a step, over all devices.

  A device plans for itself: a micro-batch leaves it t = batch / (U x expert x data) x S / tensor
  tokens.
    capacity: every expert has C = ceil(capacity_factor x t K / E) rows (at most t) from each device
    dense: every expert takes every token
    those of EVERY_ASSIGNMENT: each has its row; the rows that fill up blocks depend on the text,
      and are not counted
  """
  model, mesh, train = settings.model, settings.mesh, settings.train
  step_tokens = train.batch * train.sequence
  sources = settings.pipeline.micro_batches * mesh.sequence_shares * mesh.tensor
  tokens = step_tokens // sources
  if settings.moe.dispatch in cost.EVERY_ASSIGNMENT:
    return step_tokens * model.experts_per_token
  if settings.moe.dispatch == "dense":
    return step_tokens * model.experts
  even_share = tokens * model.experts_per_token / model.experts
  rows = min(tokens, max(1, math.ceil(settings.moe.capacity_factor * even_share)))
  return sources * model.experts * rows


def forward_flops(settings: Config, block_tokens: int) -> ByPhase:
  """Returns the FLOPs that a forward pass over a step's batch multiplies.

  As `cost.forward_flops`, with the rows of `expert_rows` and the pairs of `cost.blockwise_pairs`.
  Cells that a pipeline schedule leaves idle are not counted here: they run while another stage
  works.

  Args:
    settings: the deployment.
    block_tokens: positions of an attention block.
  """
  model, train = settings.model, settings.train
  needed = cost.forward_flops(model, [train.sequence] * train.batch)
  masked = cost.blockwise_pairs(train.sequence, block_tokens) - cost.causal_pairs([train.sequence])
  return dataclasses.replace(
    needed,
    attention=needed.attention + model.layers * _pair_flops(settings, train.batch * masked),
    experts=model.layers * expert_rows(settings) * 6 * model.d_model * model.expert_hidden,
  )


def train_flops(settings: Config, block_tokens: int, backward_products: int = 5) -> ByPhase:
  """Returns the FLOPs that a training step multiplies.

  The backward pass of blockwise attention computes the scores again, half of the pairs' forward
  work, whatever is saved. pipeline.save=inputs computes every layer again before its backward pass,
  "exchanges" what no collective brought: not attention's last product, nor the experts'.
  "residuals" and "everything" keep the results of the products.

  Args:
    settings: the deployment.
    block_tokens: positions of an attention block.
    backward_products: matrix products over pairs in attention's backward pass: what is beyond the
      four gradients of the forward pass's two is computed again.
  """
  model, mesh, train = settings.model, settings.mesh, settings.train
  forward = forward_flops(settings, block_tokens)
  pairs = train.batch * cost.blockwise_pairs(train.sequence, block_tokens)
  again = (backward_products - 2 * BACKWARD_PER_FORWARD) / 2
  scores_again = again * model.layers * _pair_flops(settings, pairs)
  passes = 1 + BACKWARD_PER_FORWARD + settings.pipeline.multiplies_again
  step = forward.times(passes)
  attention, experts = step.attention + scores_again, step.experts
  if settings.pipeline.save == "exchanges":
    tokens = train.batch * train.sequence
    attention -= model.layers * cost.output_flops(model, tokens) * (mesh.tensor > 1)
    experts -= cost.DOWN_SHARE * forward.experts * (mesh.expert * mesh.tensor > 1)
  head = forward.head * (1 + BACKWARD_PER_FORWARD)
  return dataclasses.replace(step, attention=attention, experts=experts, head=head)


def _pair_flops(settings: Config, pairs: int) -> int:
  return 4 * pairs * settings.model.heads * settings.model.head_dim
