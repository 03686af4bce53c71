"""Two-level dispatch: values and gradients are those of the dense one, on hosts of several ranks;
nothing is dropped; a token crosses between hosts once for each host.
"""

import functools

import jax
import numpy as np
import pytest

from moe_jax import config
from moe_jax.moe import plan as plans
from moe_jax.moe import rounds, router, two_level
from moe_jax.moe.exchange import EXCHANGE
from moe_jax.parallel import mesh as mesh_lib
from tests.contracts import program as contracts
from tests.moe import served
from tests.moe.test_dispatch import HERE, NUM_DEVICES, E, K, case, oracle

# (expert, tensor), ranks of expert on a host, hosts that the router allows (0: all).
CASES = [
  ((8, 1), 4, 0),
  ((8, 1), 2, 1),
  ((4, 2), 2, 1),
  ((4, 2), 2, 0),
  ((8, 1), 1, 0),
  ((2, 4), 2, 0),
]


def setting_of(ranks_per_host, hosts_per_token, factor=1.0):
  return plans.Setting(
    HERE, K, E, factor, False, EXCHANGE["hierarchical"], ranks_per_host, hosts_per_token
  )


@functools.cache
def program(mesh, setting):
  def serve(weights, routing, logits_tE, x_tD):
    plan = two_level.plan(setting, *jax.lax.stop_gradient((routing, logits_tE)))

    def one_round(given, plan, round_id):
      x_tD, weights_TK, weights = given
      computed = two_level.compute(weights, plan, two_level.send(setting, x_tD, plan, round_id))
      return two_level.back(setting, computed, weights_TK, plan, round_id)

    given = (x_tD, routing.weights_TK, weights)
    return rounds.run(one_round, given, plan, two_level.most_rounds(setting)), plan

  return served.program_of(mesh, serve)


def limited_case(load, num_ranks, limit):
  """Returns the case with its choices limited as the router limits them."""
  given = case(load, num_ranks)
  if limit is None:
    return given
  logits_TE = router.limited(given.logits_TE, K, limit)
  chosen_TK, experts_TK = jax.lax.top_k(logits_TE, K)
  return given._replace(experts_TK=experts_TK, weights_TK=jax.nn.softmax(chosen_TK, -1))


def unique_pairs(experts_TK, num_hosts):
  host_TK = np.asarray(experts_TK) // (E // num_hosts)
  return np.array([len(set(hosts)) for hosts in host_TK]).reshape(NUM_DEVICES, HERE).sum(1)


@pytest.mark.parametrize(("mesh", "ranks_per_host", "hosts_per_token"), CASES)
def test_two_level_equals_dense_and_drops_nothing(mesh, ranks_per_host, hosts_per_token):
  setting = setting_of(ranks_per_host, hosts_per_token)
  num_hosts = mesh[0] // ranks_per_host
  limit = router.Limit(num_hosts, hosts_per_token) if hosts_per_token else None
  run = program(mesh, setting)
  for load in served.LOADS:
    given = limited_case(load, mesh[0], limit)
    found = run(*given)
    served.check(found[:2], oracle(mesh)(*given)[:2])
    np.testing.assert_array_equal(found.expert_TK, given.experts_TK)
    counts = jax.tree.map(np.asarray, found.counts)
    np.testing.assert_array_equal(counts.kept, HERE * K)
    assert not counts.dropped.any() and not counts.spilled.any()
    rows = two_level.rows_per_round(setting, mesh[0])
    sent = counts.rounds * num_hosts * rows.to_host
    unique = unique_pairs(given.experts_TK, num_hosts)
    # A round between hosts is repeated where a rank inside has no room for all that arrives.
    repeats = (sent - counts.padded) / unique
    assert (repeats == repeats.astype(int)).all() and len(set(repeats)) == 1 and repeats[0] >= 1
    if load == "even" and num_hosts > 1:
      assert repeats[0] == 1 and counts.rounds[0] <= 2
    if hosts_per_token == 1:
      np.testing.assert_array_equal(unique, HERE)
    if load == "all_to_one_device" and mesh[0] > 2:
      assert counts.rounds[0] > 2


@pytest.mark.parametrize(("mesh", "ranks_per_host"), [((8, 1), 4), ((8, 1), 8), ((4, 2), 2)])
def test_two_level_sends_what_it_declares(mesh, ranks_per_host):
  X, tensor = mesh
  G, H = ranks_per_host, X // ranks_per_host
  setting = setting_of(ranks_per_host, 0)
  rows = two_level.rows_per_round(setting, X)
  given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), case("even", X))
  found = contracts.collectives(
    program(mesh, setting).__wrapped__, *given, mesh=mesh_lib.make(config.Mesh(X, tensor))
  )
  sizes = {"X": X, "H": H, "G": G, "B": rows.to_host, "C": rows.to_rank, "K": K, "tensor": tensor}

  def declared(function, **more):
    return [each for each in contracts.declared(function, **sizes, **more) if each[2]]

  windows = -(-HERE // rows.to_host)
  decided = declared(two_level.plan, W=windows)
  there = declared(two_level.send, D=served.WIDTH)
  choices = ("all-to-all", "expert", (H - 1) * rows.to_host * K)
  arrived = [  # of each expert's rows
    ("all-to-all", "expert", (G - 1) * (E // X)),
    ("all-gather", "tensor", (tensor - 1) * G * (E // X)),
  ]
  there += [each for each in [choices, *arrived] if each[2]]
  home = declared(two_level.back, D=served.WIDTH)
  forward = [c for c in found if not c.num_loops][: len(decided + there + home)]
  assert contracts.summary(forward) == sorted(decided + there + home)
