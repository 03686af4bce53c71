"""The collectives of each part are those that its docstring declares: kind, axis, elements."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.model import attention, qk_norm, transformer
from moe_jax.moe import capacity
from moe_jax.moe import layer as moe_layer
from moe_jax.moe.exchange import EXCHANGE
from moe_jax.moe.router import Statistics
from moe_jax.parallel import collectives, messages, parameters
from moe_jax.parallel.axes import ALL, DATA, EXPERT, STAGE, TENSOR, TOKENS
from tests.contracts import program
from tests.contracts.small import SEQUENCE, settings_of, struct
from tests.train import parity

MESHES = [(2, 2, 2), (4, 2, 1), (1, 4, 2), (8, 1, 1)]
OF_TWO = {axis: (2, 2, 1, 2) if axis == DATA else (2, 2, 2) for axis in ALL}


def on_mesh(settings, function, in_specs, out_specs):
  mesh = parity.mesh_of(settings)
  return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs), mesh


def found_in(settings, function, in_specs, out_specs, *arguments):
  region, mesh = on_mesh(settings, function, in_specs, out_specs)
  return program.summary(program.collectives(region, *arguments, mesh=mesh))


def in_summary(declared):
  return sorted((kind, axis, elements) for kind, axis, elements in declared if elements)


@pytest.mark.parametrize("axis", ALL)
@pytest.mark.parametrize("name", ["gather", "reduce_scatter", "exchange"])
def test_wrappers_send_what_they_declare(name, axis):
  settings = settings_of(OF_TWO[axis])
  function = getattr(collectives, name)
  call = lambda x: function(x, axis) if name == "exchange" else function(x, axis, 0)
  here = struct(8, 6)  # 2 x 2 x 2 devices hold [2, 3] each along the first axis
  found = found_in(settings, call, P(axis), P(axis), struct(16, 6))
  expected = program.declared(function, n=2, x_size=math.prod(here.shape))
  assert found == [(kind, axis, elements) for kind, _, elements in expected]


@pytest.mark.parametrize("name", ["send_together", "reduce_scatter_together"])
def test_together_wrappers_send_what_they_declare(name):
  settings = settings_of(OF_TWO[DATA])
  function, more = getattr(messages, name), [[0, 1]] * (name != "send_together")
  call = lambda x, y: function([x, y], DATA, *more)
  found = found_in(settings, call, P(DATA), P(DATA), struct(16, 6), struct(4, 10))
  (expected,) = program.declared(function, n=2, w=8 * 6 + 2 * 10)
  assert found == [(expected[0], DATA, expected[2])]


@pytest.mark.parametrize("axis", ALL)
def test_tree_wrappers_send_what_they_declare(axis):
  settings = settings_of(OF_TWO[axis])
  tree = {"a": struct(4, 6), "b": struct(10)}
  size = (4 * 6 + 10) / 2  # of this device's part
  shift = lambda tree: collectives.shift(tree, axis, 1)
  found = found_in(settings, shift, P(axis), P(axis), tree)
  assert [kind for kind, _, _ in found] == ["collective-permute"] * 2
  assert sum(elements for _, _, elements in found) == size
  broadcast = lambda tree: collectives.broadcast_from(tree, axis, 1)
  found = found_in(settings, broadcast, P(axis), P(), tree)
  assert [kind for kind, _, _ in found] == ["all-reduce"] * 2
  assert sum(elements for _, _, elements in found) == 2 * (2 - 1) / 2 * size


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", EXCHANGE)
def test_exchange_sends_what_it_declares(name, mesh):
  settings = settings_of(mesh)
  X, tensor = settings.mesh.expert, settings.mesh.tensor
  E, C, D = settings.model.experts, 5, settings.model.d_model
  rows = struct(E * X, C * tensor, D)
  sizes = {"X": X, "tensor": tensor, "E": E, "C": C, "D": D}
  spec = P(EXPERT, TENSOR)
  there = found_in(settings, EXCHANGE[name].to_experts, spec, spec, rows)
  assert there == in_summary(program.declared(EXCHANGE[name].to_experts, **sizes))
  rows = struct(E, X * tensor * tensor * C, D)
  back = found_in(settings, EXCHANGE[name].to_tokens, spec, spec, rows)
  assert back == in_summary(program.declared(EXCHANGE[name].to_tokens, **sizes))


@pytest.mark.parametrize("kind", qk_norm.QK_NORM)
@pytest.mark.parametrize("mesh", MESHES)
def test_attention_sends_what_it_declares(mesh, kind):
  settings = settings_of(mesh)
  model = dataclasses.replace(settings.model, qk_norm=kind)
  definition, weights = nnx.split(nnx.eval_shape(lambda: attention.Attention(model, nnx.Rngs(0))))
  B, S, D = 8, SEQUENCE, model.d_model
  whole = struct(B, S, dtype=jnp.int32)
  call = lambda weights, *arrays: attention.attend(nnx.merge(definition, weights), model, *arrays)
  found = found_in(
    settings,
    call,
    (parameters.specs(weights), P(EXPERT, TENSOR), P(EXPERT), P(EXPERT)),
    P(EXPERT, TENSOR),
    *(weights, struct(B, S, D), whole, whole),
  )
  tensor = settings.mesh.tensor
  x_size = B * S * D // (settings.mesh.expert * tensor)
  expected = program.declared(attention.attend, tensor=tensor, x_size=x_size)
  if kind == "projection":  # of queries and of keys
    b = B // settings.mesh.expert
    expected += 2 * program.declared(qk_norm.over_projection, tensor=tensor, b=b, S=S)
  assert found == in_summary(expected)


@pytest.mark.parametrize("mesh", MESHES)
def test_the_gradient_of_a_norm_over_the_projection_sends_as_much_again(mesh):
  settings = settings_of(mesh)
  X, tensor = settings.mesh.expert, settings.mesh.tensor
  N, H, B, S = settings.model.heads, settings.model.head_dim, 8, SEQUENCE
  graph, norm = nnx.split(nnx.eval_shape(lambda: qk_norm.Norm((N, H), ("heads", "head_dim"))))

  def both(norm, x_bSnH):
    apply = lambda x: qk_norm.over_projection(nnx.merge(graph, norm), x, 1e-5)
    y_bSnH, vjp = jax.vjp(apply, x_bSnH)
    return vjp(y_bSnH)[0]

  spec = P(EXPERT, None, TENSOR)
  region, on = on_mesh(settings, both, (parameters.specs(norm), spec), spec)
  found = program.collectives(region, norm, struct(B, S, N, H), mesh=on)
  there = program.declared(qk_norm.over_projection, tensor=tensor, b=B // X, S=S)
  assert program.summary(found) == in_summary(2 * there)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", EXCHANGE)
def test_moe_layer_sends_what_it_declares(name, mesh):
  settings = settings_of(mesh, moe={"exchange": name, "capacity_factor": 1.25})
  model, X, tensor = settings.model, settings.mesh.expert, settings.mesh.tensor
  make = lambda module: nnx.split(nnx.eval_shape(lambda: module(model, nnx.Rngs(0))))
  router_definition, router = make(moe_layer.Router)
  experts_definition, experts = make(moe_layer.Experts)

  def call(router, experts, x_tD):
    y_tD, statistics, report = moe_layer.moe(
      nnx.merge(router_definition, router),
      nnx.merge(experts_definition, experts),
      *(settings.moe, model.experts_per_token, x_tD),
    )
    return y_tD, jax.tree.map(jnp.atleast_1d, (statistics, report))

  every = P(TOKENS)
  tokens_here = 48
  specs = (parameters.specs(router), parameters.specs(experts), every)
  x_TD = struct(tokens_here * X * tensor, model.d_model)
  region, on = on_mesh(settings, call, specs, every)
  found = program.collectives(region, router, experts, x_TD, mesh=on)
  E = model.experts
  C = capacity.rows_per_expert(tokens_here, model.experts_per_token, E, 1.25)
  sizes = {"X": X, "tensor": tensor, "E": E, "C": C, "D": model.d_model}
  there = program.declared(EXCHANGE[name].to_experts, **sizes)
  back = program.declared(EXCHANGE[name].to_tokens, **sizes)
  assert program.summary(found) == in_summary(there + back)


@pytest.mark.parametrize("mesh", [*MESHES, (2, 1, 1, 4)])
def test_the_auxiliary_loss_of_several_layers_sends_what_it_declares(mesh):
  settings = settings_of(mesh)
  X, tensor, data = settings.mesh.expert, settings.mesh.tensor, settings.mesh.data
  E, n = settings.model.experts, 3

  def call(assigned_nE, probability_nE, z_n1):
    statistics = Statistics(assigned_nE, probability_nE, z_n1[:, 0])
    loss = lambda each: moe_layer.auxiliary_loss(settings.moe, each)[0]
    total, vjp = jax.vjp(loss, statistics)
    return vjp(total)[0].probability_E  # sends no more

  every = P(None, TOKENS)
  devices = data * X * tensor
  arrays = [struct(n, E * devices), struct(n, E * devices), struct(n, devices)]
  found = found_in(settings, call, every, every, *arrays)
  assert found == in_summary(
    program.declared(moe_layer.auxiliary_loss, data=data, X=X, tensor=tensor, E=E, n=n)
  )


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("mesh", MESHES)
def test_embedding_and_head_send_what_they_declare(mesh, is_tied):
  settings = settings_of(mesh)
  settings = dataclasses.replace(
    settings, model=dataclasses.replace(settings.model, tied_embeddings=is_tied)
  )
  model, sizes = settings.model, settings.mesh
  X, tensor, stages = sizes.expert, sizes.tensor, sizes.stage
  shared_specs = transformer.specs(model).shared
  shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), model)).shared
  definition = nnx.graphdef(nnx.eval_shape(lambda: transformer.Shared(model, nnx.Rngs(0))))
  B, S, D = 8, SEQUENCE, model.d_model
  x_size = B * S * D // (X * tensor)
  n = stages * tensor

  embed = lambda shared, tokens: transformer.embed(nnx.merge(definition, shared), tokens)
  found = found_in(
    settings, embed, (shared_specs, P(EXPERT)), P(EXPERT, TENSOR),
    *(shapes, struct(B, S, dtype=jnp.int32)),
  )  # fmt: skip
  expected = [
    ("reduce-scatter", TENSOR, (tensor - 1) * x_size),
    ("all-reduce", STAGE, is_tied * 2 * (stages - 1) / stages * x_size),
  ]
  assert found == in_summary(expected)

  inputs = jax.tree.map(
    lambda _: struct(B, S, dtype=jnp.int32), transformer.Inputs(*transformer.Inputs._fields)
  )._replace(weights_bS=struct(B, S))
  loss = lambda shared, y, inputs: transformer.head_loss(
    nnx.merge(definition, shared), model, y, inputs
  )[None]
  found = found_in(
    settings, loss, (shared_specs, P(EXPERT, TENSOR), P(EXPERT)), P(ALL),
    *(shapes, struct(B, S, D), inputs),
  )  # fmt: skip
  gathered = program.declared(transformer.head_logits, tensor=tensor, y_size=x_size)
  shares = ("all-gather", f"{STAGE}+{TENSOR}", (n - 1) * (B // X) * S)
  assert found == in_summary([*gathered, shares])
