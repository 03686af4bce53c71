"""Chooses mesh, schedule and dispatch before anything is rented, compiled or run.

  python -m launch.plan --config=configs/pod64.py --json=plan.json --out=plan
  ... --cluster=h100:512x8 --zipf=1.0
  ... --cluster=h100:512x8 --workload=serve --prompt_tokens=10240 --ttft_s=6

Recomputes every figure of the reference plan for the config as it is given, then searches for the
best plan on the same cluster and for the smallest cluster that meets the targets. Needs no device
and no jax. --out receives the best config, ready for launch.train and launch.rehearse, the step's
graph (JSON, GraphML, DOT, a picture) and its timeline (Perfetto, HTML, SVG).
"""

import dataclasses
import json
import pathlib
import sys
import time

from absl import flags

from launch import paths
from launch.flags import run
from moe_jax import config as config_lib
from moe_jax.plan import (
  calibration,
  claims,
  compare,
  export,
  graph,
  hardware,
  load,
  memory,
  search,
  serve,
  simulate,
  skew,
  timeline,
)
from moe_jax.plan.machine import Machine

_CLUSTER = flags.DEFINE_string(
  "cluster",
  None,
  "CHIP:HOSTSxGPUS; by default as many h100 as the config's mesh, up to 4 to a host",
)
_WORKLOAD = flags.DEFINE_enum("workload", "train", ["train", "serve"], "What to plan for.")
_SEQUENCES = flags.DEFINE_integer(
  "sequences", None, "Sequences served at once; by default train.batch.", lower_bound=1
)
_PROMPT = flags.DEFINE_integer("prompt_tokens", 10_240, "Of each sequence served.", lower_bound=1)
_OUTPUT = flags.DEFINE_integer("output_tokens", 256, "Of each sequence served.", lower_bound=1)
_TTFT = flags.DEFINE_float("ttft_s", 10.0, "Target: seconds to the first token.", lower_bound=0)
_BUBBLE = flags.DEFINE_float(
  "bubble",
  None,
  "Target: share of a training step that a stage is idle; by default anything.",
  lower_bound=0,
)
_RATE = flags.DEFINE_float(
  "tokens_per_ms", None, "Target: of the whole cluster; by default 100 for each GPU of the config.",
  lower_bound=0,
)  # fmt: skip
_ZIPF = flags.DEFINE_float("zipf", 0.0, "Exponent of the experts' popularity; 0 is even.")
_TRACE = paths.define("trace", "Recorded load: JSON with counts_LE; instead of --zipf.", "file")
_CALIBRATION = paths.define(
  "calibration",
  "Factors on the plan's times, from what launch.rehearse --step=train --json=FILE found.",
  "file",
)
_TIED = flags.DEFINE_boolean(
  "tied", True, "Whether a tick's forward and backward layers run beside each other."
)
_SYMMETRIC_MEMORY = flags.DEFINE_boolean(
  "symmetric_memory", False, "Plan as launch.train --symmetric_memory sends inside hosts."
)
_JSON = paths.define_json("Also write all figures here.")
_OUT = paths.define_folder("out", "Folder for the best config, the graph and the timeline.")
_MISSED = 1


def main(settings: config_lib.Config) -> int:
  _refuse_what_does_nothing()
  begin = time.perf_counter()
  progress = lambda what: print(f"[{time.perf_counter() - begin:5.1f} s] {what}", file=sys.stderr)
  gpus = settings.mesh.num_devices
  cluster = hardware.cluster(_CLUSTER.value) if _CLUSTER.value else _default_cluster(gpus)
  cluster = dataclasses.replace(cluster, symmetric_memory=_SYMMETRIC_MEMORY.value)
  reached = _calibration()
  loads = _load(settings)
  if cluster.num_gpus == gpus:
    _print_claims(rows := _claims(settings, cluster, reached, loads))
    wanted = settings
  else:
    rows = []
    wanted = _scaled(settings, cluster.num_gpus)
    print(
      f"{cluster.name} has {cluster.num_gpus} GPUs, the config's mesh {gpus}: train.batch is taken"
      f" as {wanted.train.batch}, as many sequences for each GPU"
    )
  workload = _workload(wanted)
  ttft_s = _TTFT.value if workload else None
  options = {
    "workload": workload,
    "ttft_s": ttft_s,
    "bubble": _BUBBLE.value,
    "calibration": reached,
    "tied": _TIED.value,
  }
  progress("searching")
  found = search.search(wanted, cluster, **options)
  progress(
    f"{found.considered:,} plans, {found.simulated:,} simulated, {found.too_large:,} too large"
  )
  plans = _columns(settings, cluster, found, options)
  print("\nPLANS SIDE BY SIDE" + (f", for {workload}" if workload else ", a training step"))
  print(compare.to_text(compare.table(plans, _TIED.value)))
  best, changes = plans["best"], []
  if workload is None:
    changes = compare.change_first(best.settings, best.machine, _TIED.value)
    print("\nWHAT TO CHANGE FIRST in the best plan")
    for what, seconds, saved in changes[:4]:
      print(f"  {what:<40}{seconds * 1e3:>9.2f} ms  {saved:>6.1%} less")
  targets = search.Targets(_RATE.value if _RATE.value is not None else 100.0 * gpus, ttft_s)
  least, tried = search.smallest(settings, cluster, targets, **options | {
    "workload": _workload(settings)})  # fmt: skip
  _print_smallest(least, tried, targets)
  if loads.max_over_mean > 1 and workload is None:
    _print_load(best, loads)
  if _OUT.value:
    _write(pathlib.Path(_OUT.value), best, plans, progress)
  if _JSON.value:
    report = _report(settings, rows, plans, changes, least, tried, found)
    paths.write_json(_JSON.value, report)
  progress("done")
  return 0 if least is not None else _MISSED


def _refuse_what_does_nothing() -> None:
  """Refuses flags that are of the other workload, or that another flag takes the place of.

  Raises:
    ValueError: one of them is given.
  """
  if _WORKLOAD.value == "serve" and _BUBBLE.present:
    raise ValueError("--bubble is of a training step, which --workload=serve has not; leave it out")
  for flag in (_SEQUENCES, _PROMPT, _OUTPUT, _TTFT):
    if _WORKLOAD.value == "train" and flag.present:
      raise ValueError(
        f"--{flag.name} is of what is served, which --workload=train has not; leave it out, or give"
        " --workload=serve"
      )
  if _TRACE.present and _ZIPF.present:
    raise ValueError("--trace is a recorded load and --zipf a made one; leave one of them out")


def _default_cluster(gpus: int) -> hardware.Cluster:
  per_host = max(count for count in range(1, 5) if gpus % count == 0)
  return hardware.cluster(f"h100:{gpus // per_host}x{per_host}")


def _calibration() -> calibration.Calibration:
  path = _CALIBRATION.value
  if path is None:
    return calibration.NONE
  try:
    report = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"--calibration={path} is not JSON: {error}") from error
  try:
    step, mapping, pod = report["workload"]["step"], report["config"], report["pod"]
    pod_name, is_symmetric = pod["name"], pod.get("symmetric_memory", False)
    found = {name: dict(report["prediction"][name]) for name in calibration.FITTED}
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"--calibration={path} is no report of launch.rehearse ({type(error).__name__}: {error});"
      " write one with --step=train --json"
    ) from error
  if step != "train":
    raise ValueError(
      f"--calibration={path} is of --step={step}, and what is fitted is a step of training; write"
      " it with --step=train"
    )
  machine = Machine(dataclasses.replace(hardware.cluster(pod_name), symmetric_memory=is_symmetric))
  rehearsed = config_lib.from_mapping(mapping)
  predicted = simulate.train(rehearsed, machine, _TIED.value)._asdict()
  return calibration.fit(predicted, found, f"rehearsal {path}")


def _load(settings: config_lib.Config) -> load.Load:
  if _TRACE.value:
    return load.trace(settings, _TRACE.value)
  return load.zipf(settings, _ZIPF.value)


def _workload(settings: config_lib.Config) -> serve.Workload | None:
  if _WORKLOAD.value == "train":
    return None
  return serve.Workload(_SEQUENCES.value or settings.train.batch, _PROMPT.value, _OUTPUT.value)


def _scaled(settings: config_lib.Config, gpus: int) -> config_lib.Config:
  """Returns `settings` with as many sequences for each GPU on a cluster of another size."""
  # The search chooses the mesh; this one says how many hosts the router tells apart.
  mesh = config_lib.Mesh(expert=settings.router_hosts)
  batch = max(1, settings.train.batch * gpus // settings.mesh.num_devices // mesh.expert)
  alone = {"micro_batches": 1, "prefetch_layers": 0, "halves": False}
  pipeline = dataclasses.replace(settings.pipeline, **alone)
  train = dataclasses.replace(settings.train, batch=batch * mesh.expert)
  moe = settings.moe_on(mesh)
  return dataclasses.replace(settings, mesh=mesh, pipeline=pipeline, moe=moe, train=train)


def _claims(settings, cluster, reached, loads) -> list[claims.Claim]:
  planned = dataclasses.replace(cluster, chip=hardware.CHIPS["planned"])
  machines = {
    "on the chip": Machine(cluster, reached), "planned": Machine(planned),
  }  # fmt: skip
  prompts = serve.Workload(settings.train.batch, 10_240, _OUTPUT.value)
  step = graph.build(settings)
  graph.check(step)
  found = claims.Figures(
    settings,
    machines,
    {name: simulate.train(settings, machine, _TIED.value) for name, machine in machines.items()},
    memory.train(settings),
    {name: serve.run(settings, machine, prompts) for name, machine in machines.items()},
    loads,
    (step.num_nodes, step.num_edges),
  )
  return claims.rows(found)


def _columns(settings, cluster, found, options) -> dict[str, search.Plan]:
  """Returns the plans to show: as given where its mesh and micro-batches divide what is asked for,
  the best and the next best.
  """
  plans, workload = {}, options["workload"]
  shares = settings.mesh.sequence_shares * settings.pipeline.micro_batches
  if cluster.num_gpus == settings.mesh.num_devices:
    if workload is None or workload.sequences % shares == 0:
      machine = Machine(cluster, options["calibration"])
      plans["given"] = search.evaluate(settings, machine, workload, options["tied"])
    else:
      print(f"\nThe config as given cuts sequences into {shares} shares: it has no column")
  return plans | dict(zip(("best", "runner-up"), found.best, strict=False))


def _print_claims(rows: list[claims.Claim]) -> None:
  mark = {True: "holds", False: "NO", None: "-"}
  shown = [(mark[row.holds], row.claim, row.asked, row.found) for row in rows]
  print("EVERY FIGURE OF THE REFERENCE PLAN")
  print(compare.to_text([("", "figure", "asked or claimed", "found"), *shown]))
  print("\nWHAT DOES NOT HOLD, and why")
  for row in rows:
    if row.holds is False:
      print(f"  {row.claim}: {row.asked} against {row.found}\n    {row.how}")


def _print_smallest(least, tried, targets: search.Targets) -> None:
  soon = "" if targets.ttft_s is None else f" and a first token within {targets.ttft_s:g} s"
  print(f"\nSMALLEST CLUSTER for {targets.tokens_per_ms:,.0f} tokens/ms{soon}")
  for gpus, plan, missing in tried:
    rate = f"{plan.tokens_per_ms_per_gpu * gpus:>10,.0f} tokens/ms" if plan else ""
    print(f"  {gpus:>7} GPUs {rate}  {missing or 'meets them'}")
  if least is None:
    print("  none of these sizes meets them")


def _print_load(plan: search.Plan, loads: load.Load) -> None:
  even = load.zipf(plan.settings, 0.0)
  loads = load.of(plan.settings, loads.share_LE)
  seconds = [
    skew.end_seconds(plan.settings, plan.machine, each, _TIED.value).max() for each in (even, loads)
  ]
  print(
    f"\nUNDER THIS LOAD the best plan's schedule takes {seconds[1] * 1e3:.2f} ms, even"
    f" {seconds[0] * 1e3:.2f} ms: {seconds[1] / seconds[0]:.2f}x; busiest rank"
    f" {loads.max_over_mean:.2f}x the mean, {loads.dropped_fraction:.1%} dropped"
  )


def _report(settings, rows, plans, changes, least, tried, found) -> dict:
  shown = lambda plan: (
    plan
    and {
      "config": config_lib.as_dict(plan.settings),
      "cluster": plan.machine.cluster.name,
      "seconds": plan.seconds,
      "tokens_per_ms_per_gpu": plan.tokens_per_ms_per_gpu,
      "memory_bytes": plan.memory_bytes,
    }
  )
  return {
    "claims": [row._asdict() for row in rows],
    "plans": {name: shown(plan) for name, plan in plans.items()},
    "change_first": [list(row) for row in changes],
    "smallest": shown(least),
    "sizes": [{"gpus": gpus, "plan": shown(plan), "missing": why} for gpus, plan, why in tried],
    "considered": found.considered,
    "simulated": found.simulated,
    "too_large": found.too_large,
    "config": config_lib.as_dict(settings),
  }


def _write(folder: pathlib.Path, best: search.Plan, plans, progress) -> None:
  paths.write(folder / "best.py", config_text(best, folder / "best.py"))
  shown = plans.get("given", best)
  step = graph.build(shown.settings)
  progress(f"writing a graph of {step.num_nodes:,} nodes and {step.num_edges:,} edges")
  paths.write(folder / "graph.json", export.to_json(step))
  paths.write(folder / "graph.graphml", export.to_graphml(step))
  paths.write(folder / "modules.dot", export.to_dot(step))
  paths.write(folder / "modules.svg", export.picture(shown.settings))
  for name, plan in {"best": best, "given": shown}.items():
    events = simulate.events(plan.settings, plan.machine, _TIED.value)
    steady, title = timeline.steady(events), f"A steady tick of the {name} plan, one GPU"
    paths.write(folder / f"{name}.trace.json", json.dumps(timeline.trace(events)))
    paths.write(folder / f"{name}.html", timeline.page(steady, title))
    paths.write(folder / f"{name}.svg", timeline.svg(steady, title))


def config_text(plan: search.Plan, path: pathlib.Path) -> str:
  """Returns the Python file of a plan, as in configs/."""
  values = config_lib.as_dict(plan.settings)
  sections = "".join(f'      "{name}": {fields!r},\n' for name, fields in values.items())
  return (
    f'"""python -m launch.train --config={path} --workdir=runs/{path.stem}\n\n'
    f"Chosen by launch.plan for {plan.machine.cluster.name}: {plan.seconds * 1e3:.2f} ms,"
    f" {plan.tokens_per_ms_per_gpu:.1f} tokens/ms/GPU,\n{plan.memory_bytes / 1e9:.3f} GB a GPU,"
    f' predicted.\n"""\n\nfrom ml_collections import ConfigDict\n\n\n'
    f"def get_config() -> ConfigDict:\n  return ConfigDict(\n    {{\n{sections}    }}\n  )\n"
  )


if __name__ == "__main__":
  run(main)
