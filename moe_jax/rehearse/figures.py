"""From a simulated run to the figures of the report: communication, exposure, prediction.

Knows runs, chips and the model's operations; must not know how figures are shown.
"""

import collections
from collections.abc import Iterable

from moe_jax import config
from moe_jax.plan.links import BETWEEN, INSIDE
from moe_jax.rehearse.exposure import Run, Simulator
from moe_jax.rehearse.program import Block, Branch, Collective, Compute, Done, Loop, Program
from moe_jax.rehearse.timing import flops_per_s, flops_seconds, memory_seconds
from moe_jax.rehearse.workload import DECODE, PREFILL, Workload

_OF_LAYERS = {"attention", "dispatch", "combine"}  # phases whose collectives each layer has
# What a model's matrix products count as; float32 ones that are not asked to be exact are tf32.
_PRODUCTS = {"bfloat16": "bf16", "float32": "tf32"}


def collectives(simulator: Simulator, run: Run) -> list[dict]:
  """Returns communication per kind, axis, phase, link and direction, the slowest first.

  Bytes, seconds and hidden seconds are of one GPU and one step, `largest_operand_bytes` and
  `longest_seconds` of one collective. `waited_for` names the first unit
  of the schedule that had to wait; `instructions` the collectives in the HLO.
  """
  rows: dict[tuple, dict] = {}
  for unit, times in _of_kind(run, Collective):
    key = (unit.kind, unit.axis, unit.phase, simulator.link(unit), unit.is_backward)
    row = rows.setdefault(
      key,
      {
        **dict(zip(("kind", "axis", "phase", "link", "is_backward"), key, strict=True)),
        **dict.fromkeys(("count", "bytes_per_gpu", "seconds", "hidden_seconds"), 0),
        **dict.fromkeys(("largest_operand_bytes", "longest_seconds"), 0),
        "instructions": [],
        "waited_for": [],
      },
    )
    row["count"] += times
    row["bytes_per_gpu"] += times * unit.bytes_sent
    row["seconds"] += times * simulator.seconds(unit)
    row["hidden_seconds"] += run.hidden_s[unit]
    row["largest_operand_bytes"] = max(row["largest_operand_bytes"], unit.operand_bytes)
    row["longest_seconds"] = max(row["longest_seconds"], simulator.seconds(unit))
    row["instructions"].append(unit.name)
    if unit.name in run.waited_for:
      row["waited_for"].append(run.waited_for[unit.name])
  return sorted(rows.values(), key=lambda row: -row["seconds"])


def exposure(rows: list[dict], compute_s: float) -> dict:
  """Returns how much communication is hidden, and how much could be at most.

  hideable = sum over links of min(seconds of its collectives, seconds of all kernels)

  A link carries one collective at a time, so what is hidden on it is at most its own time and at
  most the computation's; both links may hide behind the same kernel. `hidden_of_hideable` is
  therefore at most 1. The limit is of times alone: computation that a collective waits for, or that
  waits for it, counts as well, so that a program with dependencies may not reach it. An axis has
  its own share of each link for "its collectives": the axes' limits do not add up to the whole. All
  collectives count, with their latency, however small.

  Args:
    rows: of `collectives`.
    compute_s: of all kernels.
  """
  seconds, hidden = _sum(rows, "seconds"), _sum(rows, "hidden_seconds")
  by_link = {link: _sum(rows, "seconds", link=link) for link in (INSIDE, BETWEEN)}
  hideable = sum(min(link_s, compute_s) for link_s in by_link.values())
  found = {
    "seconds": seconds,
    "hidden_seconds": hidden,
    "seconds_by_link": by_link,
    "hidden_fraction": ratio(hidden, seconds),
    "hideable_fraction": ratio(hideable, seconds),
    "hidden_of_hideable": ratio(hidden, hideable),
  }
  by_axis = {
    f"{name}_by_axis": {} for name in ("hidden_fraction", "hideable_fraction", "hidden_of_hideable")
  }
  for axis in sorted({row["axis"] for row in rows}):
    axis_s = _sum(rows, "seconds", axis=axis)
    axis_hidden = _sum(rows, "hidden_seconds", axis=axis)
    can = sum(min(_sum(rows, "seconds", axis=axis, link=link), compute_s) for link in by_link)
    by_axis["hidden_fraction_by_axis"][axis] = ratio(axis_hidden, axis_s)
    by_axis["hideable_fraction_by_axis"][axis] = ratio(can, axis_s)
    by_axis["hidden_of_hideable_by_axis"][axis] = ratio(axis_hidden, can)
  return {**found, **by_axis}


def is_symmetric(run: Run) -> bool:
  """Says whether collectives send from memory that their GPUs registered with each other."""
  return any(unit.is_symmetric for unit, _ in _of_kind(run, Collective))


def is_of_layers(phase: str) -> bool:
  """Says whether a collective of that phase is one that every layer has."""
  return not _OF_LAYERS.isdisjoint(phase.split("+"))


def beside_kernels_fraction(program: Program, run: Run) -> float | None:
  """Returns which share of the layers' collectives has a kernel between its start and its done.

  By count, so that the shortest counts as much as the longest; None where layers send nothing.
  """
  covered = _beside_kernels(program.entry)
  of_layers = [
    (unit, times) for unit, times in _of_kind(run, Collective) if is_of_layers(unit.phase)
  ]
  count = sum(times for _, times in of_layers)
  return ratio(sum(times for unit, times in of_layers if unit.name in covered), count)


def _beside_kernels(block: Block) -> set[str]:
  """Returns the names of a block's collectives that have a kernel between start and done."""
  covered, under_way = set(), set()
  for unit in block.units:
    if isinstance(unit, Collective) and unit.is_async:
      under_way.add(unit.name)
    elif isinstance(unit, Done):
      under_way.discard(unit.name)
    elif isinstance(unit, Compute):
      covered |= under_way
    elif isinstance(unit, Loop):
      covered |= under_way | _beside_kernels(unit.body)
    elif isinstance(unit, Branch):
      covered |= under_way.union(*map(_beside_kernels, unit.branches))
  return covered


def prediction(
  settings: config.Config,
  workload: Workload,
  simulator: Simulator,
  run: Run,
  rows: list[dict],
  bubble: float | None,
) -> dict:
  """Returns the step time, its roofline terms, and the limits in tokens/ms/GPU.

  The step takes as long as the compiled schedule on the chip. `launch_s` is what of `compute_s` the
  launches take; those of collectives are on streams of their own. `ttft_s`, of prefill, is until
  the last prompt's first token; `token_s`, of decode, between two tokens of a sequence.
  """
  chip, gpus = simulator.chip, settings.mesh.num_devices
  kernels = list(_of_kind(run, Compute))
  flops_s = sum(times * flops_seconds(unit, chip) for unit, times in kernels)
  memory_s = sum(times * memory_seconds(unit, chip) for unit, times in kernels)
  num_kernels = sum(times for _, times in kernels)
  launch_s, step_s = num_kernels * simulator.launch_s, run.total_s
  links = {link: _sum(rows, "seconds", link=link) for link in (INSIDE, BETWEEN)}
  bytes_s = {
    INSIDE: _sum(rows, "bytes_per_gpu", link=INSIDE) / chip.inside_bytes_per_s,
    BETWEEN: _sum(rows, "bytes_per_gpu", link=BETWEEN) / chip.between_bytes_per_s,
  }
  rate = lambda seconds: ratio(workload.tokens / gpus / 1e3, seconds)
  model_flops = workload.model_flops
  peak = flops_per_s(chip, _PRODUCTS[settings.model.dtype])
  return {
    "chip": chip.name,
    "step_s": step_s,
    "tokens_per_ms_per_gpu": rate(step_s),
    "ttft_s": step_s if workload.step == PREFILL else None,
    "token_s": step_s / workload.tokens_each if workload.step == DECODE else None,
    "bubble_fraction": bubble,
    "model_flop_utilisation": model_flops / gpus / step_s / peak,
    "compute_s": run.compute_s,
    "flops_s": flops_s,
    "memory_s": memory_s,
    "exposed_s": run.total_s - run.compute_s,
    "kernels": num_kernels,
    "launch_s": launch_s,
    "seconds_by_link": links,
    "compute_s_by_phase": _by_phase(simulator, kernels),
    "limits_tokens_per_ms_per_gpu": {
      "compute, model FLOPs": rate(model_flops / gpus / peak),
      "compute, as compiled": rate(flops_s),
      "memory, as compiled": rate(memory_s),
      "link inside, bytes": rate(bytes_s[INSIDE]),
      "link between, bytes": rate(bytes_s[BETWEEN]),
      "launches": rate(launch_s),
    },
  }


def executed_flops(run: Run) -> dict[str, float]:
  """Returns the operations of one GPU's step by phase, as compiled."""
  found: collections.Counter = collections.Counter()
  for unit, times in _of_kind(run, Compute):
    found[unit.phase] += times * sum(unit.work.flops.values())
  return {phase: flops for phase, flops in found.items() if flops}


def _by_phase(simulator: Simulator, kernels) -> dict[str, float]:
  found: collections.Counter = collections.Counter()
  for unit, times in kernels:
    found[unit.phase] += times * simulator.seconds(unit)
  return dict(found.most_common())


def _of_kind(run: Run, kind: type) -> Iterable:
  return ((unit, times) for unit, times in run.times.items() if isinstance(unit, kind))


def _sum(rows: list[dict], field: str, **where: str) -> float:
  return sum(row[field] for row in rows if all(row[k] == v for k, v in where.items()))


def ratio(part: float, whole: float) -> float | None:
  """Returns the ratio, or None of nothing."""
  return part / whole if whole else None
