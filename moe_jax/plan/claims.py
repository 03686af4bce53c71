"""Every figure of the reference plan, recomputed before anything is compiled.

One row for each, by the names that the rehearsal's table uses: what is asked or claimed, what is
found, whether it holds, how it was found, and why where it does not hold. Knows the plan's figures
and predictions; must not know how a prediction is made.
"""

from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.config import Config
from moe_jax.plan import claim_rows, program, units
from moe_jax.plan.claim_rows import Claim, Exchange
from moe_jax.plan.load import Load
from moe_jax.plan.machine import Machine, seconds, wires
from moe_jax.plan.memory import Memory, weight_bytes
from moe_jax.plan.serve import Served
from moe_jax.plan.simulate import Run

_MEGA, _TERA = 1e6, 1e12
_XLA = "XLA's and the kernels' to choose"
_RUNNING = "a property of a running system: the balancer's and the monitor's to measure"


class Figures(NamedTuple):
  """What the rows are made of.

  Attributes:
    settings: the deployment.
    machines: the cluster that was asked for, and the reference plan's hardware in its place.
    runs: a training step on each.
    memory: of one GPU in training.
    served: prompts of 10,240 tokens on each.
    load: of the experts.
    graph: (nodes, edges) of the step.
  """

  settings: Config
  machines: dict[str, Machine]
  runs: dict[str, Run]
  memory: Memory
  served: dict[str, Served]
  load: Load
  graph: tuple[int, int]


def rows(found: Figures) -> list[Claim]:
  """Returns a row for every figure of the reference plan."""
  groups = (
    _sizes,
    _schedule,
    _memory,
    _communication,
    _speed,
    _serving,
    _timeline,
    _traffic,
    _rest,
  )
  return [row for group in groups for row in group(found)]


def _sizes(found: Figures) -> Iterator[Claim]:
  settings, sequence = found.settings, found.settings.train.sequence
  why = "" if claim_rows.is_as_large(settings.model) else (
    "; its own layers, widths and experts give this many: the memory figures are of another model"
  )  # fmt: skip
  how = {
    "model size": f"layers x (attention + router + experts) + embedding + head{why}",
    "model size in FP16": f"2 bytes a parameter{why}",
    "modules: 8 x 4 x 2 GPUs": "expert x tensor x stage x data",
    "64 GPUs are needed for 6,400 tokens/ms": (
      "; links and launches ask for more: see the smallest cluster below"
    ),
  }
  yield from claim_rows.sizes(
    settings, settings.train.batch, sequence, 128 <= sequence <= claim_rows.LONGEST,
    {"planned": "planned GPUs"}, how,
  )  # fmt: skip


def _schedule(found: Figures) -> Iterator[Claim]:
  yield claim_rows.stages(found.settings, found.settings.pipeline.micro_batches)
  yield claim_rows.schedule(found.settings)
  for name, run in found.runs.items():
    yield claim_rows.bubble(
      f"bubble ({name})" if name != _first(found.runs) else "bubble", run.bubble_fraction,
      f"idle cells of the executed table, at the units' predicted times ({name})",
    )  # fmt: skip


def _memory(found: Figures) -> Iterator[Claim]:
  memory = found.memory
  how = "plan.memory: state, stash and buffers from shapes and the table, and the largest unit"
  yield claim_rows.total_memory(memory.total, how)
  yield claim_rows.parameter_memory(
    memory.parameters, weight_bytes(found.settings),
    "float32, split over expert and data as well; 20 GB over 64 GPUs are 312 MB only where every"
    " parameter is split 64 ways, which attention, embedding and router are not",
  )  # fmt: skip
  yield claim_rows.other_memory(
    memory.activations_and_buffers, "",
    f"{memory.stash / _MEGA:.0f} MB saved in flight, {memory.workspace / _MEGA:.0f} MB for the"
    f" {memory.peak_unit} unit",
  )  # fmt: skip
  yield claim_rows.headroom(memory.total, how)


def _communication(found: Figures) -> Iterator[Claim]:
  settings = found.settings
  for name, run in found.runs.items():
    can = run.hideable_fraction
    why = "" if can is None or can >= 0.92 else (
      f"; at most {can:.0%} can be: links need {sum(run.seconds_by_link.values()) * 1e3:.1f} ms,"
      f" computation has {run.compute_s * 1e3:.1f}"
    )  # fmt: skip
    how = f"simulated step, {name}"
    took_s = run.seconds_by_stream.get("tensor link", 0.0)
    hidden_s = run.hidden_s_by_stream.get("tensor link", 0.0)
    most_s = min(took_s, run.compute_s)
    yield from claim_rows.hidden(
      name,
      (run.hidden_fraction, run.hidden_fraction / can if can else None),
      (hidden_s / took_s if took_s else None, hidden_s / most_s if most_s else None),
      f"{how}{why}",
      how,
    )
  machine = found.machines[_first(found.machines)]
  exchanges = []
  for step in units.unit(settings, "forward"):
    if step.is_communication:
      link = wires(step, settings, machine).link
      took_s = seconds(step, settings, machine)
      exchanges.append(Exchange(step.kind, step.phase, link, step.operand_bytes, took_s))
  yield from claim_rows.of_exchanges(
    settings, exchanges,
    "NCCL's cost model on the vendor's links; the plan's figures are latencies of milliseconds,"
    " those of NVLink and InfiniBand are microseconds",
    "",
  )  # fmt: skip
  streams = found.runs[_first(found.runs)].seconds_by_stream
  yield claim_rows.answer(
    "streams per GPU", f"{len(streams) + 1}: compute and {', '.join(streams)}", None,
    "plan.simulate; two streams on the same wires take turns",
  )  # fmt: skip


def _speed(found: Figures) -> Iterator[Claim]:
  train, gpus = found.settings.train, found.settings.mesh.num_devices
  for name, run in found.runs.items():
    rate = train.batch * train.sequence / (run.step_s * 1e3 * gpus)
    binds = claim_rows.binding(run.compute_s, run.seconds_by_link, run.step_s)
    how = f"training, simulated step, {name}" + ("" if rate >= 100 else f"; {binds}")
    yield from claim_rows.rates(name, rate, gpus, how)
    served = found.served[name].prefill_tokens_per_ms_per_gpu
    yield Claim(
      f"tokens/ms/GPU in prefill ({name})", "100, 98.4 claimed", f"{served:.0f}", served >= 98.4,
      "prompts of 10,240 tokens, forward pass only",
    )  # fmt: skip
    efficiency = run.compute_s / run.step_s
    yield Claim(
      f"efficiency ({name})", "98.4%, > 95% asked", f"{efficiency:.1%}", efficiency >= 0.95,
      "share of the step in which kernels run; 98.4% of an asked rate is no efficiency",
    )  # fmt: skip


def _serving(found: Figures) -> Iterator[Claim]:
  for name, served in found.served.items():
    first = name == _first(found.served)
    yield Claim(
      "time to first token at 10,240 tokens" + ("" if first else f" ({name})"),
      "< 10 s, < 6 s claimed",
      f"{served.ttft_s * 1e3:.1f} ms", served.ttft_s < 6,
      f"prefill of a whole batch of {found.settings.train.batch} prompts, {name}; then"
      f" {served.token_s * 1e3:.2f} ms a token",
    )  # fmt: skip


def _timeline(found: Figures) -> Iterator[Claim]:
  by_phase = found.runs["planned"].compute_s_by_phase
  yield from claim_rows.timeline(found.settings, by_phase, "all layers of one stage")


def _traffic(found: Figures) -> Iterator[Claim]:
  name = _first(found.runs)
  run, chip = found.runs[name], found.machines[name].cluster.chip
  peak = chip.memory_bytes_per_s * chip.memory_fraction
  parts = {"parameters": 0.0, "activations": 0.0}
  passes = found.settings.pipeline.micro_batches * 3
  parts["parameters"] = weight_bytes(found.settings) * passes
  total = sum(
    step.num_bytes * times
    for step, times in _step_counts(found.settings)
    if not step.is_communication
  )
  parts["activations"] = max(0.0, total - parts["parameters"])
  for part, asked in (("parameters", "30.7 GB/ms"), ("activations", "about 200 GB/ms")):
    rate = parts[part] / run.step_s
    yield Claim(
      f"traffic: {part}", asked,
      f"{rate / _TERA:.3f} GB/ms a GPU, {rate / peak:.1%} of its memory's",
      None,
      "bytes that kernels move in a predicted step; the plan's figure exceeds any memory's rate",
    )  # fmt: skip
  yield from claim_rows.traffic(run.bytes_by_link, run.step_s, "bytes sent in a predicted step")


def _rest(found: Figures) -> Iterator[Claim]:
  busiest = found.load.max_over_mean
  yield claim_rows.answer(
    "load across GPUs", f"busiest rank {busiest:.3f} x the mean", busiest <= 1.02,
    "the load that was given (--zipf, --trace); without one it is even by assumption",
  )  # fmt: skip
  nodes, edges = found.graph
  yield claim_rows.answer(
    "DAG", f"{nodes:,} nodes, {edges:,} edges", True,
    "plan.graph: every step of every micro-batch on every module, typed edges, no cycle",
  )  # fmt: skip
  for claim, how in (
    ("latency of exchanges measured: 4 GPUs per node, 16 nodes", _RUNNING),
    ("double buffering", _XLA),
    ("expert prefetch", claim_rows.PREFETCH),
    ("memory layout: effective bandwidth", _XLA),
    ("monitoring", _RUNNING),
    ("work stealing", _RUNNING),
    ("prediction of load", _RUNNING),
    ("kernels", "python -m tests.moe.kernels"),
    ("tensor reductions", _XLA),
  ):
    yield claim_rows.answer(claim, "not for a plan to say", None, how)


def _step_counts(settings: Config):
  """Yields every step with how often a device runs it in a training step."""
  for times, blocks in program.counted(settings):
    for block in blocks:
      for op in block:
        yield op.step, times


def _first(mapping) -> str:
  return next(iter(mapping))
