"""The routers' biases after a step: moved by the run's rule from what the step reports, outside the
optimizer.

Knows the parameter tree and the rules; must not know how a step computes.
"""

import jax

from moe_jax import config
from moe_jax.balance.rules import RULES, Step
from moe_jax.model.transformer import Parameters
from moe_jax.moe.layer import Report

_PATH = ("router", "bias")


def moved(
  moe: config.Moe, parameters: Parameters, computed: Parameters, report: Report
) -> Parameters:
  """Returns `parameters` with each layer's bias as the next step's router takes it.

  Args:
    moe: its rule, and how fast.
    parameters: as the optimizer leaves them.
    computed: those that the step computed with. Every rank of `expert` holds these biases whole, so
      that their mean over experts sends nothing.
    report: of the whole step; layers as in `parameters`.
  """

  def leaf(path, value, computed_value):
    names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    if names != _PATH:
      return value
    step = Step(computed_value, report.assigned_E, report.measured, moe.bias_speed)
    return RULES[moe.router_balance].move(step)

  layers = jax.tree_util.tree_map_with_path(leaf, parameters.layers, computed.layers)
  return parameters._replace(layers=layers)
