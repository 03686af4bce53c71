"""The report of a rehearsal as text for a terminal.

Knows the report's keys; must not know how they were found.
"""

from collections.abc import Iterable, Mapping

from moe_jax.rehearse.memory import PARTS


def render(report: Mapping) -> str:
  """Returns the report as sections, what binds the step first."""
  times = (_exposure, _prediction, _claims)
  if "not_read" in report["prediction"]:
    times = (_limits_only,)
  sections = (_heading, _memory, _communication, *times, _assumed, _unknown)
  return "\n\n".join("\n".join(section(report)) for section in sections if any(section(report)))


def _heading(report) -> Iterable[str]:
  pod, seconds = report["pod"], report["seconds"]
  yield report["binding"]
  yield (
    f"pod {pod['name']}, {pod['gpus']} {pod['unit']}s, compiled for topology {pod['topology']} by"
    f" jax {report['jax']} in {seconds['lower'] + seconds['compile']:.0f} s"
  )
  work = report["workload"]
  after = f" after {work['cached_tokens']:,} cached" if work["cached_tokens"] else ""
  yield (
    f"a step: {work['step']}, {work['sequences']} sequences x {work['tokens_each']:,} tokens"
    f"{after}, {work['micro_batches']} micro-batches"
  )


def _memory(report) -> Iterable[str]:
  found, capacity = report["memory_bytes"], report["pod"]["memory_bytes"]
  yield f"MEMORY PER {report['pod']['unit']}"
  # Arguments are told apart by their elements; TPUs pad arrays to whole tiles.
  rest = {"inputs": "inputs, and tiles' padding"} if report["pod"]["unit"] == "TPU" else {}
  for part in (part for part in (*PARTS, "total") if found[part]):
    yield f"  {rest.get(part, part.replace('_', ' ')):<26}{found[part] / 1e6:>12,.1f} MB"
  verdict = "fits" if report["fits"] else "DOES NOT FIT"
  yield f"  {verdict}: {found['total'] / capacity:.1%} of {capacity / 1e9:.0f} GB"


def _communication(report) -> Iterable[str]:
  yield (
    f"COMMUNICATION, one {report['pod']['unit']} and step, on {report['prediction']['chip']}"
    + (", ms at least" if "not_read" in report["exposure"] else "")
    + (", memory registered inside hosts" if report["pod"].get("symmetric_memory") else "")
  )
  yield (
    f"  {'link':<9}{'axis':<20}{'kind':<20}{'phase':<18}{'':<6}{'count':>6}{'MB':>10}{'ms':>9}"
    f"{'hidden':>8}"
  )
  for row in report["collectives"]:
    way = "back" if row["is_backward"] else ""
    yield (
      f"  {row['link']:<9}{row['axis']:<20}{row['kind']:<20}{row['phase']:<18}{way:<6}"
      f"{row['count']:>6}{row['bytes_per_gpu'] / 1e6:>10,.2f}{row['seconds'] * 1e3:>9.3f}"
      f"{_percent(_hidden(row)):>8}"
    )


def _hidden(row) -> float | None:
  read = row["hidden_seconds"] is not None and row["seconds"]
  return row["hidden_seconds"] / row["seconds"] if read else None


def _limits_only(report) -> Iterable[str]:
  exposure = report["exposure"]
  count = sum(row["count"] for row in report["collectives"])
  yield "HIDDEN COMMUNICATION AND STEP TIME"
  yield f"  {exposure['not_read']}"
  at_once = exposure["waited_for_at_once"]
  yield f"  {at_once:,} of {count:,} collectives are waited for where they begin"
  yield f"LIMITS, tokens/ms/{report['pod']['unit']}, of what any schedule would take"
  for name, limit in report["prediction"]["limits_tokens_per_ms_per_gpu"].items():
    yield f"  {name:<42}{_number(limit):>12}"
  yield "  links: each chip sends over all of its links at once, and no byte passes a third chip"


def _exposure(report) -> Iterable[str]:
  both = {
    report["prediction"]["chip"]: report["exposure"],
    "planned": report["planned"]["exposure"],
  }
  yield "HIDDEN, in time: of all communication; of what can be hidden at most"
  for chip, found in both.items():
    yield (
      f"  {chip:<10}{'all':<22}{_percent(found['hidden_fraction']):>8}"
      f"{_percent(found['hidden_of_hideable']):>8}"
      f"   (can be: {_percent(found['hideable_fraction'])})"
    )
    for axis, fraction in found["hidden_fraction_by_axis"].items():
      of_hideable = found["hidden_of_hideable_by_axis"][axis]
      yield f"  {'':<10}{axis:<22}{_percent(fraction):>8}{_percent(of_hideable):>8}"
  beside = _percent(report["exposure"]["beside_kernels_fraction"])
  yield f"  of the layers' collectives, by count, have a kernel between start and done: {beside}"


def _prediction(report) -> Iterable[str]:
  both = [report["prediction"], report["planned"]["prediction"]]
  yield "PREDICTION" + " " * 34 + "".join(f"{found['chip']:>12}" for found in both)
  line = lambda name, shown: f"  {name:<42}" + "".join(f"{shown(found):>12}" for found in both)
  milliseconds = lambda key: lambda found: f"{found[key] * 1e3:.2f}"
  yield line("step, ms", milliseconds("step_s"))
  for key, name in (("ttft_s", "time to first token, ms"), ("token_s", "each token, ms")):
    if both[0][key] is not None:
      yield line(name, milliseconds(key))
  yield line("  kernels and their launches, ms", milliseconds("compute_s"))
  yield line("    their matrix products, ms", milliseconds("flops_s"))
  yield line("    their bytes, ms", milliseconds("memory_s"))
  yield line("    launches, ms", milliseconds("launch_s"))
  yield line("  exposed communication, ms", milliseconds("exposed_s"))
  yield line("kernels", lambda found: f"{found['kernels']:,}")
  yield line("bubble", lambda found: _percent(found["bubble_fraction"], 2))
  yield line("tokens/ms/GPU", lambda found: f"{found['tokens_per_ms_per_gpu']:.1f}")
  yield line("model FLOP utilisation", lambda found: _percent(found["model_flop_utilisation"]))
  yield "  limits, tokens/ms/GPU"
  for name in both[0]["limits_tokens_per_ms_per_gpu"]:
    limit = lambda found, name=name: found["limits_tokens_per_ms_per_gpu"][name]
    yield line(f"  {name}", lambda found, limit=limit: _number(limit(found)))
  yield "  kernels by phase, ms"
  for phase in both[0]["compute_s_by_phase"]:
    yield line(f"  {phase}", lambda found, p=phase: f"{found['compute_s_by_phase'][p] * 1e3:.2f}")


def _claims(report) -> Iterable[str]:
  yield "CLAIMS OF THE REFERENCE PLAN"
  mark = {True: "holds", False: "NO", None: "-"}
  claim, asked = (2 + max(len(row[k]) for row in report["claims"]) for k in ("claim", "asked"))
  for row in report["claims"]:
    yield f"  {mark[row['holds']]:<7}{row['claim']:<{claim}}{row['asked']:<{asked}}{row['found']}"


def _assumed(report) -> Iterable[str]:
  if report["assumed"]:
    yield "ASSUMED of what requests and routing decide while the program runs"
    for name, count in report["assumed"].items():
      yield f"  {count} x {name}"


def _unknown(report) -> Iterable[str]:
  if report["unknown"]:
    yield "NOT UNDERSTOOD in the compiled program: figures leave out what these do"
    for name, count in report["unknown"].items():
      yield f"  {count} x {name}"


def _percent(fraction: float | None, digits: int = 1) -> str:
  return "-" if fraction is None else f"{fraction:.{digits}%}"


def _number(value: float | None) -> str:
  return "-" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
