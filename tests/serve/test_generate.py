"""Generation against the oracle: the whole text anew, on one device, for every token."""

import jax
import numpy as np
import pytest

from moe_jax.serve.generate import Generator
from tests import reference
from tests.train import parity

PROMPT = [104, 101, 108]


@pytest.fixture(scope="module")
def generator():
  """A generator on 2x2x2, its parameters, and the oracle's greedy continuation of PROMPT."""
  settings = parity.settings_of(
    (2, 2, 2),
    pipeline={"schedule": "interleaved", "chunks": 2},
    moe={"capacity_factor": 0.5},  # would drop half the tokens, were it not for a sample
  )
  mesh = parity.mesh_of(settings)
  params, _ = reference.fixture(settings)
  parameters = parity.parameters_on(mesh, settings, params)
  return settings, Generator(settings, mesh), parameters, _greedy(params, settings)


def _greedy(params, settings) -> list[int]:
  num_positions = settings.train.sequence
  positions_BS = np.arange(num_positions, dtype=np.int32)[None]
  segments_BS = np.zeros((1, num_positions), np.int32)
  logits = jax.jit(
    lambda tokens: reference.logits(params, settings.model, tokens, positions_BS, segments_BS)
  )
  tokens = list(PROMPT)
  while len(tokens) < num_positions:
    window_BS = np.array([tokens + [0] * (num_positions - len(tokens))], np.int32)
    tokens.append(int(logits(window_BS)[0, len(tokens) - 1].argmax()))
  return tokens


def test_without_temperature_every_row_is_the_oracles_most_likely_text(generator):
  settings, generate, parameters, expected = generator
  rows = generate(parameters, PROMPT, temperature=0.0, seed=0)
  assert rows.tolist() == [expected] * settings.mesh.expert
  assert len(set(expected)) > 3  # not one token over and over


def test_draws_depend_on_seed_and_row_and_keep_the_prompt(generator):
  settings, generate, parameters, expected = generator
  rows = generate(parameters, PROMPT, temperature=1.0, seed=0)
  assert rows[:, : len(PROMPT)].tolist() == [PROMPT] * settings.mesh.expert
  assert rows[0].tolist() != rows[1].tolist()
  assert (rows == generate(parameters, PROMPT, temperature=1.0, seed=0)).all()
  assert (rows != generate(parameters, PROMPT, temperature=1.0, seed=1)).any()
  cold = generate(parameters, PROMPT, temperature=1e-4, seed=1)
  assert cold.tolist() == [expected] * settings.mesh.expert


def test_another_prompt_or_temperature_compiles_nothing(generator):
  _, generate, parameters, _ = generator
  generate(parameters, PROMPT, temperature=0.0, seed=0)
  size = generate._jitted._cache_size()
  generate(parameters, [1] * 7, temperature=0.5, seed=3)
  assert generate._jitted._cache_size() == size == 1


@pytest.mark.parametrize(
  ("prompt", "temperature", "message"),
  [
    ([], 1.0, "the prompt has 0 tokens; give 1 to 15"),
    ([0] * 16, 1.0, "the prompt has 16 tokens; give 1 to 15, for the window is train.sequence=16"),
    ([0], -1.0, "temperature=-1.0 is not a number from 0 up"),
    ([0], float("nan"), "temperature=nan is not a number from 0 up"),
  ],
)
def test_what_cannot_be_continued_is_refused(generator, prompt, temperature, message):
  _, generate, parameters, _ = generator
  with pytest.raises(ValueError, match=message):
    generate(parameters, prompt, temperature=temperature, seed=0)
