"""What evens the router, by name: whether a loss does, and how its bias moves after a step.

Each micro-batch every device measures what the rule asks for; sums over micro-batches and devices
reach the rule once a step, with the counts that a step reports anyway. Takes jax arrays. Knows
scores and counts; must not know models, optimizers or meshes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from moe_jax.balance import bias, quantile


class Step(NamedTuple):
  """What a rule sees of a step.

  Attributes:
    bias_LE: with which it was routed, float32.
    counts_LE: assignments of each expert, of all devices.
    measured: sums of what `Rule.measure` returned, leaves [L, ...].
    speed: moe.bias_speed.
  """

  bias_LE: jax.Array
  counts_LE: jax.Array
  measured: Any
  speed: float


class Rule(NamedTuple):
  """One way to even the router.

  Attributes:
    uses_loss: whether the load-balancing loss is a part of the loss.
    measure: (bias_E, scores_tE, num_choices) -> a tree of integers of this device's tokens;
      scores are the router's logits without bias.
    move: Step -> bias_LE of the next step.
  """

  uses_loss: bool
  measure: Callable[[jax.Array, jax.Array, int], Any]
  move: Callable[[Step], jax.Array]


def _nothing(bias_E, scores_tE, num_choices: int) -> tuple:
  del bias_E, scores_tE, num_choices
  return ()


def _stay(step: Step) -> jax.Array:
  return step.bias_LE


def _by_sign(step: Step) -> jax.Array:
  return bias.update(step.bias_LE, step.counts_LE, step.speed)


def _to_quantiles(step: Step) -> jax.Array:
  share_L1 = step.counts_LE.astype(step.bias_LE.dtype).mean(axis=-1, keepdims=True)
  return quantile.from_counts(step.bias_LE, step.measured, share_L1)


RULES: Mapping[str, Rule] = {
  "auxiliary": Rule(uses_loss=True, measure=_nothing, move=_stay),
  "bias": Rule(uses_loss=False, measure=_nothing, move=_by_sign),
  "quantile": Rule(uses_loss=False, measure=quantile.passing, move=_to_quantiles),
  "none": Rule(uses_loss=False, measure=_nothing, move=_stay),
}
