"""The optimizer against the same chain of optax' own transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import config
from moe_jax.train import optimizer


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_clipping_is_that_of_optax(size):
  train = config.Train(clip_norm=0.5, warmup_steps=0)
  random = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(size * random.normal(size=shape), jnp.float32)
  parameters, gradients = ({"kernel": normal(8, 4), "scale": normal(4)} for _ in range(2))
  theirs = optax.chain(
    optax.clip_by_global_norm(train.clip_norm),
    optax.scale_by_adam(b1=train.beta1, b2=train.beta2),
    optax.add_decayed_weights(train.weight_decay, mask={"kernel": True, "scale": False}),
    optax.scale_by_learning_rate(optimizer.schedule(train)),
  )
  with jax.numpy_dtype_promotion("standard"):  # as optax wants it
    norm = optax.tree.norm(gradients)
    found, expected = (
      optax.with_extra_args_support(each).update(
        gradients, each.init(parameters), parameters, norm=norm
      )
      for each in (optimizer.make(train), theirs)
    )
  for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(mine, other, rtol=1e-6)
