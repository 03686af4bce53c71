"""Ranks of a mesh as processes, each pinned to a core of its own and computing with one thread.

Where virtual devices of one process share the cores an uneven load costs nothing; here the busiest
rank is what the others wait for. They talk over gloo. Must not know what they run or measure.
"""

import concurrent.futures
import json
import os
import subprocess
import sys

from launch import environment
from tests import runs

NUM_PROCESSES = 2
_THREADS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def add_arguments(parser) -> None:
  """Adds what `conduct` tells each rank, and the clock that a verdict goes by."""
  parser.add_argument(
    "--clock", choices=["wall", "cpu"], default="wall",
    help="what the verdict goes by: cpu is the busiest rank's processor time, for shared machines",
  )  # fmt: skip
  parser.add_argument("--process", type=int, help="set by the program itself")
  parser.add_argument("--port", type=int, help="likewise")


def conduct(module: str, words: list[str], timeout_s: float = 600) -> list[dict]:
  """Returns what each rank printed as a line of JSON.

  Args:
    module: that runs with `--process` and `--port` as a rank.
    words: more of its command line.

  Raises:
    ValueError: there are fewer cores than ranks, or a rank failed; with what it said.
  """
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < NUM_PROCESSES:
    raise ValueError(f"{len(cores)} core(s) here, {NUM_PROCESSES} needed: one for each rank")
  command = [sys.executable, "-m", module, *words, f"--port={runs.free_port()}"]
  variables = {**os.environ, **environment.malloc(1), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": _THREADS}
  ranks = [
    subprocess.Popen(
      [*command, f"--process={index}"],
      cwd=runs.ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for index in range(NUM_PROCESSES)
  ]  # fmt: skip
  with concurrent.futures.ThreadPoolExecutor(NUM_PROCESSES) as readers:
    said = [readers.submit(_said, rank, timeout_s) for rank in ranks]
    # A rank whose peer has failed would wait for it for minutes.
    concurrent.futures.wait(said, return_when=concurrent.futures.FIRST_EXCEPTION)
    for rank in ranks:
      rank.kill()
  texts = [each.result() for each in said]
  # gloo's threads print too.
  return [
    json.loads(next(line for line in out.splitlines() if line.startswith("{"))) for out in texts
  ]


def _said(rank: subprocess.Popen, timeout_s: float) -> str:
  out, err = rank.communicate(timeout=timeout_s)
  if rank.returncode:
    raise ValueError(f"a rank failed:\n{err}")
  return out


def join(process: int, port: int) -> None:
  """Makes this process rank `process`: pinned, and with the others' devices beside its own.

  Call before jax is imported, whose threads inherit the core.
  """
  os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[process]})
  import jax

  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"localhost:{port}", NUM_PROCESSES, process)


def take_turns(calls, num_turns: int) -> tuple[dict, dict]:
  """Returns {name: [(wall, processor) seconds of each turn]} and {name: its last result}.

  Args:
    calls: by name; each runs once before the first turn, which compiles.
  """
  import time

  import jax

  clocks = lambda: (time.perf_counter(), time.process_time())
  seconds, results = {name: [] for name in calls}, {}
  for turn in range(num_turns + 1):
    for name, call in calls.items():
      start = clocks()
      results[name] = jax.block_until_ready(call())
      if turn:
        seconds[name].append(tuple(b - a for a, b in zip(start, clocks(), strict=True)))
  return seconds, results


def by_clock(seconds) -> dict:
  """Returns the turns of `take_turns` as {"wall_s": {name: [...]}, "cpu_s": {name: [...]}}."""
  return {
    clock: {name: [each[place] for each in turns] for name, turns in seconds.items()}
    for place, clock in enumerate(("wall_s", "cpu_s"))
  }


def least(found: list[dict]) -> dict[str, dict[str, float]]:
  """Returns {clock: {name: seconds}}: by the wall the fastest turn, by the processor's time that of
  the busiest rank.
  """
  names = list(found[0]["wall_s"])
  return {
    "wall": {name: min(found[0]["wall_s"][name]) for name in names},
    "cpu": {name: max(min(rank["cpu_s"][name]) for rank in found) for name in names},
  }
