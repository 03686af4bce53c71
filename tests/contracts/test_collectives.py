"""The program's collectives are those that the docstrings declare: kind, axis, elements a device.

And the gradients of parameters are summed once a step, outside every loop.
"""

import collections
import dataclasses
import functools
import itertools
import math
import operator

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.model import attention, qk_norm, transformer
from moe_jax.moe import capacity
from moe_jax.moe import layer as moe_layer
from moe_jax.moe.exchange import EXCHANGE
from moe_jax.parallel import collectives, parameters, sharding
from moe_jax.parallel.axes import ALL, EXPERT, STAGE, TENSOR
from moe_jax.pipeline.schedules import SCHEDULES, forward_only
from moe_jax.train import step
from tests.contracts import program
from tests.pipeline import toy
from tests.train import parity

MESHES = [(2, 2, 2), (4, 2, 1), (1, 4, 2), (8, 1, 1)]
# Sizes that no two dimensions of a device share, so that a shape tells what it is of.
MODEL = {"d_model": 24, "head_dim": 6, "experts": 8, "expert_hidden": 40, "layers": 4}
SEQUENCE = 32


def settings_of(mesh, **different):
  return parity.settings_of(mesh, sequence=SEQUENCE, model=MODEL, **different)


def struct(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


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
  settings = settings_of((2, 2, 2))
  function = getattr(collectives, name)
  call = lambda x: function(x, axis) if name == "exchange" else function(x, axis, 0)
  here = struct(8, 6)  # 2 x 2 x 2 devices hold [2, 3] each along the first axis
  found = found_in(settings, call, P(axis), P(axis), struct(16, 6))
  expected = program.declared(function, n=2, x_size=math.prod(here.shape))
  assert found == [(kind, axis, elements) for kind, _, elements in expected]


@pytest.mark.parametrize("axis", ALL)
def test_tree_wrappers_send_what_they_declare(axis):
  settings = settings_of((2, 2, 2))
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
    y_tD, auxiliary_loss, report = moe_layer.moe(
      nnx.merge(router_definition, router),
      nnx.merge(experts_definition, experts),
      *(settings.moe, model.experts_per_token, x_tD),
    )
    return y_tD, auxiliary_loss[None], jax.tree.map(jnp.atleast_1d, report)

  every = P((EXPERT, TENSOR))
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
  counts = [("all-to-all", EXPERT, (X - 1) * E), ("all-to-all", TENSOR, (tensor - 1) * E)]
  assert program.summary(found) == in_summary(there + back + counts)


@pytest.mark.parametrize("mesh", MESHES)
def test_embedding_and_head_send_what_they_declare(mesh):
  settings = settings_of(mesh)
  model, X, tensor, stages = settings.model, *(settings.mesh.__dict__.values())
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
    ("all-reduce", STAGE, 2 * (stages - 1) / stages * x_size),
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


@functools.cache
def step_program(mesh, schedule="1f1b", chunks=1, save="inputs", ahead=0):
  pipeline = {
    "schedule": schedule, "chunks": chunks, "micro_batches": 4, "save": save,
    "prefetch_layers": ahead,
  }  # fmt: skip
  settings = settings_of(mesh, pipeline=pipeline)
  shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), settings.model))
  rows = (4, 8, SEQUENCE)
  inputs = transformer.Inputs(*[struct(*rows, dtype=jnp.int32)] * 4, struct(*rows))
  on = parity.mesh_of(settings)
  function = step.loss_and_gradients(settings, on)
  return settings, on, program.collectives(function, shapes, inputs, mesh=on)


def parameter_shapes(settings, on):
  """Returns the shape on one device of every parameter, and of one layer's."""
  specs = transformer.specs(settings.model)
  shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), settings.model))

  def here(leaf, spec):
    return jax.sharding.NamedSharding(on, spec).shard_shape(leaf.shape)

  layers = jax.tree.leaves(jax.tree.map(here, shapes.layers, specs.layers), is_leaf=is_shape)
  shared = jax.tree.leaves(jax.tree.map(here, shapes.shared, specs.shared), is_leaf=is_shape)
  return {*layers, *shared, *(shape[1:] for shape in layers)}


def is_shape(node):
  return isinstance(node, tuple) and all(isinstance(size, int) for size in node)


@pytest.mark.parametrize(
  ("mesh", "schedule", "chunks", "save", "ahead"),
  [
    ((2, 2, 2), "1f1b", 1, "inputs", 0),
    ((2, 2, 2), "interleaved", 2, "everything", 0),
    ((2, 2, 2), "gpipe", 1, "residuals", 0),
    ((4, 2, 1), "1f1b", 1, "inputs", 0),
    ((2, 1, 4), "1f1b", 1, "everything", 0),
    ((4, 2, 1), "1f1b", 1, "inputs", 3),
  ],
)
def test_no_gradient_of_a_parameter_is_summed_in_a_loop(mesh, schedule, chunks, save, ahead):
  settings, on, found = step_program(mesh, schedule, chunks, save, ahead)
  assert summed_in_loops(found, parameter_shapes(settings, on)) == []
  assert [c for c in found if c.kind == "all-to-all" and c.num_loops]  # loops are looked into


def summed_in_loops(found, shapes):
  return [
    c
    for c in found
    if c.num_loops and c.kind in ("all-reduce", "reduce-scatter") and c.shape in shapes
  ]


def test_a_gradient_that_is_summed_in_a_loop_is_found():
  mesh = parity.mesh_of(settings_of((2, 2, 2)))

  def region(weights, x):
    def layer(total, w):
      return total + jnp.tanh(total @ w), None

    # Not `collectives.varying`: the transposed loop sums the gradient of each layer.
    loss = lambda weights: jax.lax.scan(layer, x, weights)[0].sum()
    return jax.grad(loss)(weights)

  call = jax.shard_map(region, mesh=mesh, in_specs=(P(), P(ALL)), out_specs=P())
  found = program.collectives(call, struct(3, 7, 7), struct(16, 7), mesh=mesh)
  assert summed_in_loops(found, {(7, 7)})


@pytest.mark.parametrize("mesh", [(2, 2, 2), (4, 2, 1), (2, 1, 4)])
def test_each_gradient_is_summed_once_after_the_loops(mesh):
  settings, on, found = step_program(mesh)
  specs = transformer.specs(settings.model)
  shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), settings.model))
  expected = collections.Counter()
  for leaf, spec in zip(jax.tree.leaves(shapes), jax.tree.leaves(specs), strict=True):
    here = jax.sharding.NamedSharding(on, spec).shard_shape(leaf.shape)
    remaining = sharding.replicated_axes(spec)
    dimension = sharding.zero_dimension(spec, leaf.shape, on)
    if dimension is not None:
      expected["reduce-scatter", (EXPERT,), here] += 1
      size = here[dimension] // on.shape[EXPERT]
      here = (*here[:dimension], size, *here[dimension + 1 :])
      remaining = tuple(axis for axis in remaining if axis != EXPERT)
    if remaining:
      expected["all-reduce", remaining, here] += 1
  outside = collections.Counter(
    (c.kind, c.axes, c.shape) for c in found if not c.num_loops and math.prod(c.shape) > 1
  )
  reports = [shape for _, axes, shape in outside if axes == (EXPERT, TENSOR)]
  per_stage = settings.model.layers // settings.mesh.stage
  reports = {(per_stage,), (per_stage, settings.model.experts)} & set(reports)
  outside = collections.Counter(
    {
      key: n
      for key, n in outside.items()
      if key[1:] not in [((EXPERT, TENSOR), r) for r in reports]
    }
  )
  assert outside == expected


@pytest.mark.parametrize(
  ("mesh", "schedule", "chunks", "ahead"),
  [
    ((2, 2, 2), "1f1b", 1, 1),
    ((4, 2, 1), "1f1b", 1, 3),
    ((2, 1, 2), "interleaved", 2, 1),
  ],
)
def test_streamed_weights_are_gathered_once_a_layer_of_each_unit(mesh, schedule, chunks, ahead):
  """Over `expert`, attention's weights of one layer: `ahead` times for each direction before the
  ticks; then in each loop over ticks once for each unit that it has in the loop over a chunk's
  layers, if that has more than one, and once behind it, for the chunk's last. Nothing else changes.
  """
  settings, _, found = step_program(mesh, schedule, chunks, "inputs", ahead)
  model, X, tensor = settings.model, settings.mesh.expert, settings.mesh.tensor
  attention_size = model.d_model * model.head_dim * 2 * (model.heads + model.kv_heads) // tensor
  is_gather = lambda c: c.kind == "all-gather" and c.axes == (EXPERT,)
  sent = collections.Counter()
  for gather in filter(is_gather, found):
    sent[gather.num_loops] += gather.elements
  of_layer = (X - 1) / X * attention_size
  layers = model.layers // (settings.mesh.stage * chunks)
  has_forward, has_backward = (
    (of >= 0).any(1)
    for of in (step.table(settings).forward_micro_QZ, step.table(settings).backward_micro_QZ)
  )
  loops = [both for both, _ in itertools.groupby(zip(has_forward, has_backward, strict=True))]
  num_units = sum(int(f) + int(b) for f, b in loops)
  expected = {0: 2 * ahead * of_layer, 1: num_units * of_layer, 2: num_units * of_layer}
  assert sent == {loops: n for loops, n in expected.items() if loops < 2 or layers > 1}
  without = step_program(mesh, schedule, chunks, "inputs")[2]
  assert not any(map(is_gather, without))
  assert collections.Counter(itertools.filterfalse(is_gather, found)) == (
    collections.Counter(without)
  )


@pytest.mark.parametrize("is_forward_only", [False, True], ids=["train", "forward_only"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_executor_sends_what_it_declares(schedule, is_forward_only):
  """Along `stage`: a transfer each way in a tick, and all-reduces for head and embedding."""
  case = toy.Case(schedule, stages=4, micro_batches=8, chunks=1 + (schedule == "interleaved"))
  mesh = toy.make_mesh(case)
  table = forward_only(case.table()) if is_forward_only else case.table()
  arrays = toy.make(case.layers, case.micro_batches)
  found = program.collectives(toy.pipelined(mesh, table), *arrays, mesh=mesh)
  activation = (toy.NUM_ROWS, toy.WIDTH)
  in_loops = [c for c in found if c.num_loops and c.axes == (STAGE,)]
  assert {c.shape for c in in_loops} == {activation}
  # The loop over ticks, not that over layers; and for head and embedding, where not every tick has
  # one, a loop of at most one turn.
  deepest = {"collective-permute": 1, "all-reduce": 1 if is_forward_only else 2}
  assert all(1 <= c.num_loops <= deepest[c.kind] for c in in_loops)

  # Each run of ticks that have the same halves is a loop of its own.
  halves = [
    (bool((f >= 0).any()), bool((b >= 0).any()))
    for f, b in zip(table.forward_micro_QZ, table.backward_micro_QZ, strict=True)
  ]
  runs = [
    [tick for tick, _ in run]
    for _, run in itertools.groupby(enumerate(halves), key=operator.itemgetter(1))
  ]
  loops_with = lambda at_Q: sum(bool(at_Q[run].any()) for run in runs)
  arrivals = loops_with((table.arrival_slot_QZ >= 0).any(1))
  backwards = loops_with((table.backward_micro_QZ >= 0).any(1))
  heads, embeds = loops_with(table.head_micro_Q >= 0), loops_with(table.embed_micro_Q >= 0)
  embed_gradients = loops_with(table.embed_gradient_micro_Q >= 0) * (not is_forward_only)
  count = collections.Counter(c.kind for c in in_loops)
  assert count["collective-permute"] == arrivals + backwards
  # The head broadcasts its activation and sums that one's cotangent; the embedding gradient
  # broadcasts a cotangent; the embedding of the toy, as the model's, sums over stages.
  head_cotangents = 0 if is_forward_only else heads
  assert count["all-reduce"] == heads + head_cotangents + embed_gradients + embeds


@pytest.mark.parametrize(
  ("save", "exchanges", "sums"),
  [("inputs", 6, 4), ("exchanges", 4, 2), ("residuals", 4, 2), ("everything", 4, 2)],
)
def test_what_is_saved_is_not_exchanged_again(save, exchanges, sums):
  """All-to-alls a layer: of rows two forward, two backward, and two where the layer is computed
  again; of counts two, along both axes, wherever the layer is computed.
  """
  settings, _, found = step_program((2, 2, 2), "1f1b", 1, save)
  inside = [c for c in found if c.num_loops and c.kind == "all-to-all"]
  rows = [c for c in inside if c.shape[-1] == settings.model.d_model]
  # Forward units stand in two of the loops over ticks (warm-up, steady), backward units in two; in
  # each a layer stands twice, for the last of a chunk comes after the loop over the others.
  assert settings.model.layers // settings.mesh.stage > 1
  assert len(rows) == 2 * 2 * exchanges
  assert len(inside) - len(rows) == 2 * 2 * sums
