"""What serving takes: the prefill of a batch of prompts, and each token after it.

The same steps as in training, forwards alone, the head at the last position of each prompt. Copies
of the mesh serve equal parts of a workload, and send each other nothing. Knows steps and machines;
must not know how requests arrive.

Tokens reach their experts as the server's do (moe.few_tokens), whatever moe.dispatch says. A
prefill's micro-batch is worked as two halves side by side where it sends much (serve.halving),
whatever pipeline.halves says, and is priced here as one after the other, which takes longer. A GPU
that holds a whole copy works of the last layer, behind its keys and values, only each prompt's last
position.
"""

import dataclasses
from typing import NamedTuple

from moe_jax.config import Config
from moe_jax.moe import few_tokens
from moe_jax.pipeline import segments
from moe_jax.pipeline.schedules import forward_only
from moe_jax.plan import memory, phases, program, steps, units
from moe_jax.plan.machine import Machine, seconds
from moe_jax.plan.memory import Memory
from moe_jax.plan.steps import Sizes

# Experts' kernels read weights where they lie in the stack of layers.
_TRAINING_ONLY = program.NOT_WAITED_FOR | phases.LATE | {"cut weights"}


class Workload(NamedTuple):
  """What is served.

  Attributes:
    sequences: at once, over all copies of the mesh.
    prompt_tokens, output_tokens: of each.
  """

  sequences: int
  prompt_tokens: int
  output_tokens: int

  def __str__(self) -> str:
    return (
      f"{self.sequences:,} sequences at once of {self.prompt_tokens:,} prompt and"
      f" {self.output_tokens:,} output tokens each"
    )


class Served(NamedTuple):
  """What a deployment makes of a workload.

  Attributes:
    ttft_s: until the first token of the last of the batch's prompts.
    first_ttft_s: of the first micro-batch's prompts.
    prefill_tokens_per_ms_per_gpu: prompt tokens while prompts are read.
    token_s: between two tokens of a sequence.
    decode_tokens_per_ms_per_gpu: output tokens while they are written.
    tokens_per_ms_per_gpu: of prompts and outputs, over the whole workload.
    whole_s: of the whole workload.
    memory: of one GPU.
  """

  ttft_s: float
  first_ttft_s: float
  prefill_tokens_per_ms_per_gpu: float
  token_s: float
  decode_tokens_per_ms_per_gpu: float
  tokens_per_ms_per_gpu: float
  whole_s: float
  memory: Memory


def run(settings: Config, machine: Machine, workload: Workload) -> Served:
  """Returns what a deployment serves.

  Args:
    settings: the deployment; its pipeline's micro-batches cut the prefill's batch, as many groups
      as stages take turns in decode.
    machine: that it runs on.
    workload: what is served.
  """
  mesh, gpus = settings.mesh, settings.mesh.num_devices
  # The server fills prompts up to whole shares of positions.
  sequence = -(-workload.prompt_tokens // mesh.tensor) * mesh.tensor
  train = dataclasses.replace(settings.train, batch=workload.sequences, sequence=sequence)
  # Sequences that are served need not fall into halves.
  pipeline = dataclasses.replace(settings.pipeline, halves=False)
  prefill = _as_served(dataclasses.replace(settings, train=train, pipeline=pipeline))
  at = steps.sizes(prefill)
  table = forward_only(memory.table(settings.pipeline, mesh.stage))
  unit_s, transfer_s = _unit_seconds(prefill, machine, at), _transfer_seconds(prefill, machine, at)
  if mesh.expert * mesh.tensor * mesh.stage == 1:
    unit_s *= 1 - 1 / settings.model.layers
    unit_s += _last_layer_seconds(prefill, machine, at)
  head_s = _head_seconds(prefill, machine, at.sequences)
  # The last stage's output goes back to stage 0, beside the head of the one before.
  tick_s = unit_s + transfer_s
  # Heads alone, as in the last tick, make no tick.
  num_ticks = int(segments.units(table)["forward"].sum())
  ttft_s = num_ticks * tick_s + settings.pipeline.micro_batches * head_s
  first_ticks = int(table.forward_tick_UW[0, -1]) + 1
  prompt_tokens = workload.sequences * workload.prompt_tokens
  token_s = _token_seconds(settings, machine, workload)
  whole_s = ttft_s + (workload.output_tokens - 1) * token_s
  per_ms_per_gpu = lambda tokens, seconds: tokens / (seconds * 1e3 * gpus)
  held = workload.prompt_tokens + workload.output_tokens
  return Served(
    ttft_s=ttft_s,
    first_ttft_s=first_ticks * tick_s + head_s,
    prefill_tokens_per_ms_per_gpu=per_ms_per_gpu(prompt_tokens, ttft_s),
    token_s=token_s,
    decode_tokens_per_ms_per_gpu=per_ms_per_gpu(workload.sequences, token_s),
    tokens_per_ms_per_gpu=per_ms_per_gpu(workload.sequences * held, whole_s),
    whole_s=whole_s,
    memory=memory.serve(prefill, workload.sequences, held, workload.prompt_tokens),
  )


def _token_seconds(settings: Config, machine: Machine, workload: Workload) -> float:
  """Returns the seconds between two tokens: a turn round all stages, which groups share.

  With as many groups as stages no stage waits; fewer sequences than that leave some idle.
  """
  mesh = settings.mesh
  shares = mesh.sequence_shares
  groups = max(1, min(mesh.stage, workload.sequences // shares))
  sequences = -(-workload.sequences // (groups * shares))
  train = dataclasses.replace(
    settings.train, batch=sequences * shares, sequence=max(mesh.tensor, 1)
  )
  pipeline = dataclasses.replace(
    settings.pipeline, schedule="1f1b", chunks=1, micro_batches=1, halves=False
  )
  decode = _as_served(dataclasses.replace(settings, train=train, pipeline=pipeline), positions=1)
  context = workload.prompt_tokens + workload.output_tokens // 2
  at = steps.sizes(decode, positions=1, context=context)
  stage_s = _unit_seconds(decode, machine, at)
  head_s = _head_seconds(decode, machine, at.sequences)
  return mesh.stage * (stage_s + _transfer_seconds(decode, machine, at)) + groups * head_s


def _last_layer_seconds(settings: Config, machine: Machine, at: Sizes) -> float:
  """Returns the seconds of a prompt's last layer where all of it is on one device."""
  of_token = _as_served(settings, positions=1)
  last = _layer(of_token, steps.sizes(of_token, positions=1, context=at.positions))
  found = (*phases.keys_and_values(settings, at), *last)
  return sum(seconds(step, settings, machine) for step in found)


def _as_served(settings: Config, positions: int = 0) -> Config:
  """Returns the settings with the way in which the server brings a micro-batch to the experts.

  Args:
    positions: as in steps.sizes.
  """
  mesh, at = settings.mesh, steps.sizes(settings, positions)
  num_tokens = at.tokens * mesh.expert * mesh.tensor
  moe = few_tokens.way(settings.moe, num_tokens, settings.model.d_model, at.dtype_bytes)
  return dataclasses.replace(settings, moe=moe)


def _unit_seconds(settings: Config, machine: Machine, at: Sizes) -> float:
  """Returns the seconds of a forward unit, one step after the other."""
  each = sum(seconds(step, settings, machine) for step in _layer(settings, at))
  return each * units.layers_per_unit(settings)


def _layer(settings: Config, at: Sizes) -> tuple[steps.Step, ...]:
  """Returns the forward steps without what only training does: counting, and keeping."""
  found = units.unit(settings, "forward", at)
  return tuple(step for step in found if step.name not in _TRAINING_ONLY)


def _transfer_seconds(settings: Config, machine: Machine, at: Sizes) -> float:
  if settings.mesh.stage == 1:
    return 0.0
  return seconds(units.transfer(settings, "to the next stage", at), settings, machine)


def _head_seconds(settings: Config, machine: Machine, sequences: int) -> float:
  """Returns the seconds of embedding and head for one position of each sequence."""
  tokens = max(1, sequences // settings.mesh.tensor)
  at = dataclasses.replace(steps.sizes(settings, positions=1), sequences=sequences, tokens=tokens)
  head = (units.broadcast(settings, at), *units.unit(settings, "head forward", at))
  found = (*units.unit(settings, "embed", at), *head)
  return sum(seconds(step, settings, machine) for step in found)
