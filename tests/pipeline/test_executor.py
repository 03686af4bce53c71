"""The executor runs every schedule to the unpipelined reference's loss, reports and gradients."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from moe_jax.pipeline.saving import SAVE
from moe_jax.pipeline.schedules import SCHEDULES
from tests.pipeline import toy
from tests.pipeline.toy import Case

TOLERANCE = 1e-5  # relative L2, float32
# Every number of stages, micro-batches and chunks, every policy, and other axes beside them.
CASES = [
  Case("gpipe", 1, 1),
  Case("gpipe", 1, 4, save="everything", expert=4, tensor=2),
  Case("gpipe", 2, 1, save="residuals", tensor=4),
  Case("gpipe", 2, 17, expert=2, layers_per_chunk=2),
  Case("gpipe", 4, 2, save="everything", expert=2),
  Case("gpipe", 4, 8, save="residuals", tensor=2),
  Case("gpipe", 4, 4, save="exchanges", expert=2),
  Case("gpipe", 8, 4),
  Case("1f1b", 1, 2, expert=2, tensor=2, layers_per_chunk=3),
  Case("1f1b", 1, 8, save="residuals"),
  Case("1f1b", 2, 2, save="everything", expert=2, tensor=2),
  Case("1f1b", 2, 16, tensor=2),
  Case("1f1b", 4, 1, save="residuals", expert=2),
  Case("1f1b", 4, 4, save="everything", layers_per_chunk=2),
  Case("1f1b", 4, 17, tensor=2),
  Case("1f1b", 2, 8, save="exchanges", expert=2, tensor=2, layers_per_chunk=2),
  Case("1f1b", 8, 2, save="residuals"),
  Case("1f1b", 8, 16, save="everything"),
  Case("interleaved", 1, 4, 2, save="everything", tensor=8),
  Case("interleaved", 1, 2, 4, save="residuals", expert=4),
  Case("interleaved", 2, 1, 2, expert=4),
  Case("interleaved", 2, 8, 4, save="everything", tensor=2, layers_per_chunk=2),
  Case("interleaved", 2, 17, 2, save="residuals", expert=2, tensor=2),
  Case("interleaved", 4, 2, 4, expert=2),
  Case("interleaved", 4, 8, 1, save="everything", tensor=2),
  Case("interleaved", 4, 17, 2, save="residuals"),
  Case("interleaved", 2, 4, 2, save="exchanges", expert=2, tensor=2),
  Case("interleaved", 8, 16, 2),
  Case("interleaved", 8, 4, 4, save="everything"),
]
ON_16_DEVICES = [
  Case("gpipe", 8, 4, save="residuals", expert=2),
  Case("1f1b", 8, 17, tensor=2),
  Case("interleaved", 8, 8, 2, save="everything", expert=2),
  Case("interleaved", 8, 17, 4, tensor=2),
]
FORWARD_ONLY = [
  Case("gpipe", 8, 17),
  Case("1f1b", 2, 4, expert=2, tensor=2, layers_per_chunk=2),
  Case("interleaved", 4, 8, 2, tensor=2),
  Case("interleaved", 2, 1, 4, expert=2),
]
ROOT = pathlib.Path(__file__).parents[2]


def name_of(case: Case) -> str:
  return "-".join(map(str, case))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_step_equals_the_unpipelined_reference(case):
  check(toy.differences(case))


@pytest.mark.parametrize("case", FORWARD_ONLY, ids=name_of)
def test_forward_only_equals_the_unpipelined_reference(case):
  check(toy.differences(case, is_forward_only=True))


@pytest.mark.slow
def test_eight_stages_with_other_axes_equal_the_unpipelined_reference():
  count = "--xla_force_host_platform_device_count=16"
  environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {count}"}
  cases = json.dumps([case._asdict() for case in ON_16_DEVICES])
  found = subprocess.run(
    [sys.executable, "-m", "tests.pipeline.toy", cases],
    cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert found.returncode == 0, found.stderr
  every = json.loads(found.stdout.splitlines()[-1])
  assert len(every) == len(ON_16_DEVICES)
  for differences in every:
    check(differences)


def test_cases_cover_schedules_and_policies_and_sizes():
  cases = CASES + ON_16_DEVICES
  assert {case.schedule for case in cases} == set(SCHEDULES)
  assert {(case.schedule, case.save) for case in cases} == {(s, p) for s in SCHEDULES for p in SAVE}
  assert {case.stages for case in cases} == {1, 2, 4, 8}
  assert {case.micro_batches for case in cases} == {1, 2, 4, 8, 16, 17}
  assert {case.chunks for case in cases} == {1, 2, 4}


def test_gradients_accumulate_in_the_dtype_asked_for():
  case = Case("1f1b", 2, 4)
  mesh, table = toy.make_mesh(case), case.table()
  arrays = toy.place(mesh, table, *toy.make(case.layers, case.micro_batches))
  half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), arrays[:2])
  floats = jax.tree.map(
    lambda leaf: leaf if leaf.dtype == jnp.int32 else leaf.astype(jnp.bfloat16), arrays[2]
  )
  shapes = jax.eval_shape(toy.pipelined(mesh, table), *half, floats).gradients
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def check(differences: dict[str, float]):
  too_far = {name: each for name, each in differences.items() if not each <= TOLERANCE}
  assert not too_far
