"""The train step against the one-device oracle: loss, logits and every gradient leaf."""

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

from tests import reference
from tests.train import parity

# (expert, tensor, stage), or with data, then what differs from `parity.settings_of`.


def as_pod64_copies(expert, data, batch=16, **pipeline):
  """Weights of experts lie in shares too; halves, and one message a chunk."""
  pipeline = {"schedule": "interleaved", "micro_batches": 1, "halves": True} | pipeline
  moe = {"expert_ranks_per_host": expert}
  return (expert, 1, 1, data), {"pipeline": pipeline, "moe": moe, "batch": batch}


CASES = {
  "1x1x1-gpipe": ((1, 1, 1), {"pipeline": {"schedule": "gpipe"}}),
  "2x2x2-1f1b-residuals": (
    (2, 2, 2), {"pipeline": {"micro_batches": 4, "save": "residuals"}},
  ),
  "2x2x2-interleaved-everything-tied-gqa": (
    (2, 2, 2),
    {
      "model": {"tied_embeddings": True, "kv_heads": 4},
      "pipeline": {
        "schedule": "interleaved", "chunks": 2, "micro_batches": 5, "save": "everything",
      },
    },
  ),
  "2x2x2-1f1b-head_norm-gqa-residuals": (
    (2, 2, 2),
    {
      "model": {"layers": 4, "qk_norm": "head", "kv_heads": 4, "head_dim": 6},
      "pipeline": {"save": "residuals"},
    },
  ),
  "2x2x2-interleaved-exchanges-projection_norm-clip-unnormalised": (
    (2, 2, 2),
    {
      "model": {
        "layers": 4, "qk_norm": "projection", "clip_qkv": 1.0, "normalize_choices": False,
      },
      "pipeline": {"schedule": "interleaved", "chunks": 2, "save": "exchanges"},
    },
  ),
  "2x2x1-1f1b-everything-projection_norm": (
    (2, 2, 1),
    {"model": {"qk_norm": "projection", "kv_heads": 4}, "pipeline": {"save": "everything"}},
  ),
  "4x2x1-gpipe-flat": ((4, 2, 1), {"moe": {"exchange": "flat"}, "pipeline": {"schedule": "gpipe"}}),
  "4x1x2-two_level-residuals": (
    (4, 1, 2),
    {
      "model": {"layers": 4},
      "moe": {"dispatch": "two_level", "expert_ranks_per_host": 2},
      "pipeline": {"save": "residuals"},
    },
  ),
  "2x2x2-1f1b-streamed-3-residuals": (
    (2, 2, 2), {"pipeline": {"prefetch_layers": 3, "save": "residuals"}},
  ),
  "4x2x1-1f1b-streamed-1-everything-gqa": (
    (4, 2, 1),
    {
      "model": {"kv_heads": 2},
      "pipeline": {"micro_batches": 3, "save": "everything", "prefetch_layers": 1},
    },
  ),
  "4x2x1-gpipe-streamed-3": (
    (4, 2, 1), {"pipeline": {"schedule": "gpipe", "prefetch_layers": 3}},
  ),
  "4x1x2-interleaved-streamed-1-residuals": (
    (4, 1, 2),
    {
      "pipeline": {
        "schedule": "interleaved", "chunks": 2, "micro_batches": 5, "save": "residuals",
        "prefetch_layers": 1,
      },
    },
  ),
  "4x1x2-interleaved-streamed-3-exchanges": (
    (4, 1, 2),
    {
      "pipeline": {
        "schedule": "interleaved", "chunks": 4, "micro_batches": 3, "prefetch_layers": 3,
        "save": "exchanges",
      },
    },
  ),
  # As pod64: weights of three chunks of two layers come beside ticks, and their gradients leave.
  "4x1x2-interleaved-4-residuals": (
    (4, 1, 2),
    {
      "model": {"layers": 16},
      "pipeline": {
        "schedule": "interleaved", "chunks": 4, "micro_batches": 5, "save": "residuals",
      },
    },
  ),
  "4x1x1x2-interleaved-2-halves-residuals": as_pod64_copies(4, 2, chunks=2, save="residuals"),
  "2x1x1x2-interleaved-2-halves-2": as_pod64_copies(2, 2, 16, chunks=2, micro_batches=2),
  "2x1x1x4-interleaved-4-halves-everything": as_pod64_copies(2, 4, chunks=4, save="everything"),
  "2x2x1x2-1f1b-streamed-2-halves-exchanges": (
    (2, 2, 1, 2), {"pipeline": {"prefetch_layers": 2, "save": "exchanges", "halves": True}},
  ),
  "2x1x2x2-interleaved-everything-tied": (
    (2, 1, 2, 2),
    {
      "model": {"tied_embeddings": True},
      "pipeline": {
        "schedule": "interleaved", "chunks": 2, "micro_batches": 3, "save": "everything",
      },
    },
  ),
  "2x2x2-ragged-exchanges": (
    (2, 2, 2), {"moe": {"dispatch": "ragged"}, "pipeline": {"save": "exchanges"}},
  ),
  "2x2x2-gathered-exchanges": (
    (2, 2, 2),
    {
      "model": {"layers": 4},
      "moe": {"dispatch": "gathered"},
      "pipeline": {"save": "exchanges"},
    },
  ),
  "2x1x4-interleaved": (
    (2, 1, 4), {"pipeline": {"schedule": "interleaved", "chunks": 2, "micro_batches": 5}},
  ),
  "2x1x4-gpipe-residuals-tied": (
    (2, 1, 4),
    {
      "model": {"tied_embeddings": True},
      "pipeline": {"schedule": "gpipe", "micro_batches": 4, "save": "residuals"},
    },
  ),
  "8x1x1-1f1b": ((8, 1, 1), {}),
  "1x8x1-gpipe-everything-tied": (
    (1, 8, 1),
    {
      "model": {"tied_embeddings": True},
      "pipeline": {"schedule": "gpipe", "micro_batches": 1, "save": "everything"},
    },
  ),
  "1x1x8-interleaved-residuals-gqa": (
    (1, 1, 8),
    {
      "model": {"layers": 16, "kv_heads": 1},
      "pipeline": {
        "schedule": "interleaved", "chunks": 2, "micro_batches": 3, "save": "residuals",
      },
      "batch": 6,
    },
  ),
}  # fmt: skip
ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("name", CASES)
def test_loss_logits_and_gradients_equal_the_oracle(name):
  mesh, different = CASES[name]
  check(parity.differences(parity.settings_of(mesh, **different)))


@pytest.mark.parametrize(
  ("name", "num_roundings"),
  # A gradient of each half, their sum, and their sum over copies; and of micro-batches each sum.
  [("2x1x1x2-interleaved-2-halves-2", 3), ("2x2x2-1f1b-residuals", 5)],
)
def test_gradients_in_bfloat16_are_off_by_their_roundings(name, num_roundings):
  mesh, different = CASES[name]
  pipeline = different["pipeline"] | {"gradient_dtype": "bfloat16"}
  found = parity.differences(parity.settings_of(mesh, **different | {"pipeline": pipeline}))
  assert found.pop("margin") > reference.MARGIN
  check_alike = [found.pop(what) for what in ("loss", "cross_entropy", "logits")]
  assert max(check_alike) <= parity.TOLERANCE
  rounding = float(jnp.finfo(jnp.bfloat16).eps) / 2
  too_far = {leaf: each for leaf, each in found.items() if not each <= num_roundings * rounding}
  assert not too_far
  assert found["layers/experts/down"] > rounding / 4, "they are not in bfloat16"


@pytest.mark.slow
def test_pod_shape_on_64_devices_equals_the_oracle():
  case = {
    "mesh": [8, 4, 2],
    "batch": 16,
    "model": {"experts": 16, "layers": 4},
    "pipeline": {"schedule": "interleaved", "chunks": 2},
    "moe": {"capacity_factor": 8.0},
  }
  check(in_process(case, num_devices=64))


def check(differences: dict[str, float]):
  differences = dict(differences)
  assert differences.pop("margin") > reference.MARGIN
  too_far = {name: each for name, each in differences.items() if not each <= parity.TOLERANCE}
  assert not too_far


def in_process(case: dict, num_devices: int) -> dict[str, float]:
  """Returns `parity.differences` of a case on `num_devices` virtual devices."""
  count = f"--xla_force_host_platform_device_count={num_devices}"
  # The last setting of a flag holds.
  environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {count}"}
  found = subprocess.run(
    [sys.executable, "-m", "tests.train.parity", json.dumps(case)],
    cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert found.returncode == 0, found.stderr
  return json.loads(found.stdout.splitlines()[-1])
