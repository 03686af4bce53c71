"""Cross-entropy of vocabulary shares against the plain formula; what its gradient multiplies."""

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.model.cross_entropy import cross_entropy
from moe_jax.parallel import collectives
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import ALL, SEQUENCES, STAGE, TENSOR

b, S, D, V = 2, 5, 8, 24


def arrays(dtype=jnp.float32):
  random = np.random.default_rng(0)
  h_bSD = jnp.asarray(random.normal(size=(b, S, D)), dtype)
  kernel_DV = jnp.asarray(random.normal(size=(D, V)), dtype)
  targets_bS = jnp.asarray(random.integers(0, V, (b, S)), jnp.int32)
  weights_bS = jnp.asarray(random.random((b, S)), jnp.float32).at[0, 1].set(0.0)
  return h_bSD, kernel_DV, targets_bS, weights_bS


def share_and_gradients(h_bSD, kernel_Dv, targets_bS, weights_bS):
  """Returns, of one device, its share of the loss and of the gradients of `h` and the kernel."""
  h_bSD, kernel_Dv = collectives.varying((h_bSD, kernel_Dv))
  loss = lambda h, kernel: cross_entropy(h, kernel, targets_bS, weights_bS)
  share, vjp = jax.vjp(loss, h_bSD, kernel_Dv)
  g_h, g_kernel = vjp(collectives.varying_like(jnp.ones(()), share))
  return collectives.varying(share)[None], g_h[None], g_kernel[None]


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 4, 1), (1, 2, 2), (1, 1, 4)])
def test_shares_sum_to_the_plain_formula(mesh):
  sizes = config.Mesh(*mesh)
  on = mesh_lib.make(sizes, jax.devices()[: sizes.num_devices])
  given = arrays()
  call = jax.shard_map(
    share_and_gradients, mesh=on, in_specs=(P(), P(None, (STAGE, TENSOR)), P(), P()),
    out_specs=(P(ALL), P(ALL), P(SEQUENCES, None, (STAGE, TENSOR))),
  )  # fmt: skip
  shares, g_h, g_kernel = jax.jit(call)(*given)

  def formula(h_bSD, kernel_DV):
    log_bSV = jax.nn.log_softmax(jnp.einsum("bsd,dv->bsv", h_bSD, kernel_DV))
    picked_bS = jnp.take_along_axis(log_bSV, given[2][..., None], -1)[..., 0]
    return -jnp.sum(given[3] * picked_bS)

  expected, gradients = jax.value_and_grad(formula, (0, 1))(*given[:2])
  np.testing.assert_allclose(shares.sum(), expected, rtol=1e-5)
  np.testing.assert_allclose(g_h.sum(0), gradients[0], rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(g_kernel[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_bfloat16_is_multiplied_in_bfloat16():
  """A product of float32 is one at a fifteenth of the rate on an H100."""
  on = mesh_lib.make(config.Mesh(), jax.devices()[:1])
  call = jax.shard_map(share_and_gradients, mesh=on, in_specs=P(), out_specs=P(ALL))
  closed = jax.make_jaxpr(call)(*arrays(jnp.bfloat16))
  products = [eqn for eqn in equations(closed.jaxpr) if eqn.primitive.name == "dot_general"]
  assert len(products) == 3
  assert {v.aval.dtype for eqn in products for v in eqn.invars} == {jnp.dtype(jnp.bfloat16)}


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jex.jaxprs_in_params(eqn.params):
      yield from equations(inner)
