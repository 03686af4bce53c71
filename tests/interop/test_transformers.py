"""The three models against transformers: logits, greedy tokens, and how it reads our folders."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from moe_jax import config
from moe_jax.interop import huggingface, tokenizer
from moe_jax.serve.generate import Generator
from moe_jax.train import state, step
from tests.interop import models
from tests.interop.test_huggingface import like
from tests.train import parity

ABSOLUTE = 1e-4  # of logits, float32, against another program
BATCH, SEQUENCE = 4, 16
KINDS = ["mixtral", "qwen3_moe", "olmoe"]


@pytest.fixture(scope="module", params=KINDS)
def theirs(request, tmp_path_factory):
  """One of their models, its folder of several files, and its logits."""
  model, tokens = models.fixture(request.param, BATCH, SEQUENCE)
  folder = tmp_path_factory.mktemp("theirs") / request.param
  model.save_pretrained(folder, max_shard_size="30KB")
  assert len(list(folder.glob("*.safetensors"))) > 3
  return types.SimpleNamespace(
    kind=request.param, model=model, tokens=tokens, folder=folder,
    logits=models.logits(model, tokens),
  )  # fmt: skip


def settings_of(model, mesh):
  """Returns settings in whose pipeline layers lie in another order than in the model."""
  chunks = 2 if mesh[2] > 1 else 1
  return parity.settings_of(
    mesh, batch=BATCH, sequence=SEQUENCE, model=dataclasses.asdict(model),
    pipeline={"schedule": "interleaved" if chunks > 1 else "1f1b", "chunks": chunks},
    moe={"dispatch": "dropless"},
  )  # fmt: skip


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], ids=["1x1x1", "2x2x2"])
def test_logits_and_the_way_back_equal_transformers(theirs, mesh, tmp_path):
  settings = settings_of(huggingface.read_model(theirs.folder), mesh)
  model, on = settings.model, parity.mesh_of(settings)
  order = state.placement(settings, step.table(settings).layer_order)
  assert (order == np.arange(model.layers)).all() == (mesh == (1, 1, 1))
  parameters = huggingface.load(theirs.folder, like(model, on), order)
  text = one_document(theirs.tokens)
  found = jax.jit(parity.logits(settings, on))(parameters, parity.inputs_on(on, settings, text))
  found = np.asarray(found).reshape(theirs.logits.shape)
  assert theirs.logits.std() > 0.5  # far above the tolerance
  assert np.abs(found - theirs.logits).max() < ABSOLUTE

  back = tmp_path / "back"
  huggingface.save(
    back, parameters, model, order, tokenizer.Bytes(), num_positions=64, largest_file_bytes=50_000
  )
  assert len(list(back.glob("*.safetensors"))) > 3
  assert max(path.stat().st_size for path in back.glob("*.safetensors")) < 60_000
  again = models.load(back)
  assert type(again) is type(theirs.model)
  expected, loaded = theirs.model.state_dict(), again.state_dict()
  assert set(expected) == set(loaded)
  for name, weight in expected.items():
    np.testing.assert_array_equal(loaded[name].numpy(), weight.numpy(), err_msg=name)
  np.testing.assert_array_equal(models.logits(again, theirs.tokens), theirs.logits)


@pytest.mark.slow
def test_greedy_tokens_equal_transformers(theirs):
  """Prompts of several lengths, prefilled in chunks and continued from the key-value cache."""
  settings = settings_of(huggingface.read_model(theirs.folder), (2, 2, 2))
  settings = dataclasses.replace(
    settings, serve=config.Serve(slots=1, max_tokens=32, page=4, prefill_chunk=8)
  )
  on = parity.mesh_of(settings)
  order = state.placement(settings, step.table(settings).layer_order)
  generate = Generator(settings, on)
  parameters = generate.programs.parameters(
    huggingface.load(theirs.folder, like(settings.model, on), order)
  )
  prompts = [theirs.tokens[i, :length] for i, length in enumerate((1, 5, 8, 13))]
  found = generate(parameters, prompts, new_tokens=16)
  for prompt, tokens in zip(prompts, found, strict=True):
    assert len(set(tokens)) > 4  # not one token for ever
    assert tokens == models.generate(theirs.model, prompt, 16)
    # No choice was so narrow that two logits, each off by ABSOLUTE, could have turned it.
    text = np.concatenate([prompt, np.array(tokens, np.int32)])[None]
    assert models.margin(theirs.model, text) > models.MARGIN / 10
    first, second = np.sort(models.logits(theirs.model, text)[0], axis=-1)[:, :-3:-1].T
    assert (first - second)[len(prompt) - 1 : -1].min() > 2 * ABSOLUTE


def one_document(tokens):
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  ones = np.ones_like(tokens)
  return {
    "tokens": tokens, "targets": tokens, "positions": positions, "segments": ones,
    "weights": ones.astype(np.float32),
  }  # fmt: skip
