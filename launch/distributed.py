"""Joins the processes of one run: from flags, or from what the cluster says about this process.

Called after the flags are parsed and before jax is used. It must not know configs or programs.
"""

import os
import re

from absl import flags

_DISTRIBUTED = flags.DEFINE_enum(
  "distributed", "auto", ["auto", "on", "off"],
  "whether this is one of several processes: auto asks the flags below, SLURM's and Open MPI's"
  " environment; on lets jax ask every cluster that it knows; off never",
)  # fmt: skip
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of process 0, the same for every process"
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "processes of the run", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "which of them this is, from 0", lower_bound=0
)

# For each cluster, what its environment holds in a process that it started, the number of
# processes first.
_CLUSTERS = (
  ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"),
  ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)


def start() -> None:
  """Joins the other processes of the run, if there are any.

  Raises:
    ValueError: the flags are incomplete or contradict each other, or the environment's number of
      processes is none.
  """
  address, count, index = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  given = [flag for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID) if flag.value is not None]
  if given:
    _check(address, count, index, [flag.name for flag in given])
    _initialize(coordinator_address=address, num_processes=count, process_id=index)
  elif _DISTRIBUTED.value == "on" or (_DISTRIBUTED.value == "auto" and _in_cluster()):
    _initialize()


def _check(address: str | None, count: int | None, index: int | None, given: list[str]) -> None:
  names = ("coordinator", "num_processes", "process_id")
  missing = [f"--{name}" for name in names if name not in given]
  if _DISTRIBUTED.value == "off":
    raise ValueError(f"--distributed=off contradicts --{given[0]}; leave one of them out")
  if missing:
    raise ValueError(
      f"{' and '.join(missing)} missing: several processes need all of --coordinator,"
      " --num_processes and --process_id, or none of them in a SLURM or Open MPI job"
    )
  if not re.fullmatch(r"[^\s:]+:\d+|\[[0-9a-fA-F:]+\]:\d+", address):
    raise ValueError(f"--coordinator={address} is not host:port, such as node0:29500")
  if int(address.rpartition(":")[2]) > 65535:
    raise ValueError(f"--coordinator={address} has no such port; choose one up to 65535")
  if index >= count:
    raise ValueError(f"--process_id={index} is not below --num_processes={count}; ids count from 0")


def _in_cluster() -> bool:
  for names in _CLUSTERS:
    if all(name in os.environ for name in names):
      count = os.environ[names[0]]
      if not count.isdecimal():
        raise ValueError(
          f"{names[0]}={count} is not a number of processes; leave it to the cluster, or give"
          " --distributed=off"
        )
      if int(count) > 1:
        return True
  return False


def _initialize(**arguments) -> None:
  import jax

  # Between processes; on other devices than CPUs it changes nothing.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(**arguments)
  except ValueError as error:
    raise ValueError(
      f"--distributed={_DISTRIBUTED.value}: jax finds no cluster here ({error});"
      " give --coordinator, --num_processes and --process_id"
    ) from error
