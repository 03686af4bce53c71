"""Prompts of mixed lengths continued on a mesh, and the oracle's opinion of the text.

Knows tests/reference.py and the generator; must not know what is tested.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config
from moe_jax.serve.generate import Generator
from tests import reference
from tests.train import parity

MODEL = {"layers": 4, "kv_heads": 4}
LENGTHS = (1, 7, 8, 9, 16, 23, 30, 5)  # about a page of 4 and a chunk of 8
NEW = 64
SEED = 0  # whose margins the test finds wide enough
PROMPTS = [np.random.default_rng(length).integers(0, 256, length).tolist() for length in LENGTHS]


def settings_of(mesh, **serve) -> config.Config:
  """Returns the small deployment on a mesh with a slot for each prompt."""
  settings = parity.settings_of(
    mesh, model=MODEL, pipeline={"schedule": "interleaved", "chunks": 2}
  )
  slots = len(LENGTHS) // (settings.mesh.sequence_shares * settings.mesh.stage)
  sizes = {"slots": slots, "max_tokens": 100, "page": 4, "prefill_chunk": 8, "decode_tokens": 3}
  return dataclasses.replace(settings, serve=config.Serve(**{**sizes, **serve}))


@functools.cache
def generator(mesh, **serve):
  """Returns the generator of a mesh, and its parameters."""
  settings = settings_of(mesh, **serve)
  made = Generator(settings, parity.mesh_of(settings))
  master = parity.parameters_on(parity.mesh_of(settings), settings, params())
  return made, made.programs.parameters(master)


@functools.cache
def params() -> dict:
  return reference.init_params(jax.random.key(SEED), settings_of((1, 1, 1)).model)


def right_padded(rows) -> np.ndarray:
  """Returns the rows as one array; what follows a row changes nothing in it."""
  found = np.zeros((len(rows), max(map(len, rows))), np.int32)
  for row, tokens in zip(found, rows, strict=True):
    row[: len(tokens)] = tokens
  return found


@functools.cache
def logits(rows: tuple[tuple[int, ...], ...]) -> np.ndarray:
  """Returns the oracle's logits_BSV of whole texts."""
  model, tokens = settings_of((1, 1, 1)).model, right_padded(rows)
  return np.asarray(reference.logits(params(), model, tokens, *_document(tokens)))


def margin(rows) -> float:
  """Returns the smallest gap between router logits at the choice, in all tokens and layers."""
  tokens = right_padded(rows)
  positions, segments = _document(tokens)
  batch = {"tokens": tokens, "positions": positions, "segments": segments}
  return reference.margin(params(), settings_of((1, 1, 1)).model, batch)


def keys_and_values(rows) -> tuple[np.ndarray, np.ndarray]:
  """Returns the oracle's keys and values of whole texts, [L, B, S, G, H]."""
  model, layers = settings_of((1, 1, 1)).model, params()["layers"]
  tokens = right_padded(rows)
  positions, segments = map(jnp.asarray, _document(tokens))
  x_BSD, found = params()["embedding"]["table"][tokens], []
  for l in range(model.layers):
    weights = jax.tree.map(lambda stacked, l=l: stacked[l], layers)
    h_BSD = reference._rms_norm(x_BSD, weights["attention_norm"]["scale"], model.norm_epsilon)
    key = jnp.einsum("BSD,DGH->BSGH", h_BSD, weights["attention"]["key"])
    value = jnp.einsum("BSD,DGH->BSGH", h_BSD, weights["attention"]["value"])
    found.append((reference._rotate(key, positions, model), value))
    x_BSD, _ = reference._layer(layers, l, model, x_BSD, positions, segments)
  keys, values = zip(*found, strict=True)
  return np.stack(keys), np.stack(values)


def _document(tokens):
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  return positions, np.ones_like(tokens)
