"""The grouped SwiGLU: groups of any size, many blocks of one expert, values and gradients."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import config
from moe_jax.moe import grouped, grouped_kernels
from moe_jax.moe.experts import Stacked, Weights
from moe_jax.rehearse import hlo, pod

TOLERANCE = 1e-5  # relative L2, float32

# Rows of each source for each expert, and the rows that a source has.
SIZES = {
  "even": ([[30, 30, 30]] * 4, 90),
  "blocks exactly full": ([[32, 64, 0], [32, 64, 0], [64, 0, 0], [0, 0, 64]], 100),
  "one expert, many blocks": ([[0, 90, 0]] * 4, 90),
  "many blocks at once, and some": ([[700, 12], [500, 300]], 1024),
  "an empty source": ([[5, 0, 1], [0, 0, 0], [1, 60, 7], [0, 0, 2]], 70),
  "nothing": ([[0, 0, 0]] * 4, 8),
  "less than a block": ([[1, 0, 0]], 2),
  "a rank of one expert": ([[64], [40]], 64),
  "a rank of one expert, full": ([[128], [128]], 128),
  "one expert, and none stolen": ([[192, 0]], 192),
}


def case(name, width=6, num_hidden=10):
  sizes, num_source_rows = SIZES[name]
  sizes_Se = jnp.asarray(sizes, jnp.int32)
  S, e = sizes_Se.shape
  random = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  weights = Weights(normal(e, width, 2, num_hidden), normal(e, num_hidden, width))
  shape = (S * num_source_rows, width)
  expert_SB = np.full((S, num_source_rows), e)
  for source, each in enumerate(sizes):
    expert_SB[source, : sum(each)] = np.repeat(np.arange(e), each)
  # Empty rows hold anything.
  return sizes_Se, num_source_rows, weights, normal(*shape), normal(*shape), expert_SB.reshape(-1)


@pytest.mark.parametrize("name", SIZES)
def test_groups_place_each_row_once_in_a_block_of_its_expert(name):
  sizes_Se, num_source_rows, *_, expert_R = case(name)
  groups = jax.jit(grouped.groups, static_argnums=1)(sizes_Se, num_source_rows)
  N, J = groups.row_NJ.shape
  R, e = expert_R.size, sizes_Se.shape[1]
  expected_blocks_e = -(-np.asarray(sizes_Se).sum(0) // J)
  np.testing.assert_array_equal(groups.blocks_e, expected_blocks_e)
  expert_N = np.full(N, e)
  for expert, (first, number) in enumerate(zip(groups.first_e, groups.blocks_e, strict=True)):
    expert_N[first : first + number] = expert
  place_R = np.asarray(groups.place_R)
  np.testing.assert_array_equal(place_R < N * J, expert_R < e)
  for r in np.flatnonzero(expert_R < e):
    assert np.asarray(groups.row_NJ).reshape(-1)[place_R[r]] == r  # the two directions agree
    assert expert_N[place_R[r] // J] == expert_R[r]
  assert (np.asarray(groups.row_NJ) < R).sum() == (expert_R < e).sum()
  stands_for = np.asarray(groups.row_NJ)[np.asarray(groups.row_NJ) >= R] - R
  np.testing.assert_array_equal(np.sort(stands_for[stands_for < R]), np.flatnonzero(expert_R == e))
  assert (stands_for <= R).all()
  assert groups.blocks_e.sum() <= N


@pytest.mark.parametrize("name", SIZES)
def test_grouped_swiglu_equals_a_loop_over_experts(name):
  sizes_Se, num_source_rows, weights, rows_RD, cotangent_RD, expert_R = case(name)

  def production(weights, rows_RD):
    groups = grouped.groups(sizes_Se, num_source_rows)
    return grouped.grouped_swiglu(weights, rows_RD, groups)

  def formula(weights, rows_RD):
    total_RD = jnp.zeros_like(rows_RD)
    for e, (gate_up_D2f, down) in enumerate(zip(*weights, strict=True)):
      gate, up = gate_up_D2f.swapaxes(0, 1)
      y_RD = (jax.nn.silu(rows_RD @ gate) * (rows_RD @ up)) @ down
      total_RD += jnp.where((expert_R == e)[:, None], y_RD, 0.0)
    return total_RD

  found_RD, vjp = jax.vjp(jax.jit(production), weights, rows_RD)
  expected_RD, expected_vjp = jax.vjp(formula, weights, rows_RD)
  check(found_RD, expected_RD)
  check(jax.jit(production)(weights, rows_RD), expected_RD)  # also where nothing is differentiated
  for each, expected in zip(
    jax.tree.leaves(vjp(cotangent_RD)), jax.tree.leaves(expected_vjp(cotangent_RD)), strict=True
  ):
    check(each, expected)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(("width", "num_hidden"), [(64, 128), (6, 10)])
def test_weights_in_a_stack_are_those_of_their_layer(width, num_hidden, kernels):
  """Also where the kernels pad them; other layers are NaN."""
  sizes_Se, num_source_rows, weights, rows_RD, *_ = case("even", width, num_hidden)
  groups = grouped.groups(sizes_Se, num_source_rows)
  beside = lambda w: jnp.stack([jnp.full_like(w, jnp.nan), w, jnp.full_like(w, jnp.nan)])
  stacked = Stacked(jax.tree.map(beside, weights), jnp.int32(1))
  if kernels:
    run = lambda weights: grouped._kernels_forward(weights, rows_RD, groups, interpret=True)[0]
  else:
    run = lambda weights: grouped.grouped_swiglu(weights, rows_RD, groups)
  check(jax.jit(run)(stacked), jax.jit(run)(weights))


@pytest.mark.parametrize("name", ["many blocks at once, and some", "an empty source"])
def test_gradients_are_of_weights_that_are_read_in_their_stack(name):
  """The weights beside it are NaN: the loop over experts reads the stack alone."""
  sizes_Se, num_source_rows, weights, rows_RD, cotangent_RD, _ = case(name)
  groups = grouped.groups(sizes_Se, num_source_rows)
  nans = jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), weights)
  stack = jax.tree.map(lambda w, nan: jnp.stack([nan, nan, w]), weights, nans)

  def run(weights, rows_RD, stacked):
    call = lambda *given: grouped.grouped_swiglu(*given, groups, stacked)
    y_RD, vjp = jax.vjp(call, weights, rows_RD)
    return y_RD, *vjp(cotangent_RD)

  found = jax.jit(run)(nans, rows_RD, Stacked(stack, jnp.int32(2)))
  expected = jax.jit(run)(weights, rows_RD, None)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_bfloat16_gradients_of_weights_are_summed_in_float32():
  """Blocks are summed before they are rounded: the error is that of one rounding."""
  sizes_Se, num_source_rows, weights, rows_RD, cotangent_RD, _ = case("one expert, many blocks")
  half, rows_RD, cotangent_RD = jax.tree.map(
    lambda a: a.astype(jnp.bfloat16), (weights, rows_RD, cotangent_RD)
  )
  groups = grouped.groups(sizes_Se, num_source_rows)
  assert groups.blocks_e[1] > 4
  call = lambda weights: grouped.grouped_swiglu(weights, rows_RD, groups)
  y_RD, vjp = jax.vjp(call, half)
  gradient = vjp(cotangent_RD)[0].down_efD
  assert y_RD.dtype == gradient.dtype == jnp.bfloat16
  gate, up = half.gate_up_eD2f[1].swapaxes(0, 1)
  hidden_Rf = jax.nn.silu(rows_RD @ gate) * (rows_RD @ up)
  expected = np.asarray(hidden_Rf, np.float64).T @ np.asarray(cotangent_RD, np.float64)
  error = np.linalg.norm(np.asarray(gradient[1], np.float64) - expected)
  assert error <= 2**-8 * np.linalg.norm(expected)


def test_blocks_have_64_rows_or_more_and_whole_tiles_of_the_kernels():
  assert grouped.ROWS_PER_BLOCK >= 64
  assert grouped.ROWS_PER_BLOCK % grouped_kernels.TILE == 0


@pytest.mark.parametrize(
  ("rows", "number"), [(10, 1), (127, 1), (128, 2), (200, 3), (512, 8), (10**6, 8)]
)
def test_blocks_at_once_are_two_times_an_experts_even_share_and_at_most_8(rows, number):
  assert grouped.blocks_at_once(rows, 2) == number


@pytest.mark.parametrize(("rows", "number"), [(10, 1), (64, 1), (96, 2), (256, 4), (10**6, 8)])
def test_blocks_at_once_are_no_more_than_hold_all_rows(rows, number):
  assert grouped.blocks_at_once(rows, 1) == number


def check(found, expected):
  assert found.shape == expected.shape
  difference = np.linalg.norm(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
  assert difference <= TOLERANCE * np.linalg.norm(expected)


@pytest.mark.parametrize(
  ("name", "width", "num_hidden"),
  [("even", 64, 128), ("nothing", 6, 10), ("blocks exactly full", 70, 64)],
)
def test_kernels_interpreted_equal_the_loop(name, width, num_hidden):
  sizes_Se, num_source_rows, weights, rows_RD, cotangent_RD, _ = case(name, width, num_hidden)
  groups = grouped.groups(sizes_Se, num_source_rows)
  given = (weights, rows_RD, groups)
  forward = jax.jit(grouped._kernels_forward, static_argnames="interpret")
  found = forward(*given, interpret=True)
  expected = jax.jit(grouped._blocks_forward)(*given)
  check(found[0], expected[0])
  backward = jax.jit(grouped._kernels_backward, static_argnames="interpret")
  found = backward(*given, *found[1:], cotangent_RD, interpret=True)
  expected = jax.jit(grouped._blocks_backward)(*given, *expected[1:], cotangent_RD)
  for each, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    check(each, wanted)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(
  "name",
  ["even", "blocks exactly full", "less than a block", "nothing", "one expert, and none stolen"],
)
def test_groups_may_have_more_experts_than_there_are_weights_if_those_have_no_rows(name, kernels):
  sizes, num_source_rows, weights, rows_RD, cotangent_RD, _ = case(name, 64, 64)
  sizes_Se = sizes.at[:, -1].set(0)
  own = jax.tree.map(lambda w: w[:-1], weights)
  every, of_own = (grouped.groups(of_Se, num_source_rows) for of_Se in (sizes_Se, sizes_Se[:, :-1]))

  @jax.jit
  def run(groups):
    forward, backward = grouped.forward, grouped.backward
    if kernels:
      groups = grouped._of(own, groups)
      forward = functools.partial(grouped._kernels_forward, interpret=True)
      backward = functools.partial(grouped._kernels_backward, interpret=True)
    y_RD, *hidden = forward(own, rows_RD, groups)
    return y_RD, backward(own, rows_RD, groups, *hidden, cotangent_RD)

  found, expected = jax.tree.leaves(run(every)), jax.tree.leaves(run(of_own))
  for each, wanted in zip(found, expected, strict=True):
    check(each, wanted)


@pytest.mark.skipif(
  not importlib.util.find_spec("jax_plugins"), reason="the rehearse extra is not installed"
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_the_program_for_gpus_is_kernels_without_a_loop():
  mesh = pod.describe("h100:1x2").mesh(config.Mesh(expert=2))
  split = PartitionSpec("expert")
  struct = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
    shape, dtype, sharding=NamedSharding(mesh, split)
  )

  def region(weights, rows_RD, sizes_Se, gradient_RD):
    groups = grouped.groups(sizes_Se, 128)
    y_RD, vjp = jax.vjp(lambda *given: grouped.grouped_swiglu(*given, groups), weights, rows_RD)
    return y_RD, vjp(gradient_RD)

  call = jax.jit(jax.shard_map(region, mesh=mesh, in_specs=split, out_specs=split))
  weights = Weights(struct(4, 64, 2, 128), struct(4, 128, 64))
  rows = struct(8 * 128, 64)
  lowered = call.lower(weights, rows, struct(8, 2, dtype=jnp.int32), rows)
  # Autotuning would need the device.
  text = lowered.compile(compiler_options={"xla_gpu_autotune_level": 0}).as_text()
  instructions = [i for c in hlo.parse(text).computations.values() for i in c.instructions]
  kernels = [
    i.backend_config["name"]
    for i in instructions
    if i.opcode == "custom-call" and "triton" in i.attributes
  ]
  expected = [
    grouped_kernels.HIDDEN, grouped_kernels.OUTPUT, grouped_kernels.D_HIDDEN,
    grouped_kernels.D_ROWS, grouped_kernels.D_GATE_UP, grouped_kernels.D_DOWN,
  ]  # fmt: skip
  assert sorted(kernels) == sorted(expected)
  assert not [i for i in instructions if i.opcode == "while"]
