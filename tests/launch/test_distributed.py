"""Processes find each other by flags or by their cluster's environment, or say why not."""

import os
import subprocess
import sys

import pytest

from tests import runs

PROGRAM = """
from launch import distributed
from launch.flags import run

def main():
  distributed.start()
  import jax
  print("process", jax.process_index(), "of", jax.process_count())

run(main, config=False, devices=True)
"""
CLUSTERS = ("SLURM_", "OMPI_", "JAX_COORDINATOR")


def start(*flags, **variables):
  inherited = {k: v for k, v in os.environ.items() if not k.startswith(CLUSTERS)}
  return subprocess.Popen(
    [sys.executable, "-c", PROGRAM, "--virtual_devices=2", *flags],
    cwd=runs.ROOT, env={**inherited, **variables},
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def finish(processes):
  """Returns each process's exit code, last line of output and errors."""
  ended = []
  for process in processes:
    try:
      out, errors = process.communicate(timeout=120)
    finally:
      process.kill()
    ended.append((process.returncode, (out.splitlines() or [""])[-1], errors))
  return ended


def slurm(process_id: int, num_processes: int) -> dict[str, str]:
  return {
    "SLURM_JOB_ID": "4321",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": str(num_processes),
    "SLURM_PROCID": str(process_id),
    "SLURM_LOCALID": str(process_id),
    "SLURM_STEP_NUM_NODES": "1",
  }


def test_tasks_of_a_slurm_step_join():
  port = str(runs.free_port())
  processes = [start(**slurm(i, 2), JAX_COORDINATOR_PORT=port) for i in range(2)]
  assert [ended[:2] for ended in finish(processes)] == [
    (0, "process 0 of 2"),
    (0, "process 1 of 2"),
  ]


@pytest.mark.parametrize(
  ("flags", "variables"), [((), {}), ((), slurm(0, 1)), (("--distributed=off",), slurm(0, 2))]
)
def test_one_that_is_alone_or_told_so_stays_alone(flags, variables):
  assert finish([start(*flags, **variables)]) == [(0, "process 0 of 1", "")]


def test_a_number_of_tasks_that_is_none_takes_one_line():
  ((code, _, errors),) = finish([start(**slurm(0, 1) | {"SLURM_NTASKS": "x"})])
  assert code == 2 and errors.count("\n") == 1
  assert errors.startswith("error: SLURM_NTASKS=x is not a number of processes")


def test_asked_to_join_where_there_is_no_cluster_it_says_what_to_give():
  ((code, _, errors),) = finish([start("--distributed=on")])
  assert code == 2
  assert errors.startswith("error: --distributed=on: jax finds no cluster here")
  assert errors.count("\n") == 1


def test_a_port_that_is_none_takes_one_line():
  address = ("--coordinator=localhost:65536", "--num_processes=1", "--process_id=0")
  ((code, _, errors),) = finish([start(*address)])
  assert code == 2
  assert errors == "error: --coordinator=localhost:65536 has no such port; choose one up to 65535\n"
