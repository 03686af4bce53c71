"""What one step of each kind is asked to do: sequences, tokens, schedule, model FLOPs.

Knows the steps' sizes and schedules; must not know how a step is compiled, or chips.
"""

import math
from typing import NamedTuple

from moe_jax import config
from moe_jax.pipeline.table import Table
from moe_jax.plan import cost
from moe_jax.serve import decode as decode_lib
from moe_jax.serve import prefill as prefill_lib
from moe_jax.train import step as step_lib

TRAIN, PREFILL, DECODE = "train", "prefill", "decode"


class Workload(NamedTuple):
  """One step, over all devices.

  Attributes:
    step: "train", "prefill" or "decode".
    sequences: that take part.
    tokens_each: of each sequence, read or made in the step.
    cached_tokens: of each sequence, before them.
    micro_batches: that the sequences are cut into.
    model_flops: that the mathematics asks for.
    table: the schedule.
  """

  step: str
  sequences: int
  tokens_each: int
  cached_tokens: int
  micro_batches: int
  model_flops: float
  table: Table

  @property
  def tokens(self) -> int:
    """Tokens of all sequences."""
    return self.sequences * self.tokens_each


def train(settings: config.Config) -> Workload:
  """Returns a training step on a batch of whole sequences."""
  batch, sequence = settings.train.batch, settings.train.sequence
  flops = cost.train_flops(settings.model, [sequence] * batch).total
  table = step_lib.table(settings)
  return Workload(TRAIN, batch, sequence, 0, settings.pipeline.micro_batches, flops, table)


def prefill(settings: config.Config) -> Workload:
  """Returns a prefill call full of whole prompts, each as long as a row; the head runs at the last
  token of each.
  """
  micro_batches = settings.serve.prefill_micro_batches
  prompts = micro_batches * prefill_lib.rows(settings)
  length = prefill_lib.chunk_tokens(settings)
  flops = cost.prefill_flops(settings.model, [length] * prompts).total
  table = prefill_lib.table_of(settings, micro_batches)
  return Workload(PREFILL, prompts, length, 0, micro_batches, flops, table)


def decode(settings: config.Config) -> Workload:
  """Returns a decode call of all slots, at the end of the longest sequences there may be."""
  slots, made = math.prod(decode_lib.shape(settings)), settings.serve.decode_tokens
  cached = max(0, settings.serve.max_tokens - made)
  flops = lambda length: cost.forward_flops(settings.model, [length] * slots).total
  table = decode_lib.table_of(settings, made)
  total = flops(cached + made) - flops(cached)
  return Workload(DECODE, slots, made, cached, settings.mesh.stage, total, table)


WORKLOADS = {TRAIN: train, PREFILL: prefill, DECODE: decode}


def as_dict(workload: Workload) -> dict[str, str | int]:
  """Returns what a report says of it."""
  names = ("step", "sequences", "tokens_each", "cached_tokens", "micro_batches")
  return {name: getattr(workload, name) for name in names}
