"""AdamW with warm-up and cosine decay, clipped by global norm: optax, assembled from the config.

Pure functions of whole (global) arrays; `jit` shards them. Must not know the model or the mesh.
"""

import jax
import jax.numpy as jnp
import optax

from moe_jax import config

_NOT_DECAYED = ("scale", "bias")


def schedule(train: config.Train) -> optax.Schedule:
  """Returns the learning rate at each step: linear warm-up, then cosine decay to a fraction."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0 if train.warmup_steps else train.learning_rate,
    peak_value=train.learning_rate,
    warmup_steps=train.warmup_steps,
    decay_steps=max(train.steps, train.warmup_steps + 1),
    end_value=train.learning_rate * train.final_learning_rate_fraction,
  )


def make(train: config.Train) -> optax.GradientTransformationExtraArgs:
  """Returns the optimizer; weight decay leaves norm scales and the routers' biases alone.

  Its `update` takes `norm`, the global norm of the gradients: who sums them knows it.

  No gradient reaches those biases, so their updates are zeros: the step moves them by its rule.

  Source: Decoupled Weight Decay Regularization (arXiv:1711.05101), algorithm 2.
  """
  return optax.chain(
    _clip_by_norm(train.clip_norm),
    optax.scale_by_adam(b1=train.beta1, b2=train.beta2),
    optax.add_decayed_weights(train.weight_decay, mask=_decayed),
    optax.scale_by_learning_rate(schedule(train)),
  )


def _clip_by_norm(most: float) -> optax.GradientTransformationExtraArgs:
  """Returns optax' clip_by_global_norm of a norm that is given, as one factor: optax divides every
  gradient by it, which XLA thinks too dear to repeat in what reads it, and so writes all out first.
  """

  def update(updates, state, parameters=None, *, norm: jax.Array, **others):
    del parameters, others
    return optax.tree.scale(jnp.minimum(1, most / norm), updates), state

  return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _decayed(parameters):
  is_left = lambda path: any(f"['{name}']" in jax.tree_util.keystr(path) for name in _NOT_DECAYED)
  return jax.tree_util.tree_map_with_path(lambda path, _: not is_left(path), parameters)
