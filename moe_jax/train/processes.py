"""What the processes of a run do as one: the first finds out and all hear of it, or all compare.

With one process nothing is sent. Knows jax's processes; must not know what they find.
"""

import itertools
import json
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

# How long a process waits for the others, which may be at the files of a whole run.
_TIMEOUT_S = 2400
_num_meetings = itertools.count()


def from_first(make: Callable[[], dict | None]) -> dict | None:
  """Returns, or raises, on every process what `make` does on process 0: plain JSON, a ValueError or
  an OSError.

  Communication: with several processes, two broadcasts, of the answer and of its size, as bytes.
  """
  if jax.process_count() == 1:
    return make()
  answer = {}
  if jax.process_index() == 0:
    try:
      answer = {"value": make()}
    except (OSError, ValueError) as error:
      answer = {"error": type(error).__name__, "text": str(error)}
  _meet()
  answer = json.loads(_broadcast(json.dumps(answer)))
  if "error" in answer:
    raise (ValueError if answer["error"] == "ValueError" else OSError)(answer["text"])
  return answer["value"]


def of_each(mine: np.ndarray) -> np.ndarray:
  """Returns every process's array, those of one shape and type, in the order of the processes.

  Communication: with several processes, all-gather of the array.
  """
  if jax.process_count() == 1:
    return mine[None]
  _meet()
  return np.asarray(multihost_utils.process_allgather(mine))


def _meet() -> None:
  # Some platforms end a collective after seconds, and hashing may take longer: wait here first.
  key = f"moe_jax/meeting/{next(_num_meetings)}"
  ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=_TIMEOUT_S * 1000)


def _broadcast(text: str) -> str:
  """Returns process 0's `text`."""
  mine = np.frombuffer(text.encode(), np.uint8)
  num_bytes = int(multihost_utils.broadcast_one_to_all(np.array(len(mine), np.int32)))
  sent = mine if jax.process_index() == 0 else np.zeros(num_bytes, np.uint8)
  return np.asarray(multihost_utils.broadcast_one_to_all(sent)).astype(np.uint8).tobytes().decode()
