"""The ragged dispatch: results equal to the last bit where the platform lacks its exchange, its
collectives those declared, and the real exchange in the program for GPUs.
"""

import importlib.util
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_jax import config
from moe_jax.moe import dropless, ragged
from moe_jax.parallel import mesh as mesh_lib
from tests.contracts import program as contracts
from tests.moe import served
from tests.moe.test_dispatch import HERE, K, case

RAGGED = config.Moe(dispatch="ragged", capacity_factor=1.0)


def test_ragged_equals_dropless_bit_for_bit():
  given = case("zipf_1", 1)
  plain = config.Moe(dispatch="dropless", capacity_factor=1.0)
  found = served.program((4, 2), RAGGED)(*given)
  expected = served.program((4, 2), plain)(*given)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("mesh", [(8, 1), (4, 2)])
def test_ragged_sends_what_it_declares(mesh):
  X, tensor = mesh
  given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), case("even", 1))
  found = contracts.collectives(
    served.program(mesh, RAGGED).__wrapped__, *given,
    mesh=mesh_lib.make(config.Mesh(expert=X, tensor=tensor)),
  )  # fmt: skip
  B = dropless.rows_per_rank(HERE, K, X, 1.0)
  sizes = {"X": X, "tensor": tensor, "B": B, "D": served.WIDTH}
  declared = [
    each
    for function in (ragged.send, ragged.back)
    for each in contracts.declared(function, **sizes)
    if each[2] and each[0] != "ragged-all-to-all"  # of CUDA alone
  ]
  # The plan comes first.
  rows = [c for c in found if not c.num_loops and c.shape[-1:] == (served.WIDTH,)]
  assert contracts.summary(rows[: len(declared)]) == sorted(declared)


_LOWERED = """
from launch import environment
environment.described_devices("h100:2x4")
import re
import jax
from moe_jax import config
from moe_jax.moe import layer
from moe_jax.rehearse import pod
from tests.moe import served

moe = config.Moe(dispatch="ragged", capacity_factor=4.0)  # one round
serve = lambda weights, *arrays: layer.serve(weights, moe, *arrays)
program = served.program_of((4, 2), serve, pod.describe("h100:2x4").devices)
case = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), served.case("even", 256))
lowered = program.lower(*case)
text = lowered.as_text()
print(text.count("@ragged_all_to_all"), text.count("stablehlo.all_to_all"))
print(len(re.findall(r" ragged-all-to-all(?:-start)?[(]", lowered.compile().as_text())))
"""


@pytest.mark.skipif(
  not importlib.util.find_spec("jax_plugins"), reason="the rehearse extra is not installed"
)
def test_the_program_for_gpus_holds_the_real_exchange():
  run = subprocess.run(
    [sys.executable, "-c", _LOWERED], capture_output=True, text=True, timeout=300,
    env={**os.environ, "XLA_FLAGS": ""},
  )  # fmt: skip
  assert run.returncode == 0, run.stderr[-3000:]
  ragged_exchanges, padded, compiled = map(int, run.stdout.split())
  assert ragged_exchanges == 4  # there and back, forward and backward
  assert padded == 1  # the sizes, of which all travel
  assert compiled >= 4
