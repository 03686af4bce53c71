"""The oracle against somebody else's model, finite differences and its own definition."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Config, Data, Model, Moe, Pipeline, Train
from tests import reference

LOGITS_ATOL = 1e-4  # against Hugging Face, in float32

GROUPED = Model(
  layers=3, d_model=64, heads=8, kv_heads=2, head_dim=16, experts=8, experts_per_token=2,
  expert_hidden=48, vocab=97, rope_theta=1e6,
)  # fmt: skip
TIED = Model(
  layers=2, d_model=48, heads=6, kv_heads=6, head_dim=8, experts=5, experts_per_token=3,
  expert_hidden=32, vocab=61, tied_embeddings=True, norm_epsilon=1e-3,
)  # fmt: skip
ONE_LAYER = Model(
  layers=1, d_model=32, heads=4, kv_heads=1, head_dim=12, experts=6, experts_per_token=1,
  expert_hidden=24, vocab=50,
)  # fmt: skip
MIXTRALS = {"grouped": (GROUPED, 2, 33), "tied": (TIED, 3, 15), "one_layer": (ONE_LAYER, 2, 24)}


def config_of(model, batch=4, sequence=17, micro_batches=2, **moe):
  return Config(
    model=model,
    pipeline=Pipeline(micro_batches=micro_batches),
    moe=Moe(**moe),
    train=Train(batch=batch, sequence=sequence),
    data=Data(tokenizer="bpe"),  # bytes would need a vocabulary of 256
  )


def one_document(tokens):
  """Returns positions and segments of rows that are one document each."""
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32)[None], tokens.shape)
  return positions, np.ones(tokens.shape, np.int32)


@pytest.fixture(scope="module", params=MIXTRALS)
def hugging_face(request):
  reason = (
    "the comparison with Hugging Face's Mixtral needs: pip install torch==2.13.0 transformers"
  )
  pytest.importorskip("torch", reason=reason)
  pytest.importorskip("transformers", reason=reason)
  from tests import mixtral

  model, batch, sequence = MIXTRALS[request.param]
  torch_model, params, tokens = mixtral.fixture(model, batch, sequence)
  return types.SimpleNamespace(
    mixtral=mixtral, torch_model=torch_model, model=model, params=params, tokens=tokens
  )


def test_logits_equal_hugging_face(hugging_face):
  expected_BSV = hugging_face.mixtral.logits(hugging_face.torch_model, hugging_face.tokens)
  got_BSV = reference.logits(
    hugging_face.params, hugging_face.model, hugging_face.tokens, *one_document(hugging_face.tokens)
  )
  assert expected_BSV.std() > 0.5  # far above the tolerance
  np.testing.assert_allclose(got_BSV, expected_BSV, rtol=0, atol=LOGITS_ATOL)


def test_logits_of_packed_documents_equal_hugging_face(hugging_face):
  num_rows, length = hugging_face.tokens.shape
  config = config_of(hugging_face.model, num_rows, length, micro_batches=1)
  batch = reference.random_batch(config, seed=1)
  positions, segments = batch["positions"], batch["segments"]
  assert segments.max() > 1
  mixtral, torch_model = hugging_face.mixtral, hugging_face.torch_model
  assert mixtral.margin(torch_model, hugging_face.tokens, positions) > 1e-5
  expected_BSV = mixtral.logits(torch_model, hugging_face.tokens, positions)
  got_BSV = reference.logits(
    hugging_face.params, hugging_face.model, hugging_face.tokens, positions, segments
  )
  np.testing.assert_allclose(got_BSV, expected_BSV, rtol=0, atol=LOGITS_ATOL)


def test_loss_equals_hugging_face(hugging_face):
  model, tokens = hugging_face.model, hugging_face.tokens
  cross_entropy, aux_loss = hugging_face.mixtral.losses(hugging_face.torch_model, tokens)
  positions, segments = one_document(tokens)
  weights = np.ones(tokens.shape, np.float32)
  weights[:, -1] = 0.0  # nothing follows the last token
  batch = {
    "tokens": tokens, "targets": np.roll(tokens, -1, axis=1),
    "positions": positions, "segments": segments, "weights": weights,
  }  # fmt: skip
  config = config_of(model, *tokens.shape, micro_batches=1)
  _, parts = reference.loss(hugging_face.params, config, batch)
  assert float(parts["cross_entropy"]) == pytest.approx(cross_entropy, abs=1e-5)
  if model.layers == 1:
    expected = aux_loss / model.experts_per_token
    assert float(parts["load_balance"]) == pytest.approx(expected, abs=1e-5)


def test_margin_equals_hugging_face(hugging_face):
  positions, segments = one_document(hugging_face.tokens)
  batch = {"tokens": hugging_face.tokens, "positions": positions, "segments": segments}
  got = reference.margin(hugging_face.params, hugging_face.model, batch)
  expected = hugging_face.mixtral.margin(hugging_face.torch_model, hugging_face.tokens)
  assert got == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("model", [GROUPED, TIED], ids=["grouped", "tied"])
def test_gradient_equals_finite_differences(model):
  config = config_of(model, load_balance_weight=0.5, router_z_weight=0.5)
  params, batch = reference.fixture(config)
  with jax.enable_x64(True):
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)

    def loss(params):
      return reference.loss(params, config, batch)[0]

    gradient = jax.grad(loss)(params)
    random = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(params)
    for path_id, (path, slope) in enumerate(jax.tree.leaves_with_path(gradient)):
      direction = random.standard_normal(slope.shape)
      direction *= 1e-5 / np.linalg.norm(direction)

      def moved(by, path_id=path_id, direction=direction):
        changed = [leaf + by * direction if i == path_id else leaf for i, leaf in enumerate(leaves)]
        return float(loss(jax.tree.unflatten(tree, changed)))

      expected = (moved(1) - moved(-1)) / 2
      got = float(jnp.sum(slope * direction))
      # The gradient is smooth, so central differences are off by the step squared and by rounding.
      assert got == pytest.approx(expected, rel=1e-5, abs=1e-14), jax.tree_util.keystr(path)


@pytest.mark.parametrize("model", [GROUPED, TIED], ids=["grouped", "tied"])
def test_float32_is_far_more_exact_than_parity_asks(model):
  config = config_of(model)
  params, batch = reference.fixture(config)
  loss_and_gradient = jax.value_and_grad(reference.loss, has_aux=True)
  (loss, _), gradient = loss_and_gradient(params, config, batch)
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
    (expected_loss, _), expected = loss_and_gradient(wide, config, batch)
  assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
  for (path, got), leaf in zip(
    jax.tree.leaves_with_path(gradient), jax.tree.leaves(expected), strict=True
  ):
    got, leaf = np.asarray(got, np.float64), np.asarray(leaf)
    error = np.linalg.norm(got - leaf) / np.linalg.norm(leaf)
    assert error < 3e-6, f"{jax.tree_util.keystr(path)}: relative L2 {error:.1e}"


def test_no_token_sees_a_later_one():
  length = 15
  params = reference.init_params(jax.random.key(0), GROUPED)
  tokens = np.arange(length, dtype=np.int32)[None]  # each its own row of the table
  positions, segments = one_document(tokens)
  for at in (0, 7, length - 1):

    def output(table, at=at):
      changed = {**params, "embedding": {"table": table}}
      return jnp.sum(reference.logits(changed, GROUPED, tokens, positions, segments)[0, at] ** 2)

    slope_VD = np.asarray(jax.grad(output)(params["embedding"]["table"]))
    sees = np.abs(slope_VD[:length]).max(axis=-1) > 0
    np.testing.assert_array_equal(sees, np.arange(length) <= at)


def test_documents_of_a_row_do_not_see_each_other():
  first, second = 6, 9
  params = reference.init_params(jax.random.key(1), GROUPED)
  random = np.random.default_rng(0)
  tokens = random.integers(0, GROUPED.vocab, (1, first + second), dtype=np.int32)
  positions = np.concatenate([np.arange(first), np.arange(second)])[None].astype(np.int32)
  segments = np.repeat([1, 2], [first, second])[None].astype(np.int32)
  packed_BSV = reference.logits(params, GROUPED, tokens, positions, segments)

  changed = tokens.copy()
  changed[:, :first] = (tokens[:, :first] + 1) % GROUPED.vocab
  changed_BSV = reference.logits(params, GROUPED, changed, positions, segments)
  np.testing.assert_array_equal(changed_BSV[:, first:], packed_BSV[:, first:])
  assert np.abs(changed_BSV[:, :first] - packed_BSV[:, :first]).max() > 0.1

  alone = tokens[:, first:]
  alone_BSV = reference.logits(params, GROUPED, alone, *one_document(alone))
  np.testing.assert_allclose(alone_BSV, packed_BSV[:, first:], rtol=0, atol=1e-5)


def test_loss_weighs_the_whole_batch_and_averages_the_rest_over_micro_batches():
  config = config_of(
    GROUPED, batch=4, micro_batches=2, load_balance_weight=0.3, router_z_weight=0.2
  )
  params, batch = reference.fixture(config)
  loss, parts = reference.loss(params, config, batch)
  halves = []
  for rows in (slice(0, 2), slice(2, 4)):
    half = {name: array[rows] for name, array in batch.items()}
    one = config_of(GROUPED, batch=2, micro_batches=1, load_balance_weight=0.3, router_z_weight=0.2)
    halves.append((reference.loss(params, one, half)[1], half["weights"].sum()))
  (a, a_weight), (b, b_weight) = halves
  assert a_weight != b_weight
  assert float(a["cross_entropy"]) != pytest.approx(float(b["cross_entropy"]), rel=1e-3)
  expected = {
    "cross_entropy": (a["cross_entropy"] * a_weight + b["cross_entropy"] * b_weight)
    / (a_weight + b_weight),
    "load_balance": (a["load_balance"] + b["load_balance"]) / 2,
    "router_z": (a["router_z"] + b["router_z"]) / 2,
  }
  for name, value in expected.items():
    assert float(parts[name]) == pytest.approx(float(value), rel=1e-6), name
  total = expected["cross_entropy"] + 0.3 * expected["load_balance"] + 0.2 * expected["router_z"]
  assert float(loss) == pytest.approx(float(total), rel=1e-6)
  np.testing.assert_array_equal(parts["counts"], a["counts"] + b["counts"])
  tokens = batch["tokens"].size
  np.testing.assert_array_equal(
    parts["counts"].sum(axis=1), [tokens * GROUPED.experts_per_token] * GROUPED.layers
  )


def test_indifferent_router_has_the_least_loss():
  config = config_of(GROUPED)
  params, batch = reference.fixture(config)
  params["layers"]["router"]["kernel"] = jnp.zeros_like(params["layers"]["router"]["kernel"])
  _, parts = reference.loss(params, config, batch)
  assert float(parts["load_balance"]) == pytest.approx(1.0, rel=1e-6)
  assert float(parts["router_z"]) == pytest.approx(np.log(GROUPED.experts) ** 2, rel=1e-6)
  expected = np.zeros((GROUPED.layers, GROUPED.experts), np.int32)
  expected[:, : GROUPED.experts_per_token] = batch["tokens"].size  # a tie goes to the first
  np.testing.assert_array_equal(parts["counts"], expected)


@pytest.mark.parametrize("sequence", [1, 2, 17])
def test_fixture_has_documents_and_a_margin(sequence):
  config = config_of(GROUPED, batch=4, sequence=sequence)
  params, batch = reference.fixture(config, seed=5)
  assert reference.margin(params, config.model, batch) > reference.MARGIN
  again = reference.fixture(config, seed=5)
  for got, expected in zip(jax.tree.leaves(again), jax.tree.leaves((params, batch)), strict=True):
    np.testing.assert_array_equal(got, expected)
  other = reference.random_batch(config, seed=6)
  assert not np.array_equal(other["tokens"], batch["tokens"])

  segments, positions = batch["segments"], batch["positions"]
  assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
    name: (np.float32 if name == "weights" else np.int32, (4, sequence)) for name in batch
  }
  is_new = np.diff(segments, axis=1, prepend=0) == 1
  assert is_new[:, 0].all() and set(np.unique(np.diff(segments, axis=1))) <= {0, 1}
  np.testing.assert_array_equal(positions == 0, is_new)
  np.testing.assert_array_equal(np.diff(positions, axis=1)[~is_new[:, 1:]], 1)
  ends = np.concatenate([is_new[:, 1:], np.ones((4, 1), bool)], axis=1)
  assert not batch["weights"][ends].any()
  np.testing.assert_array_equal(batch["targets"][:, :-1], batch["tokens"][:, 1:])
  if sequence > 1:
    assert segments[0].max() > 1
    assert segments[-1].max() > 1
  if sequence >= 17:
    assert batch["weights"].sum() > 0


def test_fixture_that_cannot_have_a_margin_says_so(monkeypatch):
  monkeypatch.setattr(reference, "MARGIN", 1e3)
  monkeypatch.setattr(reference, "MAX_SEEDS", 2)
  with pytest.raises(ValueError, match=r"margin of seeds 3 to 4 .* choose a smaller train\.batch"):
    reference.fixture(config_of(ONE_LAYER), seed=3)


def test_margin_is_infinite_where_every_expert_is_chosen():
  model = dataclasses.replace(ONE_LAYER, experts_per_token=ONE_LAYER.experts)
  config = config_of(model)
  params, batch = reference.fixture(config)
  assert reference.margin(params, config.model, batch) == float("inf")


def test_rows_that_do_not_split_are_refused():
  config = config_of(ONE_LAYER, batch=4, micro_batches=2)
  params, batch = reference.fixture(config)
  odd = {name: array[:3] for name, array in batch.items()}
  with pytest.raises(ValueError, match=r"3 rows do not split into pipeline\.micro_batches=2"):
    reference.loss(params, config, odd)
