"""The collectives of a whole step: gradients of parameters are summed once, outside every loop but
one that sends those of chunks which are done, weights are gathered once, or streamed once for each
layer of a unit, and the executor sends what its docstring declares.
"""

import collections
import functools
import itertools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.model import transformer
from moe_jax.parallel import sharding
from moe_jax.parallel.axes import ALL, DATA, EXPERT, STAGE, TOKENS
from moe_jax.pipeline import ends
from moe_jax.pipeline.schedules import SCHEDULES, forward_only
from moe_jax.pipeline.segments import has_room_beside_heads
from moe_jax.train import step, streaming
from tests.contracts import program
from tests.contracts.small import SEQUENCE, settings_of, struct
from tests.pipeline import toy
from tests.train import parity


@functools.cache
def step_program(mesh, schedule="1f1b", chunks=1, save="inputs", ahead=0):
  pipeline = {
    "schedule": schedule, "chunks": chunks, "micro_batches": 4, "save": save,
    "prefetch_layers": ahead,
  }  # fmt: skip
  return program_of(settings_of(mesh, pipeline=pipeline))


def program_of(settings):
  shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), settings.model))
  rows = (settings.pipeline.micro_batches, 8, SEQUENCE)
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
    ((1, 2, 2), "interleaved", 2, "everything", 0),
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


@pytest.mark.parametrize("ahead", [0, 1])
def test_weights_come_and_gradients_leave_a_layer_at_a_time(ahead):
  """4 stages' chunks of one layer: of the attention of chunk 0 weights are gathered before the
  ticks, and gradients summed behind them; of chunk 1 beside a tick, which is a loop of one turn.
  With weights streamed they come layer by layer anyway.
  """
  settings, on, found = step_program((2, 2, 2), "interleaved", 2, "inputs", ahead)
  assert settings.model.layers == 4
  shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), settings.model))
  specs = transformer.specs(settings.model)
  of_layer = lambda leaf, spec: jax.sharding.NamedSharding(on, spec).shard_shape(leaf.shape)[1:]
  is_by_layer = streaming.summed(settings, on).takes
  leaves = zip(jax.tree.leaves(shapes.layers), jax.tree.leaves(specs.layers), strict=True)
  whole = [of_layer(*leaf) for leaf, by in zip(leaves, is_by_layer, strict=True) if by]
  assert len(whole) == 4  # query, key, value and output
  sent = lambda kind: collections.Counter(
    (c.num_loops, math.prod(c.shape)) for c in found if c.kind == kind and c.axes == (EXPERT,)
  )
  scattered, gathered = sent("reduce-scatter"), sent("all-gather")
  for size, times in collections.Counter(map(math.prod, whole)).items():
    assert scattered[1, size] == scattered[0, size] == times
    if not ahead:
      assert gathered[1, size // 2] == gathered[0, size // 2] == times


def test_between_copies_a_chunk_comes_and_leaves_in_one_message():
  """As in pod64_copies, with 2 chunks of 2 layers. The first chunk's weights come with the
  embedding's, the second's beside it; its gradients leave beside the first's, of which the second
  layer's leave beside the first one, and that one's with all that is left.
  """
  pipeline = {"schedule": "interleaved", "chunks": 2, "micro_batches": 1, "halves": True}
  moe = {"expert_ranks_per_host": 2}
  settings, on, found = program_of(settings_of((2, 1, 1, 2), pipeline=pipeline, moe=moe))
  specs = transformer.specs(settings.model)
  shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), settings.model))

  def shares(part):
    """Returns the elements of its shares between copies, of each leaf; None where it has none."""
    for leaf, spec in zip(jax.tree.leaves(shapes[part]), jax.tree.leaves(specs[part]), strict=True):
      is_split = DATA in sharding.shares(spec, leaf.shape, on).axes
      spec = sharding.zero_spec(spec, leaf.shape, on)
      here = jax.sharding.NamedSharding(on, spec).shard_shape(leaf.shape)
      yield math.prod(here) if is_split else 0

  layers, shared = list(shares(0)), list(shares(1))
  takes = streaming.summed(settings, on).takes
  layer = sum(size for size, by in zip(layers, takes, strict=True) if by) // settings.model.layers
  rest = sum(size for size, by in zip(layers, takes, strict=True) if not by) + sum(shared)
  head = shapes.shared["head"]["kernel"].get_value().size // (on.shape[DATA] * on.shape[EXPERT])
  embedding = shapes.shared["embedding"]["table"].get_value().size
  embedding //= on.shape[DATA] * on.shape[EXPERT]
  sent = [c.shape for c in found if c.kind == "all-to-all" and c.axes == (DATA,)]
  elements = collections.Counter(shape[1] for shape in sent if len(shape) == 2)
  assert elements == collections.Counter(
    [embedding + 2 * layer, 2 * layer, head, 2 * layer, layer, layer + rest - head, head]
  )


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


@pytest.mark.parametrize("mesh", [(2, 2, 2), (4, 2, 1), (2, 1, 4), (2, 1, 2, 2), (1, 2, 1, 4)])
def test_each_gradient_is_summed_once_outside_the_loops(mesh):
  """And of the weights gathered inside the region, once, those that heads alone read, and between
  copies the embedding's; between copies what travels at one time does so in one message.
  """
  settings, on, found = step_program(mesh)
  specs = transformer.specs(settings.model)
  shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), settings.model))
  expected, messages = collections.Counter(), collections.Counter()
  kernel, table = (
    shapes.shared[a][b].get_value() for a, b in (("head", "kernel"), ("embedding", "table"))
  )
  for leaf, spec in zip(jax.tree.leaves(shapes), jax.tree.leaves(specs), strict=True):
    here = jax.sharding.NamedSharding(on, spec).shard_shape(leaf.shape)
    remaining = sharding.replicated_axes(spec)
    dimension, axes = sharding.shares(spec, leaf.shape, on)
    is_late = leaf is kernel and has_room_beside_heads(step.table(settings))
    for axis in axes:  # between copies a share of it
      if axis == EXPERT:
        expected["reduce-scatter", (axis,), here] += 1
      else:
        messages["sums", is_late] += math.prod(here) // on.shape[axis]
      size = here[dimension] // on.shape[axis]
      here = (*here[:dimension], size, *here[dimension + 1 :])
    share = here
    is_mine = is_late or (on.shape[DATA] > 1 and (leaf is kernel or leaf is table))
    for axis in reversed(axes if is_mine else ()):
      if axis == EXPERT:
        expected["all-gather", (axis,), share] += 1
      else:
        messages["weights", is_late] += math.prod(share)
      size = share[dimension] * on.shape[axis]
      share = (*share[:dimension], size, *share[dimension + 1 :])
    remaining = tuple(axis for axis in remaining if axis not in axes and on.shape[axis] > 1)
    if remaining:
      expected["all-reduce", remaining, here] += 1
  expected["all-reduce", ALL, (3,)] += 1  # losses and norm
  for elements in messages.values():
    expected["all-to-all", (DATA,), (on.shape[DATA], elements)] += 1
  outside = collections.Counter(
    (c.kind, c.axes, c.shape) for c in found if not c.num_loops and math.prod(c.shape) > 1
  )
  reports = [shape for _, axes, shape in outside if axes == TOKENS]
  per_stage = settings.model.layers // settings.mesh.stage
  reports = {(per_stage,), (per_stage, settings.model.experts)} & set(reports)
  outside = collections.Counter(
    {key: n for key, n in outside.items() if key[1:] not in [(TOKENS, r) for r in reports]}
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
  layers, if that has more than one, and once behind it, for the chunk's last. And maybe the head's
  kernel before the first head. Nothing else changes.
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
  table = step.table(settings)
  num_units = sum(has_forward + has_backward for (has_forward, has_backward, *_), _ in runs(table))
  of_head = (X - 1) / X * model.d_model * model.vocab / (settings.mesh.stage * tensor)
  of_head *= has_room_beside_heads(table)
  begin = 2 * ahead * of_layer + of_head
  expected = {0: begin, 1: num_units * of_layer, 2: num_units * of_layer}
  assert sent == {loops: n for loops, n in expected.items() if loops < 2 or layers > 1}
  without = step_program(mesh, schedule, chunks, "inputs")[2]
  if chunks == 1:
    assert sum(each.elements for each in filter(is_gather, without)) == of_head
  without = itertools.filterfalse(is_gather, without)
  assert collections.Counter(itertools.filterfalse(is_gather, found)) == (
    collections.Counter(without)
  )


@pytest.mark.parametrize("is_forward_only", [False, True], ids=["train", "forward_only"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stages", [2, 4])
def test_executor_sends_what_it_declares(stages, schedule, is_forward_only):
  """Along `stage`: a transfer each way in a tick, of two stages in one message; and all-reduces for
  head and embedding.
  """
  case = toy.Case(schedule, stages=stages, micro_batches=8, chunks=1 + (schedule == "interleaved"))
  mesh = toy.make_mesh(case)
  table = forward_only(case.table()) if is_forward_only else case.table()
  arrays = toy.make(case.layers, case.micro_batches)
  found = program.collectives(toy.pipelined(mesh, table), *arrays, mesh=mesh)
  activation = (toy.NUM_ROWS, toy.WIDTH)
  in_loops = [c for c in found if c.num_loops and c.axes == (STAGE,)]
  both = (2, *activation)
  assert {c.shape for c in in_loops} <= {activation, both}
  # The loop over ticks, not that over layers; and for head and embedding, where not every tick has
  # one, a loop of at most one turn.
  deepest = {"collective-permute": 1, "all-reduce": 1 if is_forward_only else 2}
  assert all(1 <= c.num_loops <= deepest[c.kind] for c in in_loops)

  of_ticks = [ticks for _, ticks in runs(table)]
  loops_with = lambda at_Q: sum(bool(at_Q[ticks].any()) for ticks in of_ticks)
  arrives_Q, has_backward_Q = (
    (table.arrival_slot_QZ >= 0).any(1),
    (table.backward_micro_QZ >= 0).any(1),
  )
  # In training what a tick made travels at its end, for the next one.
  departs_Q = arrives_Q if is_forward_only else np.roll(arrives_Q, -1)
  sends = [bool(departs_Q[ticks].any()) for ticks in of_ticks]
  returns = [bool(has_backward_Q[ticks].any()) for ticks in of_ticks]
  joined = sum(s and r for s, r in zip(sends, returns, strict=True)) * (stages == 2)
  heads, embeds = loops_with(table.head_micro_Q >= 0), loops_with(table.embed_micro_Q >= 0)
  embed_gradients = loops_with(table.embed_gradient_micro_Q >= 0) * (not is_forward_only)
  count = collections.Counter(c.kind for c in in_loops)
  assert count["collective-permute"] == sum(sends) + sum(returns) - joined
  assert sum(c.shape == both for c in in_loops) == joined
  # The head broadcasts its activation, unless two stages hold it, and sums that one's cotangent;
  # the embedding gradient broadcasts a cotangent; the embedding of the toy, as the model's, sums
  # over stages.
  broadcasts = heads if is_forward_only or table.head_needs_broadcast else 0
  head_cotangents = 0 if is_forward_only else heads
  assert count["all-reduce"] == broadcasts + head_cotangents + embed_gradients + embeds


def runs(table):
  """Returns the ticks that make a loop, those in a row which have the same halves and beside which
  weights come, or gradients leave, alike: (has forward, has backward, comes, leaves) and ticks.
  """
  kinds = zip(
    (table.forward_micro_QZ >= 0).any(1).tolist(),
    (table.backward_micro_QZ >= 0).any(1).tolist(),
    (ends.coming(table) >= 0).tolist(),
    (ends.leaving(table) >= 0).tolist(),
    strict=True,
  )
  return [
    (kind, [tick for tick, _ in run])
    for kind, run in itertools.groupby(enumerate(kinds), key=operator.itemgetter(1))
  ]


@pytest.mark.parametrize(
  ("save", "exchanges"), [("inputs", 6), ("exchanges", 4), ("residuals", 4), ("everything", 4)]
)
def test_what_is_saved_is_not_exchanged_again(save, exchanges):
  """All-to-alls of rows a layer: two forward, two backward, and two where the layer is computed
  again; and of all layers' counts two in each loop with a head, along both axes.
  """
  settings, _, found = step_program((2, 2, 2), "1f1b", 1, save)
  inside = [c for c in found if c.num_loops and c.kind == "all-to-all"]
  rows = [c for c in inside if c.shape[-1] == settings.model.d_model]
  # Forward units stand in two of the loops over ticks (warm-up, steady), backward units in two; in
  # each a layer stands twice, for the last of a chunk comes after the loop over the others.
  assert settings.model.layers // settings.mesh.stage > 1
  assert len(rows) == 2 * 2 * exchanges
  layers = settings.model.layers // settings.mesh.stage
  counts = [c for c in inside if c.shape[-2:] == (layers, settings.model.experts)]
  assert len(counts) == len(inside) - len(rows) == 2 * 2  # a head stands in two of those loops
