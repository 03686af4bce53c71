"""Dropless beyond parity: bounded memory, stages that differ in rounds, what is exchanged again."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.moe import dropless, grouped, layer
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.moe.exchange import EXCHANGE
from moe_jax.moe.experts import Weights
from moe_jax.moe.plan import Setting
from moe_jax.moe.router import Routing
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import ALL, EXPERT, TENSOR
from moe_jax.pipeline import steps
from moe_jax.pipeline.saving import SAVE
from tests.contracts import program
from tests.moe import served

E, K, D = served.NUM_EXPERTS, served.NUM_CHOICES, served.WIDTH


@pytest.mark.parametrize(
  ("tokens", "ranks", "factor", "rows"),
  [(256, 8, 1.25, 80), (256, 1, 1.25, 512), (256, 8, 100.0, 512), (3, 4, 1.0, 2), (1, 8, 0.01, 1)],
)
def test_rows_per_rank(tokens, ranks, factor, rows):
  assert dropless.rows_per_rank(tokens, K, ranks, factor) == rows


def temporary_bytes(factor, num_tokens, width, num_hidden):
  moe_config = config.Moe(dispatch="dropless", capacity_factor=factor)
  case = served.case("even", num_tokens, 1, width, num_hidden)
  compiled = served.program((8, 1), moe_config).lower(*case).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_that_of_the_configured_rows_and_not_of_the_worst_load():
  """The program is one for all loads, so what it takes is what any load takes."""
  num_tokens, width, num_hidden, ranks = 8 * 1024, 64, 64, 8
  here = num_tokens // ranks
  factor = 1.25
  rows = ranks * dropless.rows_per_rank(here, K, ranks, factor)
  worst_rows = ranks * here * K  # every device's tokens, all to one rank
  placed = rows + (E // ranks) * grouped.ROWS_PER_BLOCK
  # What a round holds at once of rows: sent, received, returned and their gradients; in blocks:
  # gate, up, output and input's gradient. Then per assignment a few rows of a token, some numbers
  # of bookkeeping per row, and the gradients of the experts' weights and their sums.
  floats = 8 * rows * width + placed * (2 * num_hidden + 2 * width)
  floats += 6 * here * K * width + 40 * rows + 8 * 3 * (E // ranks) * width * num_hidden
  found = temporary_bytes(factor, num_tokens, width, num_hidden)
  assert found <= 4 * floats
  assert found < 4 * worst_rows * width * 3  # less than three arrays of the worst load's rows
  unbounded = temporary_bytes(float(ranks), num_tokens, width, num_hidden)
  assert found < unbounded / 3


def test_stages_may_differ_in_rounds():
  """Stage 0 takes one round, stage 1 two; neither waits for the other."""
  sizes = config.Mesh(expert=2, tensor=2, stage=2)
  moe_config = config.Moe(dispatch="dropless", capacity_factor=1.0)
  loads = ("even", "all_to_one_device")
  cases = [served.case(load, 64, sizes.expert) for load in loads]
  x, experts, weights, logits = (
    jnp.concatenate(each) for each in list(zip(*cases, strict=True))[:4]
  )
  every = P(ALL)
  weights_spec = Weights(P(EXPERT, None, None, TENSOR), P(EXPERT, TENSOR))

  def region(x_tD, experts_tK, weights_tK, logits_tE, weights):
    routing = Routing(experts_tK, weights_tK)
    y_tD, plan = layer.serve(weights, moe_config, routing, logits_tE, x_tD)
    return y_tD, plan.counts.rounds[None]

  call = jax.shard_map(
    region, mesh=mesh_lib.make(sizes), in_specs=(*[every] * 4, weights_spec), out_specs=every
  )

  def loss(x, w, weights):
    y, rounds = call(x, experts, w, logits, weights)
    return jnp.sum(y * cotangent), (y, rounds)

  cotangent = jnp.concatenate([case.cotangent_TD for case in cases])
  (_, (y, rounds)), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
    x, weights, cases[0].weights
  )
  np.testing.assert_array_equal(rounds, [1] * 4 + [2] * 4)
  both = served.Case(x, experts, weights, logits, cases[0].weights, cotangent)
  served.check((y, gradients), served.loop(*both))


def found_in(function, mesh, in_specs, out_specs, *arguments):
  region = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
  return program.collectives(region, *arguments, mesh=mesh)


def struct(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("exchange", ["hierarchical", "flat"])
@pytest.mark.parametrize("mesh", [(2, 4), (4, 2), (8, 1)])
def test_dropless_sends_what_it_declares(mesh, exchange):
  X, tensor = mesh
  here = 24
  on = mesh_lib.make(config.Mesh(expert=X, tensor=tensor))
  setting = Setting(here, K, E, 1.0, False, EXCHANGE[exchange])
  tokens = here * X * tensor
  every = served.EVERY

  def plan_alone(experts_tK, logits_tE):
    return dropless.plan(
      setting, Routing(experts_tK, jnp.ones((here, K))), logits_tE
    ).places.queues.place_TK

  def declared(**sizes):
    there = program.declared(EXCHANGE[exchange].to_experts, X=X, tensor=tensor, **sizes)
    back = program.declared(EXCHANGE[exchange].to_tokens, X=X, tensor=tensor, **sizes)
    keep = lambda found: sorted(each for each in found if each[2])
    return keep(there), keep(back)

  def all_of(experts_tK, weights_tK, logits_tE, x_tD, weights):
    moe_config = config.Moe(dispatch="dropless", capacity_factor=1.0, exchange=exchange)
    return layer.serve(weights, moe_config, Routing(experts_tK, weights_tK), logits_tE, x_tD)[0]

  weights = Weights(struct(E, D, 2, 16), struct(E, 16, D))
  weights_spec = Weights(P(EXPERT, None, None, TENSOR), P(EXPERT, TENSOR))
  integers = (struct(tokens, K, dtype=jnp.int32), struct(tokens, K), struct(tokens, E))
  found = found_in(
    all_of, on, (*[every] * 4, weights_spec), every, *integers, struct(tokens, D), weights
  )
  sizes_sent, _ = declared(E=X, C=1, D=E // X + 1)
  rows = dropless.rows_per_rank(here, K, X, 1.0)
  there, back = declared(E=X, C=rows, D=D)
  once = program.summary([c for c in found if not c.num_loops])
  assert once == sorted([*sizes_sent, *there, *back])
  again = program.summary([c for c in found if c.num_loops])
  assert again == sorted([*there, *back])  # each further round


@pytest.mark.parametrize("name", [name for name in DISPATCH if name != "gathered"])
@pytest.mark.parametrize(("save", "times"), [("inputs", 2), ("residuals", 1), ("everything", 1)])
def test_what_is_saved_is_not_exchanged_again(name, save, times):
  """All-to-alls of one layer outside the further rounds, there and back, forward and backward."""
  on = mesh_lib.make(config.Mesh(expert=4, tensor=2))
  moe_config = config.Moe(dispatch=name, capacity_factor=1.0)
  tokens = 16 * 8
  case = jax.tree.map(lambda a: struct(*a.shape, dtype=a.dtype), served.case("even", tokens))
  weights_spec = Weights(P(EXPERT, None, None, TENSOR), P(EXPERT, TENSOR))

  def of_layer(weights, shared, x_tD, inputs):
    del shared
    experts_tK, weights_tK, logits_tE = inputs
    routing = Routing(experts_tK, weights_tK * x_tD.mean())
    y_tD, plan = layer.serve(weights, moe_config, routing, logits_tE, x_tD)
    return y_tD, y_tD.sum(), plan.counts

  def region(x_tD, weights, *inputs):
    example = jax.eval_shape(lambda: (weights, (), x_tD, inputs))
    saved_layer = SAVE[save]((steps.whole(of_layer, example),), example)
    (y_tD, statistics, _), kept = saved_layer.forward[0](weights, (), x_tD, inputs)
    restored = saved_layer.restore(weights, (), inputs, (kept,))
    of_parameters, (gx_tD,) = saved_layer.backward[0](
      weights, (), inputs, restored, [y_tD, jnp.zeros_like(statistics)]
    )
    g_weights = jax.tree.unflatten(jax.tree.structure(weights), of_parameters.values())
    return gx_tD, g_weights

  every = served.EVERY
  found = found_in(
    region, on, (every, weights_spec, *[every] * 3), (every, weights_spec),
    *(case.x_TD, case.weights, case.experts_TK, case.weights_TK, case.logits_TE),
  )  # fmt: skip
  count = collections.Counter(c.kind for c in found if not c.num_loops)
  # The sizes of groups travel too. two_level sends a host its rows' choices and weights as well,
  # whose gradients come back, and finds out its rounds by two; what it brings home in the end no
  # gradient asks for.
  further = {"dropless": 1, "ragged": 1, "stealing": 1, "two_level": 5}.get(name, 0)
  apart = {"two_level": 1 - (save == "inputs")}.get(name, 0)
  assert count["all-to-all"] == times * (2 + further) + 2 + apart
  # Stealing sums counts; its shadows travel in a loop.
  assert count["all-reduce"] == times * (name == "stealing")
