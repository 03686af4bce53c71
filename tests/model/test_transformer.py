"""The network against somebody else's, and what may influence what."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.model import transformer
from moe_jax.parallel.axes import STAGE, TENSOR
from tests import mixtral, reference
from tests.train import parity

ABSOLUTE = 1e-4  # of logits, float32, against another program
SHAPES = {
  "grouped": ({"heads": 8, "kv_heads": 2}, 17),
  "one_kv_head_tied_top3": (
    {"heads": 4, "kv_heads": 4, "tied_embeddings": True, "experts_per_token": 3, "layers": 2},
    16,
  ),
  "narrow_heads_odd": ({"heads": 8, "kv_heads": 4, "head_dim": 6, "experts": 6, "d_model": 20}, 33),
}
BATCH = 4
MESHES = [(1, 1, 1), (2, 2, 2)]


@pytest.fixture(scope="module", params=SHAPES)
def hugging_face(request):
  sizes, sequence = SHAPES[request.param]
  model = config.Model(**{**parity.MODEL, "layers": 4, **sizes})
  return sizes, *mixtral.fixture(model, BATCH, sequence)


@pytest.mark.parametrize("mesh", MESHES)
def test_logits_equal_hugging_face(hugging_face, mesh):
  sizes, theirs, params, tokens = hugging_face
  expected = mixtral.logits(theirs, tokens)
  tensor = mesh[1]
  padding = -tokens.shape[1] % tensor  # positions come in whole shares, so a caller pads
  padded = np.pad(tokens, ((0, 0), (0, padding)))
  model = {"layers": 4, **sizes}
  experts, chosen = ({**parity.MODEL, **model}[k] for k in ("experts", "experts_per_token"))
  settings = parity.settings_of(
    mesh, batch=BATCH, sequence=padded.shape[1], model=model,
    moe={"capacity_factor": experts / chosen},
  )  # fmt: skip
  found = production_logits(settings, params, one_document(padded))[:, : tokens.shape[1]]
  assert np.abs(found - expected).max() < ABSOLUTE


def one_document(tokens):
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  ones = np.ones_like(tokens)
  return {
    "tokens": tokens, "targets": tokens, "positions": positions, "segments": ones,
    "weights": ones.astype(np.float32),
  }  # fmt: skip


def production_logits(settings, params, batch):
  mesh = parity.mesh_of(settings)
  parameters = parity.parameters_on(mesh, settings, params)
  inputs = parity.inputs_on(mesh, settings, batch)
  logits_UBSV = np.asarray(jax.jit(parity.logits(settings, mesh))(parameters, inputs))
  return logits_UBSV.reshape(*batch["tokens"].shape, -1)


@functools.cache
def influence(mesh, is_packed):
  """Returns (influence_BSBM, batch): whether the logits at (row, position) depend on the token at
  another, found by their gradient with respect to the embedding.

  Every place of the batch has a token of its own, so a row of the table is one place.
  """
  settings = parity.settings_of(mesh, batch=4, sequence=12, model={"layers": 2})
  B, S = 4, 12
  tokens = np.random.default_rng(0).permutation(256)[: B * S].reshape(B, S).astype(np.int32)
  batch = one_document(tokens)
  if is_packed:
    segments = np.ones((B, S), np.int32)
    segments[0, 5:] = 2
    segments[2, 1:] = 2
    segments[2, 7:] = 3
    starts = np.stack([[np.flatnonzero(row == s)[0] for s in row] for row in segments])
    batch |= {"segments": segments, "positions": (np.arange(S)[None] - starts).astype(np.int32)}
  on = parity.mesh_of(settings)
  params = reference.init_params(jax.random.key(0), settings.model)
  parameters = parity.parameters_on(on, settings, params)
  inputs = parity.inputs_on(on, settings, batch)
  logits = parity.logits(settings, on)

  @jax.jit
  def gradient(parameters, row, position):
    def picked(parameters):
      logits_BSV = logits(parameters, inputs).reshape(B, S, -1)
      # Squares, because the sum over the vocabulary of a direction could be near zero.
      return jnp.sum(logits_BSV[row, position] ** 2)

    table_VD = jax.grad(picked)(parameters).shared["embedding"]["table"]
    return jnp.abs(table_VD[...]).sum(-1)[tokens.reshape(-1)] > 0

  every = [[np.asarray(gradient(parameters, b, s)) for s in range(S)] for b in range(B)]
  return np.array(every).reshape(B, S, B, S), batch


@pytest.mark.parametrize("is_packed", [False, True], ids=["one_document", "packed"])
@pytest.mark.parametrize("mesh", MESHES)
def test_a_position_sees_itself_and_earlier_ones_of_its_document_only(mesh, is_packed):
  found_BSBM, batch = influence(mesh, is_packed)
  at = np.arange(12)
  causal_SM = at[:, None] >= at[None, :]
  same_row = np.eye(4, dtype=bool)[:, None, :, None]
  segments = batch["segments"]
  same_document = segments[:, :, None, None] == segments[None, None]
  expected = same_row & same_document & causal_SM[None, :, None, :]
  np.testing.assert_array_equal(found_BSBM, expected)


def test_padding_behind_a_sequence_changes_nothing():
  settings = parity.settings_of((2, 2, 2), batch=4, sequence=12, model={"layers": 2})
  params = reference.init_params(jax.random.key(1), settings.model)
  random = np.random.default_rng(1)
  tokens = random.integers(0, 256, (4, 12), dtype=np.int32)
  longer = np.concatenate([tokens, random.integers(0, 256, (4, 4), dtype=np.int32)], axis=1)
  found = production_logits(settings, params, one_document(tokens))
  longer_settings = dataclasses.replace(
    settings, train=dataclasses.replace(settings.train, sequence=16)
  )
  of_longer = production_logits(longer_settings, params, one_document(longer))
  assert parity.relative_l2(of_longer[:, :12], found) < parity.TOLERANCE


def test_bfloat16_logits_are_near_float32():
  """The compute dtype reaches the matmuls and leaves routing, norms and logits in float32."""
  settings = parity.settings_of((1, 1, 1), batch=2, sequence=12, model={"layers": 2})
  params, batch = reference.fixture(settings)
  expected = production_logits(settings, params, batch)
  half = dataclasses.replace(settings.model, dtype="bfloat16")
  mesh = parity.mesh_of(settings)
  parameters = parity.parameters_on(mesh, settings, params)
  cast = transformer.cast(parameters, jnp.bfloat16)
  dtypes = {path: leaf.dtype for path, leaf in parity.named(cast).items()}
  kept = {
    "final_norm/scale",
    "layers/attention_norm/scale",
    "layers/expert_norm/scale",
    "layers/router/kernel",
  }
  assert {name for name, dtype in dtypes.items() if dtype == jnp.float32} == kept
  settings = dataclasses.replace(settings, model=half)
  inputs = parity.inputs_on(mesh, settings, batch)
  found = jax.jit(parity.logits(settings, mesh))(cast, inputs)
  assert found.dtype == jnp.float32
  error = parity.relative_l2(np.asarray(found).reshape(expected.shape), expected)
  assert parity.TOLERANCE < error < parity.BFLOAT16_TOLERANCE


def test_the_embeddings_gradient_is_summed_wide():
  """Of a bfloat16 table and a token that is everywhere: 256 is where bfloat16 stops counting."""
  settings = parity.settings_of((1, 1, 1), batch=2, sequence=1024, model={"dtype": "bfloat16"})
  mesh, model = parity.mesh_of(settings), settings.model
  shared = transformer.cast(transformer.init(jax.random.key(0), model), jnp.bfloat16).shared
  inputs = transformer.Inputs(
    *[jnp.full((1, 1024), 7, jnp.int32)] * len(transformer.Inputs._fields)
  )
  add = transformer.loss_functions(settings).add_embed_gradient
  x_bsD = jnp.ones((1, 1024, model.d_model), jnp.bfloat16)

  def region(shared):
    sums = add(jax.tree.map(jnp.zeros_like, shared), shared, inputs, x_bsD)
    return jax.lax.psum(sums, (STAGE, TENSOR))

  everywhere = jax.sharding.PartitionSpec()
  gradient = jax.jit(jax.shard_map(region, mesh=mesh, in_specs=everywhere, out_specs=everywhere))
  table_VD = np.asarray(gradient(shared)["embedding"]["table"][...], np.float32)
  expected_VD = np.zeros_like(table_VD)
  expected_VD[7] = 1024
  np.testing.assert_array_equal(table_VD, expected_VD)
