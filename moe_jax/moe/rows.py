"""Tokens to rows and rows to tokens: the two moves round every exchange.

A layout says, for each row of the send buffer, which assignment fills it, and for each assignment,
which row holds it. Both directions are gathers, and so are their gradients: no scatter, and no
array of [tokens x experts x capacity], in either pass. Knows tokens and rows; must not know how a
layout is made or how rows travel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Layout(NamedTuple):
  """Where each of the T x K assignments lies among R rows.

  Attributes:
    row_TK: the row that holds the assignment, int32; R says that none does.
    assignment_R: the assignment t * K + k that fills the row, int32; T * K says padding.
  """

  row_TK: jax.Array
  assignment_R: jax.Array

  @property
  def placed_TK(self) -> jax.Array:
    """True where the assignment has a row."""
    return self.row_TK < self.assignment_R.shape[0]


@jax.custom_vjp
def tokens_to_rows(x_tD: jax.Array, layout: Layout) -> jax.Array:
  """Returns `rows_RD`: each row its assignment's token, padding rows zero."""
  num_choices = layout.row_TK.shape[1]
  filled_R = layout.assignment_R < layout.row_TK.size
  token_R = jnp.minimum(layout.assignment_R // num_choices, x_tD.shape[0] - 1)
  return jnp.where(filled_R[:, None], _take(x_tD, token_R), jnp.zeros((), x_tD.dtype))


def _tokens_to_rows_forward(x_tD, layout):
  return tokens_to_rows(x_tD, layout), layout


def _tokens_to_rows_backward(layout, gradient_RD):
  gradient_tKD = jnp.where(
    layout.placed_TK[..., None], _rows_of(gradient_RD, layout), jnp.zeros((), gradient_RD.dtype)
  )
  return gradient_tKD.sum(1), None


tokens_to_rows.defvjp(_tokens_to_rows_forward, _tokens_to_rows_backward)


@jax.custom_vjp
def rows_to_tokens(rows_RD: jax.Array, weights_TK: jax.Array, layout: Layout) -> jax.Array:
  """Returns `y_tD`, the sum over a token's kept assignments of weight x row; dropped ones add
  nothing.

  Args:
    rows_RD: what the experts made of each row.
    weights_TK: router weights, float32; the sum is taken in float32 and returned in rows' dtype.
  """
  kept_weights_TK = jnp.where(layout.placed_TK, weights_TK, jnp.zeros((), weights_TK.dtype))
  rows_tKD = _rows_of(rows_RD, layout).astype(weights_TK.dtype)
  return jnp.einsum("tk,tkd->td", kept_weights_TK, rows_tKD).astype(rows_RD.dtype)


def _rows_to_tokens_forward(rows_RD, weights_TK, layout):
  return rows_to_tokens(rows_RD, weights_TK, layout), (rows_RD, weights_TK, layout)


def _rows_to_tokens_backward(saved, gradient_tD):
  rows_RD, weights_TK, layout = saved
  filled_R = layout.assignment_R < layout.row_TK.size
  assignment_R = jnp.minimum(layout.assignment_R, layout.row_TK.size - 1)
  weight_R = jnp.where(filled_R, _take(weights_TK.reshape(-1), assignment_R), 0.0)
  token_R = assignment_R // layout.row_TK.shape[1]
  gradient_RD = _take(gradient_tD, token_R) * weight_R[:, None].astype(gradient_tD.dtype)
  row_dots_TK = jnp.einsum(
    "tkd,td->tk",
    _rows_of(rows_RD, layout).astype(weights_TK.dtype),
    gradient_tD.astype(weights_TK.dtype),
  )
  return gradient_RD, jnp.where(layout.placed_TK, row_dots_TK, 0.0), None


rows_to_tokens.defvjp(_rows_to_tokens_forward, _rows_to_tokens_backward)


def _rows_of(rows_RD, layout):
  """Returns rows_tKD of every assignment; a dropped one gets some row, which the caller masks."""
  return _take(rows_RD, jnp.minimum(layout.row_TK, rows_RD.shape[0] - 1))


def _take(x, index):
  """Returns x[index] for indices known to be in range: no clamping code, and no scatter in
  sight.
  """
  return x.at[index].get(mode="promise_in_bounds")
