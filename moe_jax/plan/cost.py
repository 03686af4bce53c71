"""What the model costs, by phase, from its sizes alone: operations, parameters, bytes of state.

Two counts of operations. *Model* FLOPs are what the mathematics needs: each token's K experts, each
pair of positions that may attend. *Executed* FLOPs are what this implementation multiplies: padded
rows, masked pairs in diagonal blocks, layers computed again. The ratio of a speed to a peak is
always of model FLOPs. Both count matrix products only, a multiply-add as two; norms, softmax,
activations, rotary turns and sums of rows count nothing, as is usual, and so does the lookup of the
embedding. Knows sizes; must not know jax, devices or time.
"""

import dataclasses
import math
import operator
from collections.abc import Sequence

from moe_jax.config import Config, Model

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

  def plus(self, other: "ByPhase") -> "ByPhase":
    """Returns the sums of both numbers of each phase."""
    return ByPhase(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))


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
  T = sum(document_tokens)
  return _forward(model, T, causal_pairs(document_tokens), T * model.experts_per_token)


def backward_flops(model: Model, document_tokens: Sequence[int]) -> ByPhase:
  """Returns the model FLOPs of a backward pass: twice the forward's (BACKWARD_PER_FORWARD)."""
  return forward_flops(model, document_tokens).times(BACKWARD_PER_FORWARD)


def train_flops(model: Model, document_tokens: Sequence[int]) -> ByPhase:
  """Returns the model FLOPs of a training step: one forward and one backward pass.

  The optimizer has no matrix products.
  """
  return forward_flops(model, document_tokens).times(1 + BACKWARD_PER_FORWARD)


def expert_rows(settings: Config) -> int:
  """Returns how many rows the experts of one layer multiply in a step, over all devices.

  A device plans for itself: a micro-batch leaves it t = batch / (U x expert) x S / tensor tokens.
    capacity: every expert has C = ceil(capacity_factor x t K / E) rows (at most t) from each device
    dense: every expert takes every token
    those of EVERY_ASSIGNMENT: each has its row; the rows that fill up blocks depend on the text,
      and are not counted
  """
  model, mesh, train = settings.model, settings.mesh, settings.train
  step_tokens = train.batch * train.sequence
  sources = settings.pipeline.micro_batches * mesh.expert * mesh.tensor
  tokens = step_tokens // sources
  if settings.moe.dispatch in EVERY_ASSIGNMENT:
    return step_tokens * model.experts_per_token
  if settings.moe.dispatch == "dense":
    return step_tokens * model.experts
  even_share = tokens * model.experts_per_token / model.experts
  rows = min(tokens, max(1, math.ceil(settings.moe.capacity_factor * even_share)))
  return sources * model.experts * rows


def executed_forward_flops(settings: Config, block_tokens: int) -> ByPhase:
  """Returns the FLOPs that a forward pass over a step's batch multiplies.

  As `forward_flops`, with the rows of `expert_rows` and the pairs of `blockwise_pairs`. Cells that
  a pipeline schedule leaves idle are not counted here: they run while another stage works.

  Args:
    settings: the deployment.
    block_tokens: positions of an attention block.
  """
  train = settings.train
  pairs = train.batch * blockwise_pairs(train.sequence, block_tokens)
  return _forward(settings.model, train.batch * train.sequence, pairs, expert_rows(settings))


def executed_train_flops(
  settings: Config, block_tokens: int, backward_products: int = 5
) -> ByPhase:
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
  model, train = settings.model, settings.train
  forward = executed_forward_flops(settings, block_tokens)
  pairs = train.batch * blockwise_pairs(train.sequence, block_tokens)
  again = (backward_products - 2 * BACKWARD_PER_FORWARD) / 2
  scores_again = again * model.layers * _pair_flops(model, pairs)
  step = forward.times(1 + BACKWARD_PER_FORWARD)
  if settings.pipeline.multiplies_again:
    step = step.plus(forward)
  if settings.pipeline.save == "exchanges":
    mesh, tokens = settings.mesh, train.batch * train.sequence
    step = step.plus(
      ByPhase(
        attention=-model.layers * output_flops(model, tokens) * (mesh.tensor > 1),
        experts=-DOWN_SHARE * forward.experts * (mesh.expert * mesh.tensor > 1),
      )
    )
  return dataclasses.replace(
    step,
    attention=step.attention + scores_again,
    head=forward.head * (1 + BACKWARD_PER_FORWARD),
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


@dataclasses.dataclass(frozen=True)
class StateBytes:
  """Bytes of a training run's state over all devices, each part counted once.

  Attributes:
    parameters: master weights, float32.
    gradients: float32.
    optimizer: AdamW's two moments, float32.
    compute: copies of the weights in the compute dtype; 0 where that is float32.
  """

  parameters: int
  gradients: int
  optimizer: int
  compute: int

  @property
  def total(self) -> int:
    """The sum."""
    return sum(dataclasses.astuple(self))


def state_bytes(model: Model) -> StateBytes:
  """Returns the bytes of the state: 4 P for weights and gradients each, 8 P for the moments.

  Router and norms keep float32 in the computation too; the difference of a few parameters is left
  out.

  Source: Decoupled Weight Decay Regularization (arXiv:1711.05101), algorithm 2, for the two
  moments.
  """
  count = int(num_parameters(model).total)
  compute = {"float32": 0, "bfloat16": 2}[model.dtype] * count
  return StateBytes(parameters=4 * count, gradients=4 * count, optimizer=8 * count, compute=compute)


def _forward(model: Model, tokens: int, pairs: int, rows: int) -> ByPhase:
  D, L = model.d_model, model.layers
  return ByPhase(
    attention=L * (2 * tokens * _projection_elements(model) + _pair_flops(model, pairs)),
    dispatch=L * 2 * tokens * D * model.experts,
    experts=L * rows * 6 * D * model.expert_hidden,
    head=2 * tokens * D * model.vocab,
  )


def _projection_elements(model: Model) -> int:
  return model.d_model * (2 * model.heads + 2 * model.kv_heads) * model.head_dim


def _qk_norm_elements(model: Model) -> int:
  heads = {"none": 0, "head": 2, "projection": model.heads + model.kv_heads}[model.qk_norm]
  return heads * model.head_dim


def _pair_flops(model: Model, pairs: int) -> int:
  return 4 * pairs * model.heads * model.head_dim
