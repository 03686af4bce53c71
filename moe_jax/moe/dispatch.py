"""The plan that every dispatch makes, and the two moves that follow it: tokens to rows, rows to
tokens.

A plan says, for each row of the send buffer, which assignment fills it, and for each assignment,
which row holds it. Both directions are gathers, and so are their gradients: no scatter, and no
array of [tokens x experts x capacity], in either pass. Knows tokens and rows; must not know how a
plan is made or how rows travel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Plan(NamedTuple):
  """Where each of the T x K assignments goes. R rows = experts x rows per expert.

  Attributes:
    row_TK: the row that holds the assignment, int32; R says that it was dropped.
    assignment_R: the assignment t * K + k that fills the row, int32; T * K says padding.
    rows_E: rows in use of each expert's share, int32.
  """

  row_TK: jax.Array
  assignment_R: jax.Array
  rows_E: jax.Array

  @property
  def kept_TK(self) -> jax.Array:
    """True where the assignment has a row."""
    return self.row_TK < self.assignment_R.shape[0]


class Counts(NamedTuple):
  """What became of this device's assignments, int32: sent = kept + dropped; `padded` rows are
  empty.
  """

  sent: jax.Array
  kept: jax.Array
  dropped: jax.Array
  padded: jax.Array


def count(plan: Plan) -> Counts:
  """Returns the counts of a plan."""
  sent = jnp.asarray(plan.row_TK.size, jnp.int32)
  kept = plan.rows_E.sum(dtype=jnp.int32)
  num_rows = jnp.asarray(plan.assignment_R.size, jnp.int32)
  return Counts(sent=sent, kept=kept, dropped=sent - kept, padded=num_rows - kept)


@jax.custom_vjp
def tokens_to_rows(x_tD: jax.Array, plan: Plan) -> jax.Array:
  """Returns `rows_RD`: each row its assignment's token, padding rows zero."""
  num_choices = plan.row_TK.shape[1]
  filled_R = plan.assignment_R < plan.row_TK.size
  token_R = jnp.minimum(plan.assignment_R // num_choices, x_tD.shape[0] - 1)
  return jnp.where(filled_R[:, None], _take(x_tD, token_R), jnp.zeros((), x_tD.dtype))


def _tokens_to_rows_forward(x_tD, plan):
  return tokens_to_rows(x_tD, plan), plan


def _tokens_to_rows_backward(plan, gradient_RD):
  gradient_tKD = jnp.where(
    plan.kept_TK[..., None], _rows_of(gradient_RD, plan), jnp.zeros((), gradient_RD.dtype)
  )
  return gradient_tKD.sum(1), _no_gradient(plan)


tokens_to_rows.defvjp(_tokens_to_rows_forward, _tokens_to_rows_backward)


@jax.custom_vjp
def rows_to_tokens(rows_RD: jax.Array, weights_TK: jax.Array, plan: Plan) -> jax.Array:
  """Returns `y_tD`, the sum over a token's kept assignments of weight x row; dropped ones add
  nothing.

  Args:
    rows_RD: what the experts made of each row.
    weights_TK: router weights, float32; the sum is taken in float32 and returned in rows' dtype.
  """
  kept_weights_TK = jnp.where(plan.kept_TK, weights_TK, jnp.zeros((), weights_TK.dtype))
  rows_tKD = _rows_of(rows_RD, plan).astype(weights_TK.dtype)
  return jnp.einsum("tk,tkd->td", kept_weights_TK, rows_tKD).astype(rows_RD.dtype)


def _rows_to_tokens_forward(rows_RD, weights_TK, plan):
  return rows_to_tokens(rows_RD, weights_TK, plan), (rows_RD, weights_TK, plan)


def _rows_to_tokens_backward(saved, gradient_tD):
  rows_RD, weights_TK, plan = saved
  filled_R = plan.assignment_R < plan.row_TK.size
  assignment_R = jnp.minimum(plan.assignment_R, plan.row_TK.size - 1)
  weight_R = jnp.where(filled_R, _take(weights_TK.reshape(-1), assignment_R), 0.0)
  token_R = assignment_R // plan.row_TK.shape[1]
  gradient_RD = _take(gradient_tD, token_R) * weight_R[:, None].astype(gradient_tD.dtype)
  row_dots_TK = jnp.einsum(
    "tkd,td->tk",
    _rows_of(rows_RD, plan).astype(weights_TK.dtype),
    gradient_tD.astype(weights_TK.dtype),
  )
  return gradient_RD, jnp.where(plan.kept_TK, row_dots_TK, 0.0), _no_gradient(plan)


rows_to_tokens.defvjp(_rows_to_tokens_forward, _rows_to_tokens_backward)


def _rows_of(rows_RD, plan):
  """Returns rows_tKD of every assignment; a dropped one gets some row, which the caller masks."""
  return _take(rows_RD, jnp.minimum(plan.row_TK, rows_RD.shape[0] - 1))


def _take(x, index):
  """Returns x[index] for indices known to be in range: no clamping code, and no scatter in
  sight.
  """
  return x.at[index].get(mode="promise_in_bounds")


def _no_gradient(plan):
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), plan)
