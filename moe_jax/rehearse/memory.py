"""Where the bytes of one GPU go, by XLA's own account of the compiled program.

Knows what a step holds, its shardings and the compiled program's memory; must not know time.
"""

import math

import jax

from moe_jax import config
from moe_jax.plan import workspace
from moe_jax.plan.leaves import DTYPE_BYTES, leaves
from moe_jax.rehearse.lowering import Compiled
from moe_jax.rehearse.workload import PREFILL, TRAIN

# In this order they add up to "total", which is XLA's own sum.
PARTS = (
  "parameters", "optimizer", "cache", "inputs", "gradients", "compute_copies",
  "activations_and_buffers", "outputs", "code",
)  # fmt: skip
# What makes the key-value cache smaller, and the activations of a prefill.
_LESS_CACHE = "fewer serve.slots, a smaller serve.max_tokens or serve.pages_fraction"
_NARROW_CACHE = "serve.kv_dtype=int8"
_LESS_PREFILL = "a shorter serve.prefill_chunk"


def by_part(settings: config.Config, compiled: Compiled) -> dict[str, int]:
  """Returns the bytes on one GPU of each of PARTS, and "total"; 0 for what the step does not have.

  Arguments are told apart by their shardings. Gradients, summed over micro-batches, and the
  parameters' copies, where the computation takes them gathered or in another dtype, are temporaries
  of training whose size is known; the rest of the temporaries are activations, buffers of
  collectives and scratch. Outputs are those that do not take the place of an argument.
  """
  memory = compiled.memory
  held = {
    part: _placed_bytes(compiled.held.get(part, ()))
    for part in ("parameters", "optimizer", "cache")
  }
  # Serving takes the parameters in the compute dtype.
  is_training = "optimizer" in compiled.held
  gradients, copies = _region_bytes(settings) if is_training else (0, 0)
  temporaries = memory.temp_size_in_bytes
  found = {
    **held,
    "inputs": memory.argument_size_in_bytes - sum(held.values()),
    "gradients": gradients,
    "compute_copies": copies,
    "activations_and_buffers": temporaries - gradients - copies,
    "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    "code": memory.generated_code_size_in_bytes,
  }
  return {**found, "total": sum(found.values())}


def advice(found: dict[str, int], settings: config.Config) -> str:
  """Returns what to change where the total does not fit, by the largest part that can shrink."""
  if found["cache"] > found["total"] / 2:
    return f"choose {_LESS_CACHE}, or {_NARROW_CACHE}: the key-value cache takes most"
  if found["activations_and_buffers"] < found["total"] / 2:
    return "choose a larger mesh.tensor or mesh.stage: parameters and optimizer take most"
  if found["cache"]:
    return f"choose {_LESS_PREFILL} or fewer serve.slots: activations take most"
  if less := _saves_less(settings):
    return f"choose {less}, which keeps less between forward and backward"
  return "choose more pipeline.micro_batches or a shorter train.sequence: activations take most"


def choices(step: str, settings: config.Config) -> list[str]:
  """Returns all that makes a step need less, where nothing says which part is the largest.

  Args:
    step: "train", "prefill" or "decode".
    settings: the deployment.
  """
  if step == TRAIN:
    return [*filter(None, [_saves_less(settings)]), "more pipeline.micro_batches"]
  of_prefill = [_LESS_PREFILL] if step == PREFILL else []
  return [_LESS_CACHE, _NARROW_CACHE, *of_prefill]


def _saves_less(settings: config.Config) -> str:
  """Returns the setting of the next saving policy that keeps less, "" where none does."""
  number = config.SAVE.index(settings.pipeline.save)
  return f"pipeline.save={config.SAVE[number - 1]}" if number else ""


def _placed_bytes(tree) -> int:
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _region_bytes(settings: config.Config) -> tuple[int, int]:
  """Returns the bytes of gradients and of the parameters' copies inside the manual region."""
  held = leaves(settings.model)
  gradient_bytes = DTYPE_BYTES[settings.pipeline.gradient_dtype]
  gradients = gradient_bytes * sum(leaf.elements(settings.mesh) for leaf in held)
  return gradients, sum(workspace.copy_bytes(settings, leaf) for leaf in held)
