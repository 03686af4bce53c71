"""Who comes where: among all assignments by a key, and among those of an expert by weight.

By sorting; on GPUs few assignments are compared each with each, which is one kernel where sorts are
several that wait for each other, and take longest of all kernels to compile. Both ways give the
same integers. Knows integers and weights; must not know rows' contents, dispatches or devices.

Local letters: A assignments, E experts, C rows of each expert, g experts of a group, G groups.
"""

import functools

import jax
import jax.numpy as jnp

_MOST_COMPARED = 4096  # assignments: above, A x A comparisons take longer than sorts


def by_key(key_A: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (order_A, place_A): which assignment comes where by key, equal ones in order, and where
  each comes. int32.

  Args:
    key_A: not negative, int32.
  """
  return _on_platform(key_A.size, _compared_by_key, _sorted_by_key)(key_A)


def inverse(place_A: jax.Array) -> jax.Array:
  """Returns `order_A`, which assignment has each place, int32.

  Args:
    place_A: of each, all from 0 to A - 1 once, int32.
  """
  return _at_places(place_A, _numbers(place_A))


def ranks(expert_A: jax.Array, weight_A: jax.Array, assigned_E: jax.Array) -> jax.Array:
  """Returns `rank_A`, each assignment's place from the heaviest among those of its expert, int32;
  of equal ones the first comes first.

  Args:
    expert_A: E is no expert, and the rank of its assignments is any number.
    assigned_E: how many assignments each expert has.
  """
  return _on_platform(expert_A.size, _compared_ranks, _sorted_ranks)(expert_A, weight_A, assigned_E)


def fillers(
  expert_A: jax.Array, rank_A: jax.Array, rows_E: jax.Array, num_rows: int, group_size: int
) -> jax.Array:
  """Returns `assignment_GCg`, which assignment has a rank at an expert, int32; A where none has.

  Args:
    expert_A: E where the assignment has no row.
    rank_A: below `rows_E` of the expert, and no two alike.
    rows_E: how many assignments of each expert have a row.
    num_rows: C.
    group_size: g, of experts that follow each other.
  """
  ways = (_compared_fillers, _sorted_fillers)
  sizes = {"num_rows": num_rows, "group_size": group_size}
  ways = (functools.partial(way, **sizes) for way in ways)
  return _on_platform(expert_A.size, *ways)(expert_A, rank_A, rows_E)


def _on_platform(num_assignments: int, compared, by_sorting):
  if num_assignments > _MOST_COMPARED:
    return by_sorting
  return functools.partial(jax.lax.platform_dependent, cuda=compared, default=by_sorting)


def _sorted_by_key(key_A):
  _, order_A = jax.lax.sort((key_A, _numbers(key_A)), num_keys=1)
  return order_A, inverse(order_A)


def _compared_by_key(key_A):
  is_before_AA = key_A[None, :] < key_A[:, None]
  is_equal_AA = key_A[None, :] == key_A[:, None]
  is_earlier_AA = _numbers(key_A)[None, :] < _numbers(key_A)[:, None]
  place_A = jnp.sum(is_before_AA | (is_equal_AA & is_earlier_AA), 1, dtype=jnp.int32)
  return inverse(place_A), place_A


def _at_places(place_A, x_A):
  """Returns what `x_A` holds of each assignment at the assignment's place."""
  return jax.lax.platform_dependent(place_A, x_A, cuda=_scattered, default=_sorted)


def _sorted(place_A, x_A):
  # A scatter would run row by row on CPU.
  return jax.lax.sort((place_A, x_A), num_keys=1)[1]


def _scattered(place_A, x_A):
  nothing_A = jnp.zeros_like(x_A)
  return nothing_A.at[place_A].set(x_A, mode="promise_in_bounds", unique_indices=True)


def _numbers(x_A):
  return jnp.arange(x_A.size, dtype=jnp.int32)


def _sorted_ranks(expert_A, weight_A, assigned_E):
  number_A = _numbers(expert_A)
  sorted_expert_A, _, order_A = jax.lax.sort((expert_A, -weight_A, number_A), num_keys=2)
  first_E = jnp.cumsum(assigned_E, dtype=jnp.int32) - assigned_E
  rank_A = number_A - first_E[jnp.minimum(sorted_expert_A, first_E.size - 1)]
  return _at_places(order_A, rank_A)


def _compared_ranks(expert_A, weight_A, assigned_E):
  del assigned_E
  number_A = _numbers(expert_A)
  is_same_AA = expert_A[None, :] == expert_A[:, None]
  is_heavier_AA = weight_A[None, :] > weight_A[:, None]
  is_equal_AA = weight_A[None, :] == weight_A[:, None]
  is_earlier_AA = number_A[None, :] < number_A[:, None]
  is_before_AA = is_same_AA & (is_heavier_AA | (is_equal_AA & is_earlier_AA))
  return jnp.sum(is_before_AA, 1, dtype=jnp.int32)


def _sorted_fillers(expert_A, rank_A, rows_E, *, num_rows, group_size):
  num_assignments = expert_A.size
  # An assignment without a row has expert E, so whatever its rank it comes last.
  key_A = jnp.where(expert_A < rows_E.size, expert_A * num_rows + rank_A, rows_E.size * num_rows)
  _, order_A = jax.lax.sort((key_A, _numbers(key_A)), num_keys=1)
  first_E = jnp.cumsum(rows_E, dtype=jnp.int32) - rows_E
  rank_C = jnp.arange(num_rows, dtype=jnp.int32)
  place_EC = jnp.minimum(first_E[:, None] + rank_C[None, :], num_assignments - 1)
  is_filled_EC = rank_C[None, :] < rows_E[:, None]
  assignment_EC = jnp.where(is_filled_EC, order_A[place_EC], num_assignments)
  return assignment_EC.reshape(-1, group_size, num_rows).swapaxes(1, 2)


def _compared_fillers(expert_A, rank_A, rows_E, *, num_rows, group_size):
  number_A = _numbers(expert_A)
  shape = (rows_E.size // group_size, num_rows, group_size)
  group_GCg, rank_GCg, place_GCg = jnp.indices(shape, dtype=jnp.int32)
  expert_GCg = group_GCg * group_size + place_GCg
  is_here_GCgA = (expert_A[None, None, None] == expert_GCg[..., None]) & (
    rank_A[None, None, None] == rank_GCg[..., None]
  )
  return jnp.where(is_here_GCgA, number_A[None, None, None], expert_A.size).min(-1)
