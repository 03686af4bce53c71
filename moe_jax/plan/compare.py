"""Plans side by side, and what would make one of them faster.

Knows plans and runs; must not know how they were searched for.
"""

import dataclasses
from collections.abc import Mapping

from moe_jax.config import SAVE, Config
from moe_jax.plan import memory, simulate
from moe_jax.plan.claim_rows import binding
from moe_jax.plan.machine import Machine
from moe_jax.plan.search import Plan

_HALVED = {
  "kernels twice as fast": lambda c: c._replace(
    compute=tuple((phase, factor / 2) for phase, factor in c.compute),
    everything_else=c.everything_else / 2,
  ),
  "links inside hosts twice as fast": lambda c: c._replace(inside=c.inside / 2),
  "links between hosts twice as fast": lambda c: c._replace(between=c.between / 2),
  "half as many kernels to launch": lambda c: c._replace(launch_s=c.launch_s / 2),
}


def table(plans: Mapping[str, Plan], tied: bool = True) -> list[tuple[str, ...]]:
  """Returns rows of text: a heading of the plans' names, then a row for each property.

  Args:
    plans: by the name of their column.
    tied: as in program.train.
  """
  columns = [_column(plan, tied) for plan in plans.values()]
  heading = ("", *plans)
  return [heading, *((name, *(c[name] for c in columns)) for name in columns[0])]


def _column(plan: Plan, tied: bool) -> dict[str, str]:
  settings, machine = plan.settings, plan.machine
  mesh, pipeline = settings.mesh, settings.pipeline
  is_halved = pipeline.halves and plan.served is None
  parts = {
    "GPUs": f"{plan.num_gpus} {machine.cluster.chip.name}",
    "mesh expert x tensor x stage x data": (
      f"{mesh.expert} x {mesh.tensor} x {mesh.stage} x {mesh.data}"
    ),
    "micro-batches": f"{pipeline.micro_batches}{' of two halves' * is_halved}",
    "schedule": f"{pipeline.schedule}, {pipeline.chunks} chunks",
    "saves": pipeline.save,
    "layers gathered ahead": f"{pipeline.prefetch_layers or 'none: weights lie whole'}",
    "dispatch": f"{settings.moe.dispatch}, {settings.moe.exchange}",
    "memory per GPU": f"{plan.memory_bytes / 1e9:.3f} GB",
    "fits": "yes" if plan.memory_bytes <= machine.cluster.chip.memory_bytes else "NO",
  }
  if plan.served is not None:
    served = plan.served
    return {
      **parts,
      # Whatever moe.dispatch says; gathered where tokens are few.
      "dispatch": f"dropless or gathered, {settings.moe.exchange}",
      "time to first token": f"{served.ttft_s * 1e3:.1f} ms",
      "... of the first prompts": f"{served.first_ttft_s * 1e3:.1f} ms",
      "prefill tokens/ms/GPU": f"{served.prefill_tokens_per_ms_per_gpu:.1f}",
      "a token": f"{served.token_s * 1e3:.2f} ms",
      "decode tokens/ms/GPU": f"{served.decode_tokens_per_ms_per_gpu:.2f}",
      "tokens/ms/GPU, all": f"{served.tokens_per_ms_per_gpu:.1f}",
      "key-value cache": f"{served.memory.kv_cache / 1e9:.3f} GB",
    }
  run = simulate.train(settings, machine, tied)
  held = memory.train(settings)
  percent = lambda fraction: "-" if fraction is None else f"{fraction:.1%}"
  return {
    **parts,
    "... saved in flight": f"{held.stash / 1e9:.3f} GB",
    "step": f"{run.step_s * 1e3:.2f} ms",
    "tokens/ms/GPU": f"{plan.tokens_per_ms_per_gpu:.1f}",
    "bubble": f"{run.bubble_fraction:.2%}",
    "kernels": f"{run.compute_s * 1e3:.2f} ms",
    "exposed communication": f"{run.exposed_s * 1e3:.2f} ms",
    "communication hidden": percent(run.hidden_fraction),
    "links inside, between": " ms, ".join(
      f"{run.seconds_by_link.get(link, 0.0) * 1e3:.2f}" for link in ("inside", "between")
    )
    + " ms",
    "binds": binding(run.compute_s, run.seconds_by_link, run.step_s).partition(" binds")[0],
  }


def change_first(
  settings: Config, machine: Machine, tied: bool = True
) -> list[tuple[str, float, float]]:
  """Returns (what, seconds of a step with it, share saved), what saves most first.

  Of the machine, each part twice as fast. Of the deployment, what fits into the chip's memory: the
  other choices of pipeline.save but "inputs", which only saves memory, and half and twice the
  micro-batches, where they divide the batch.
  """
  now_s = simulate.step_seconds(settings, machine, tied)
  tried = {
    what: (settings, machine._replace(calibration=faster(machine.calibration)))
    for what, faster in _HALVED.items()
  }
  pipeline = settings.pipeline
  shares = settings.mesh.sequence_shares * (2 if pipeline.halves else 1)
  choices = [("save", save) for save in SAVE[1:] if save != pipeline.save]
  choices += [
    ("micro_batches", count)
    for count in (pipeline.micro_batches // 2, pipeline.micro_batches * 2)
    if count and settings.train.batch % (count * shares) == 0
  ]
  for field, choice in choices:
    changed = dataclasses.replace(pipeline, **{field: choice})
    other = dataclasses.replace(settings, pipeline=changed)
    if memory.train(other).total <= machine.cluster.chip.memory_bytes:
      tried[f"pipeline.{field}={choice}"] = (other, machine)
  found = [
    (what, seconds, 1 - seconds / now_s)
    for what, (other, on) in tried.items()
    for seconds in (simulate.step_seconds(other, on, tied),)
  ]
  return sorted(found, key=lambda row: row[1])


def to_text(rows: list[tuple[str, ...]]) -> str:
  """Returns rows as a table for a terminal."""
  widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0]))]
  return "\n".join(
    "  " + "".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
    for row in rows
  )
