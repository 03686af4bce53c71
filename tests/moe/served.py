"""Routed tokens on meshes: loads, the program of a dispatch with its gradients, and the oracle.

One program a mesh and dispatch; the load is an argument of it. The oracle is a loop over experts on
one device, which knows of a plan only who serves what.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.moe import layer
from moe_jax.moe.experts import Weights
from moe_jax.moe.router import Routing
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import EXPERT, TENSOR

NUM_EXPERTS, NUM_CHOICES, WIDTH, NUM_HIDDEN = 16, 2, 12, 16
LOADS = ("even", "zipf_1", "zipf_2", "one_hot", "an_empty_expert", "all_to_one_device")
EVERY = P((EXPERT, TENSOR))
_WEIGHTS_SPEC = Weights(P(EXPERT, None, None, TENSOR), P(EXPERT, TENSOR))


class Case(NamedTuple):
  """Tokens with their routing, the experts' weights, and the cotangent of the output."""

  x_TD: jax.Array
  experts_TK: jax.Array
  weights_TK: jax.Array
  logits_TE: jax.Array
  weights: Weights
  cotangent_TD: jax.Array


class Result(NamedTuple):
  """Gradients of x, the router's weights and the experts'; integers device by device."""

  y_TD: np.ndarray
  gradients: tuple
  expert_TK: np.ndarray
  counts: object


def logits(load, num_tokens, num_experts=NUM_EXPERTS, num_ranks=1, seed=0):
  """Returns logits_TE whose largest are the choices of the load."""
  random = np.random.default_rng(seed)
  expert, token = np.arange(num_experts), np.arange(num_tokens)
  noise = random.gumbel(size=(num_tokens, num_experts))
  bias = {
    # Each run of E / K tokens chooses each expert once.
    "even": -50.0 * ((expert[None] - NUM_CHOICES * token[:, None]) % num_experts >= NUM_CHOICES),
    "zipf_1": -np.log1p(expert),
    "zipf_2": -2 * np.log1p(expert),
    "one_hot": np.where(expert == 3, 20.0, 0.0),
    "an_empty_expert": np.where(expert == 5, -50.0, 0.0),
    "all_to_one_device": np.where(expert < num_experts // num_ranks, 50.0, 0.0),
  }[load]
  return (noise + bias).astype(np.float32)


def case(load, num_tokens=256, num_ranks=1, width=WIDTH, num_hidden=NUM_HIDDEN):
  logits_TE = jnp.asarray(logits(load, num_tokens, num_ranks=num_ranks))
  chosen_TK, experts_TK = jax.lax.top_k(logits_TE, NUM_CHOICES)
  random = np.random.default_rng(1)
  normal = lambda *shape, std=1.0: jnp.asarray(random.normal(0, std, shape), jnp.float32)
  E, D, F = NUM_EXPERTS, width, num_hidden
  weights = Weights(normal(E, D, 2, F, std=D**-0.5), normal(E, F, D, std=F**-0.5))
  return Case(
    normal(num_tokens, D), experts_TK, jax.nn.softmax(chosen_TK, -1), logits_TE, weights,
    normal(num_tokens, D),
  )  # fmt: skip


@functools.cache
def program(mesh, moe_config: config.Moe):
  """Returns the jitted function of a Case's fields to (y, gradients, expert_TK, counts)."""
  return program_of(mesh, lambda weights, *arrays: layer.serve(weights, moe_config, *arrays))


def program_of(mesh, serve, devices=None):
  """Returns what `program` does, of (weights, routing, logits_tE, x_tD) -> (y_tD, plan), on
  `devices`, by default those that jax sees.
  """
  sizes = config.Mesh(expert=mesh[0], tensor=mesh[1])

  def region(x_tD, experts_tK, weights_tK, logits_tE, weights):
    y_tD, plan = serve(weights, Routing(experts_tK, weights_tK), logits_tE, x_tD)
    return y_tD, plan.expert_TK, jax.tree.map(lambda count: count[None], plan.counts)

  sharded = jax.shard_map(
    region,
    mesh=mesh_lib.make(sizes, devices or jax.devices()[: sizes.num_devices]),
    in_specs=(EVERY, EVERY, EVERY, EVERY, _WEIGHTS_SPEC),
    out_specs=EVERY,
  )

  def run(x_TD, experts_TK, weights_TK, logits_TE, weights, cotangent_TD):
    call = lambda x, w, weights: (lambda y, *rest: (y, rest))(
      *sharded(x, experts_TK, w, logits_TE, weights)
    )
    y_TD, vjp, (expert_TK, counts) = jax.vjp(call, x_TD, weights_TK, weights, has_aux=True)
    return Result(y_TD, vjp(cotangent_TD), expert_TK, counts)

  return jax.jit(run)


@jax.jit
def loop(x_TD, experts_TK, weights_TK, logits_TE, weights, cotangent_TD):
  """Returns (y, gradients) of a loop over experts; expert E of `experts_TK` is nobody."""
  del logits_TE

  def y(x_TD, weights_TK, weights):
    total = jnp.zeros_like(x_TD)
    for e in range(len(weights.down_efD)):
      weight_T = jnp.where(experts_TK == e, weights_TK, 0.0).sum(1)
      gate_TF, up_TF = (x_TD @ weights.gate_up_eD2f[e, :, part] for part in range(2))
      total += weight_T[:, None] * ((jax.nn.silu(gate_TF) * up_TF) @ weights.down_efD[e])
    return total

  y_TD, vjp = jax.vjp(y, x_TD, weights_TK, weights)
  return y_TD, vjp(cotangent_TD)


def check(found, expected, tolerance=1e-5):
  """Checks values and every gradient by relative L2, and that none is trivial."""
  names = ("y", "x", "router weights", "gate and up", "down")
  leaves = zip(names, jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  for name, each, wanted in leaves:
    each, wanted = np.asarray(each, np.float64), np.asarray(wanted, np.float64)
    assert each.shape == wanted.shape
    assert np.linalg.norm(wanted) > 0, name
    assert np.linalg.norm(each - wanted) <= tolerance * np.linalg.norm(wanted), name
