"""What the model costs, by phase, from its sizes alone: operations and parameters.

Operations are *model* FLOPs, what the mathematics needs: each token's K experts, each pair of
positions that may attend; the ratio of a speed to a peak is always of them. What the program
multiplies beside them, padded rows, masked pairs and layers computed again, stands in its steps
(plan.phases). They count matrix products only, a multiply-add as two; norms, softmax, activations,
rotary turns and sums of rows count nothing, as is usual, and so does the lookup of the embedding.
Knows sizes; must not know jax, devices or time.
"""

import dataclasses
import math
from collections.abc import Sequence

from moe_jax.config import Model

PHASES = ("embed", "attention", "dispatch", "experts", "combine", "head")

# A product Y = X W has two in its gradient, of equal size: dX = dY W^T and dW = X^T dY.
BACKWARD_PER_FORWARD = 2
DOWN_SHARE = 1 / 3  # of an expert's FLOPs: of gate, up and down

# Dispatches that serve every assignment, and once.
EVERY_ASSIGNMENT = ("dropless", "stealing", "ragged", "two_level")


@dataclasses.dataclass(frozen=True)
class ByPhase:
  """One number for each phase, over all layers of the model."""

  embed: float = 0
  attention: float = 0
  dispatch: float = 0
  experts: float = 0
  combine: float = 0
  head: float = 0

  @property
  def total(self) -> float:
    """The sum over phases."""
    return sum(dataclasses.astuple(self))

  def times(self, factor: float) -> "ByPhase":
    """Returns every number multiplied by `factor`."""
    return ByPhase(*(factor * value for value in dataclasses.astuple(self)))


def causal_pairs(document_tokens: Sequence[int]) -> int:
  """Returns how many (position, earlier or same position) pairs attend.

  The first position of a document sees one key, the last S: 1 + 2 + ... + S = S (S + 1) / 2.

  Args:
    document_tokens: tokens of each document; attention restarts at each.

  >>> causal_pairs([3, 1])
  7
  """
  return sum(length * (length + 1) // 2 for length in document_tokens)


def blockwise_pairs(sequence_tokens: int, block_tokens: int) -> int:
  """Returns how many pairs blockwise-causal attention multiplies for one row of text.

  Of I = ceil(S / J) blocks of J positions, those on or below the diagonal: I (I + 1) / 2 x J^2.

  >>> blockwise_pairs(512, 128), causal_pairs([512])
  (163840, 131328)
  """
  block_tokens = min(block_tokens, sequence_tokens)
  num_blocks = math.ceil(sequence_tokens / block_tokens)
  return num_blocks * (num_blocks + 1) // 2 * block_tokens**2


def forward_flops(model: Model, document_tokens: Sequence[int]) -> ByPhase:
  """Returns the model FLOPs of a forward pass over documents.

  With T tokens in all, each layer takes
    attention: 2 T D (2 N + 2 G) H for queries, keys, values and output, and 4 N H for every pair,
      2 H for its score and 2 H for its share of the values in each of N heads
    dispatch: 2 T D E for the router
    experts: K rows for each token, 6 D F each: gate, up and down projection
  and once there are 2 T D V for the head.

  Args:
    model: the sizes.
    document_tokens: tokens of each document; a batch of B whole rows of S tokens is [S] * B.
  """
  T, D, L = sum(document_tokens), model.d_model, model.layers
  pair_flops = 4 * causal_pairs(document_tokens) * model.heads * model.head_dim
  return ByPhase(
    attention=L * (2 * T * _projection_elements(model) + pair_flops),
    dispatch=L * 2 * T * D * model.experts,
    experts=L * T * model.experts_per_token * 6 * D * model.expert_hidden,
    head=2 * T * D * model.vocab,
  )


def train_flops(model: Model, document_tokens: Sequence[int]) -> ByPhase:
  """Returns the model FLOPs of a training step: one forward and one backward pass.

  The optimizer has no matrix products.
  """
  return forward_flops(model, document_tokens).times(1 + BACKWARD_PER_FORWARD)


def prefill_flops(model: Model, prompt_tokens: Sequence[int]) -> ByPhase:
  """Returns the model FLOPs of prompts' first tokens, and of the keys and values that later tokens
  attend to.

  As a forward pass but for the last layer and the head: behind the last layer's keys and values,
  2 T D 2 G H, only each prompt's last position is asked for.

  Args:
    model: the sizes.
    prompt_tokens: tokens of each prompt.
  """
  D, N, G, H = model.d_model, model.heads, model.kv_heads, model.head_dim
  before = forward_flops(dataclasses.replace(model, layers=model.layers - 1), prompt_tokens)
  last = forward_flops(dataclasses.replace(model, layers=1), [1] * len(prompt_tokens))
  earlier = sum(prompt_tokens) - len(prompt_tokens)  # positions, each a key of one query
  keys, pairs = 2 * earlier * D * 2 * G * H, 4 * earlier * N * H
  return ByPhase(
    attention=before.attention + last.attention + keys + pairs,
    dispatch=before.dispatch + last.dispatch,
    experts=before.experts + last.experts,
    head=last.head,
  )


def output_flops(model: Model, tokens: int) -> int:
  """Returns the FLOPs of one layer's product of attention's heads with the output matrix."""
  return 2 * tokens * model.d_model * model.heads * model.head_dim


def num_parameters(model: Model) -> ByPhase:
  """Returns how many parameters the model has, norms counted with the phase that they precede.

  Each layer: attention D (2 N + 2 G) H + D, and with a norm of queries and keys 2 H more (of heads)
  or (N + G) H more (of the projection); router D E + D (dispatch), and with a bias E more; experts
  3 E D F. Once:
  embedding V D, final norm D, and the head's kernel D V unless it is the embedding.
  """
  D, L = model.d_model, model.layers
  return ByPhase(
    embed=model.vocab * D,
    attention=L * (_projection_elements(model) + _qk_norm_elements(model) + D),
    dispatch=L * (D * model.experts + D + model.router_bias * model.experts),
    experts=L * 3 * model.experts * D * model.expert_hidden,
    head=D + (0 if model.tied_embeddings else D * model.vocab),
  )


def _projection_elements(model: Model) -> int:
  return model.d_model * (2 * model.heads + 2 * model.kv_heads) * model.head_dim


def _qk_norm_elements(model: Model) -> int:
  heads = {"none": 0, "head": 2, "projection": model.heads + model.kv_heads}[model.qk_norm]
  return heads * model.head_dim
