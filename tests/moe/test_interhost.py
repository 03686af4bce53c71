"""Bytes between hosts, read from the replica groups and shapes of compiled programs for 8 hosts x 8
GPUs: what each way to exchange saves over the one before.
"""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def found():
  run = subprocess.run(
    [sys.executable, "-m", "tests.moe.interhost", "--json"],
    env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert run.returncode == 0, run.stderr[-2000:]
  return json.loads(run.stdout)


def test_hierarchical_sends_a_quarter_of_flat(found):
  """Each of 4 tensor ranks sends its own quarter: 25%, and the bar is 26%."""
  assert 0.2 < found["hierarchical"] / found["flat"] <= 0.26


def test_two_level_limited_to_one_host_sends_half_of_hierarchical(found):
  """One row where there were two; choices and weights of the rows travel too. The bar is 60%."""
  assert 0.45 < found["two_level, one host a token"] / found["hierarchical"] <= 0.60


def test_two_level_with_free_routing_has_buffers_for_both_choices(found):
  assert found["two_level, any hosts"] == pytest.approx(found["hierarchical"], rel=0.02)
