"""A model whose routers have a bias is served with it: greedy text is that of the oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config
from moe_jax.serve.generate import Generator
from tests import reference
from tests.train import parity

PROMPTS = [[5, 77, 130], [200] * 9]
NEW = 6


def test_prefill_and_decode_choose_by_the_bias():
  settings = parity.settings_of((1, 1, 1), model={"layers": 2, "router_bias": True})
  serve = config.Serve(slots=2, max_tokens=16, page=4, prefill_chunk=8)
  settings = dataclasses.replace(settings, serve=serve)
  params = reference.init_params(jax.random.key(0), settings.model)
  params["layers"]["router"]["bias"] *= 8  # strong enough to change what is said
  generate = Generator(settings, parity.mesh_of(settings))
  master = parity.parameters_on(parity.mesh_of(settings), settings, params)
  text = generate(generate.programs.parameters(master), PROMPTS, new_tokens=NEW)

  tokens = np.zeros((2, max(map(len, PROMPTS)) + NEW), np.int32)
  for row, prompt, new in zip(tokens, PROMPTS, text, strict=True):
    row[: len(prompt) + NEW] = [*prompt, *new]  # what follows changes nothing before it
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  said = lambda model: np.asarray(
    reference.logits(params, model, tokens, positions, jnp.ones_like(tokens))
  ).argmax(-1)
  with_bias = said(settings.model)
  without = said(dataclasses.replace(settings.model, router_bias=False))
  for row, other, prompt, new in zip(with_bias, without, PROMPTS, text, strict=True):
    places = slice(len(prompt) - 1, len(prompt) - 1 + NEW)
    assert row[places].tolist() == new != other[places].tolist()
