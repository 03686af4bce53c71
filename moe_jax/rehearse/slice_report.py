"""The report of a rehearsal for TPUs: memory, bytes, operations, and no times.

XLA's TPU back end decides below the HLO text what makes time: which arrays stay in the chip's
vector memory, and how far a collective and a kernel run at once. So hidden communication and step
time are not read, and said to be so; what holds for any schedule is: bytes, operations and their
limits.
Knows the order of things; must not know flags, files, or how the report is shown.
"""

from collections.abc import Callable

import jax

from moe_jax import config
from moe_jax.rehearse import figures, kernels, lowering, memory, program, ticks
from moe_jax.rehearse import workload as workloads
from moe_jax.rehearse.program import Collective, Compute
from moe_jax.rehearse.slices import Slice

LINK = "ici"
NOT_READ = (
  "not read: XLA's TPU compiler decides below the HLO text what runs at once and what stays in"
  " vector memory"
)


def make(
  step: str, settings: config.Config, pod: Slice, progress: Callable[[str], None] = lambda _: None
) -> dict:
  """Returns the report of a step on a slice.

  Args:
    step: "train", "prefill" or "decode".
    settings: the deployment.
    pod: the described slice.
    progress: is told what is being done.

  Raises:
    ValueError: the mesh does not fit the slice, or the program not the chips' memory.
  """
  mesh, workload = pod.mesh(settings.mesh), workloads.WORKLOADS[step](settings)
  compiled = _compiled(step, settings, mesh, progress)
  progress("reading the compiled program")
  found = program.read(
    compiled.text, dict(mesh.shape), kernels.KERNELS, ticks.turns(step, settings)
  )
  taken = ticks.branches_taken(found, workload.table)
  times = ticks.executions(found.entry, taken.branch_of_turn)
  bytes_by_part = memory.by_part(settings, compiled)
  rows = _collectives(pod, times)
  executed = _flops_by_phase(times)
  limits = _limits(settings, workload, pod, rows, sum(executed.values()))
  return {
    "pod": {
      "name": pod.name,
      "topology": pod.topology,
      "gpus": len(pod.devices),
      "unit": "TPU",
      "hosts": pod.hosts,
      "memory_bytes": pod.chip.memory_bytes,
    },
    "workload": workloads.as_dict(workload),
    "binding": _binding(limits, pod.chip.name),
    "fits": bytes_by_part["total"] <= pod.chip.memory_bytes,
    "memory_bytes": bytes_by_part,
    "collectives": rows,
    "exposure": {
      "not_read": NOT_READ,
      "hidden_fraction": None,
      "hideable_fraction": None,
      "hidden_of_hideable": None,
      "waited_for_at_once": sum(row["count"] - row["count_async"] for row in rows),
    },
    "prediction": {
      "not_read": NOT_READ,
      "chip": pod.chip.name,
      "step_s": None,
      "tokens_per_ms_per_gpu": None,
      "ttft_s": None,
      "bubble_fraction": None,
      "limits_tokens_per_ms_per_gpu": limits,
    },
    "claims": [],
    "flops": {
      "executed_by_phase": executed,
      "executed": sum(executed.values()),
      "model": workload.model_flops / settings.mesh.num_devices,
    },
    "unknown": {**found.unknown, **taken.unknown},
    "assumed": {**found.assumed, **taken.assumed},
    "seconds": {"lower": compiled.lower_s, "compile": compiled.compile_s},
    "jax": jax.__version__,
    "config": config.as_dict(settings),
  }


def _compiled(step, settings, mesh, progress) -> lowering.Compiled:
  try:
    return lowering.COMPILED[step](settings, mesh, progress)
  except jax.errors.JaxRuntimeError as error:
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
      raise
    said = next((line for line in text.splitlines() if "hbm" in line), text.splitlines()[0])
    raise ValueError(
      f"the program does not fit the TPU's memory: {said.strip()}; choose"
      f" {', '.join(memory.choices(step, settings))} or a larger slice"
    ) from error


def _collectives(pod: Slice, times) -> list[dict]:
  """Returns communication per kind, axis, phase and direction, most bytes first.

  `seconds` is the least that any program takes: each chip sends over all of its links at once,
  and no byte passes through a third chip. `count_async` are begun before they are waited for.
  """
  rows: dict[tuple, dict] = {}
  for unit, count in times.items():
    if not isinstance(unit, Collective):
      continue
    key = (unit.kind, unit.axis, unit.phase, LINK, unit.is_backward)
    row = rows.setdefault(
      key,
      {
        **dict(zip(("kind", "axis", "phase", "link", "is_backward"), key, strict=True)),
        **dict.fromkeys(("count", "count_async", "bytes_per_gpu", "seconds"), 0),
        "hidden_seconds": None,
        "instructions": [],
      },
    )
    row["count"] += count
    row["count_async"] += count * unit.is_async
    row["bytes_per_gpu"] += count * unit.bytes_sent
    row["seconds"] += count * unit.bytes_sent / pod.chip.ici_bytes_per_s
    row["instructions"].append(unit.name)
  return sorted(rows.values(), key=lambda row: -row["bytes_per_gpu"])


def _flops_by_phase(times) -> dict[str, float]:
  found: dict[str, float] = {}
  for unit, count in times.items():
    flops = sum(unit.work.flops.values()) if isinstance(unit, Compute) else 0
    if flops:
      found[unit.phase] = found.get(unit.phase, 0) + count * flops
  return found


def _limits(settings, workload, pod: Slice, rows: list[dict], executed: float) -> dict:
  """Returns tokens/ms/TPU that the chip allows if nothing but one thing took time.

  A product of float32 counts as one of bfloat16, in one pass, which is what TPUs make of it unless
  it is asked to be exact, as the router's small one is.

  Source: https://docs.jax.dev/en/latest/201/precision.html.
  """
  devices, peak = settings.mesh.num_devices, pod.chip.peak_flops_per_s["bfloat16"]
  rate = lambda seconds: figures.ratio(workload.tokens / devices / 1e3, seconds)
  return {
    "compute, model FLOPs": rate(workload.model_flops / devices / peak),
    "compute, as compiled": rate(executed / peak),
    "links between chips, bytes": rate(sum(row["seconds"] for row in rows)),
  }


def _binding(limits: dict, chip: str) -> str:
  known = {name: limit for name, limit in limits.items() if limit}
  name = min(known, key=known.get)
  return (
    f"of the limits that are read, {name} is the lowest on {chip}: {known[name]:,.0f} tokens/ms"
  )
