"""Every figure of the reference plan, recomputed before anything is compiled.

One row for each, by the names that the rehearsal's table uses: what is asked or claimed, what is
found, whether it holds, how it was found, and why where it does not hold. Knows the plan's figures
and predictions; must not know how a prediction is made.
"""

from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.config import Config
from moe_jax.plan import claim_rows, cost, links, program, units
from moe_jax.plan.claim_rows import Claim, Exchange, equal, fraction
from moe_jax.plan.hardware import CHIPS
from moe_jax.plan.load import Load
from moe_jax.plan.machine import Machine, seconds, wires
from moe_jax.plan.memory import Memory, weight_bytes
from moe_jax.plan.serve import Served
from moe_jax.plan.simulate import Run

_MEGA, _GIGA, _TERA = 1e6, 1e9, 1e12
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
  model, mesh, train = found.settings.model, found.settings.mesh, found.settings.train
  planned, count = CHIPS["planned"], cost.num_parameters(found.settings.model).total
  table, config = "moe_jax/plan/hardware.py", "the config"
  rate = planned.flops_per_s("bfloat16")
  yield Claim(
    "GPU: rate of matrix products", "400 TFLOP/s at 60%", f"{rate / _TERA:.0f} TFLOP/s counted on",
    rate == 0.6 * 400e12, table,
  )  # fmt: skip
  yield Claim(
    "GPU: memory", "64 GB, 1.8 TB/s at 80%",
    f"{planned.memory_bytes / _GIGA:.0f} GB,"
    f" {planned.memory_bytes_per_s * planned.memory_fraction / _TERA:.2f} TB/s counted on",
    planned.memory_bytes == 64e9, table,
  )  # fmt: skip
  why = "" if abs(count / 10e9 - 1) < 0.05 else (
    "; its own layers, widths and experts give this many: the memory figures are of another model"
  )  # fmt: skip
  yield Claim(
    "model size", "10 B parameters", f"{count / 1e9:.2f} B", not why,
    f"layers x (attention + router + experts) + embedding + head{why}",
  )  # fmt: skip
  yield Claim(
    "model size in FP16", "about 20 GB", f"{2 * count / _GIGA:.2f} GB", not why,
    f"2 bytes a parameter{why}",
  )  # fmt: skip
  shown = (
    model.layers, model.heads, model.head_dim, model.experts, model.expert_hidden, model.d_model,
  )  # fmt: skip
  yield equal(
    "model: layers, heads, head width, experts, expert hidden, token dimension",
    (16, 16, 32, 16, 1024, 512), shown, config,
  )  # fmt: skip
  yield equal("batch", 128, train.batch, config)
  yield Claim(
    "sequence", "128 to 10,240 tokens", f"{train.sequence:,} tokens",
    128 <= train.sequence <= 10_240, config,
  )  # fmt: skip
  yield equal(
    "experts: ranks, experts each", (8, 2), (mesh.expert, model.experts // mesh.expert), config
  )
  yield equal(
    "tensor: ranks, hidden units each", (4, 256),
    (mesh.tensor, model.expert_hidden // mesh.tensor), config,
  )  # fmt: skip
  yield equal("modules: 8 x 4 x 2 GPUs", 64, mesh.num_devices, "expert x tensor x stage x data")
  forward = cost.forward_flops(model, [train.sequence]).total / train.sequence
  need = 6_400 * 1e3 * forward / rate
  yield Claim(
    "64 GPUs are needed for 6,400 tokens/ms", "64 GPUs",
    f"computation asks for {need:.1f} planned GPUs", need > 32,
    f"model FLOPs of a forward pass at {train.sequence:,} tokens x 6,400 tokens/ms / peak; links"
    " and launches ask for more: see the smallest cluster below",
  )  # fmt: skip


def _schedule(found: Figures) -> Iterator[Claim]:
  pipeline, mesh = found.settings.pipeline, found.settings.mesh
  yield equal(
    "pipeline: stages, layers each, micro-batches", (2, 8, 16),
    (mesh.stage, found.settings.model.layers // mesh.stage, pipeline.micro_batches), "the config",
  )  # fmt: skip
  yield Claim(
    "pipeline: schedule", "1F1B, activations recomputed",
    f"{pipeline.schedule} with {pipeline.chunks} chunks, saves {pipeline.save}",
    pipeline.save == "inputs" and pipeline.schedule != "gpipe",
    f"the config; {claim_rows.bubbles(found.settings)}",
  )  # fmt: skip
  for name, run in found.runs.items():
    yield Claim(
      f"bubble ({name})" if name != _first(found.runs) else "bubble", "< 2% of the step",
      f"{run.bubble_fraction:.2%}", run.bubble_fraction < 0.02,
      f"idle cells of the executed table, at the units' predicted times ({name})",
    )  # fmt: skip


def _memory(found: Figures) -> Iterator[Claim]:
  memory, weights = found.memory, weight_bytes(found.settings)
  how = "plan.memory: state, stash and buffers from shapes and the table, and the largest unit"
  yield Claim(
    "memory per GPU", "4.312 GB", f"{memory.total / _GIGA:.3f} GB", memory.total <= 4.312e9, how
  )
  yield Claim(
    "memory per GPU: parameters", "312 MB",
    f"{memory.parameters / _MEGA:.0f} MB master weights, {weights / _MEGA:.0f} MB in"
    " the compute dtype",
    memory.parameters <= 312e6,
    "float32, split over expert and data as well; 20 GB over 64 GPUs are 312 MB only where every"
    " parameter is split 64 ways, which attention, embedding and router are not",
  )  # fmt: skip
  yield Claim(
    "memory per GPU: activations and buffers", "about 3 GB + 1 GB",
    f"{memory.activations_and_buffers / _GIGA:.3f} GB", memory.activations_and_buffers <= 4e9,
    f"{memory.stash / _MEGA:.0f} MB saved in flight, {memory.workspace / _MEGA:.0f} MB for the"
    f" {memory.peak_unit} unit",
  )  # fmt: skip
  headroom = 1 - memory.total / CHIPS["planned"].memory_bytes
  yield Claim("memory headroom of 64 GB", "93%", f"{headroom:.1%}", headroom >= 0.93, how)


def _communication(found: Figures) -> Iterator[Claim]:
  settings = found.settings
  for name, run in found.runs.items():
    can = run.hideable_fraction
    why = "" if can is None or can >= 0.92 else (
      f"; at most {can:.0%} can be: links need {sum(run.seconds_by_link.values()) * 1e3:.1f} ms,"
      f" computation has {run.compute_s * 1e3:.1f}"
    )  # fmt: skip
    how = f"simulated step, {name}{why}"
    yield fraction(f"communication hidden ({name})", 0.92, run.hidden_fraction, how)
    of = run.hidden_fraction / can if can else None
    yield fraction(f"communication hidden of what can be ({name})", 0.92, of, how)
    took_s = run.seconds_by_stream.get("tensor link", 0.0)
    hidden = run.hidden_s_by_stream.get("tensor link", 0.0)
    tensor = hidden / took_s if took_s else None
    yield fraction(f"tensor reductions hidden ({name})", 0.95, tensor, f"simulated step, {name}")
    most = min(took_s, run.compute_s)
    yield fraction(
      f"tensor reductions hidden of what can be ({name})", 0.95, hidden / most if most else None,
      f"simulated step, {name}",
    )  # fmt: skip
  machine = found.machines[_first(found.machines)]
  exchanges = []
  for step in units.unit(settings, "forward"):
    if step.is_communication:
      link = wires(step, settings, machine).link
      took_s = seconds(step, settings, machine)
      exchanges.append(Exchange(step.kind, step.phase, link, step.operand_bytes, took_s))
  for link, asked in claim_rows.ALL_TO_ALL.items():
    yield Claim(
      f"all-to-all, {link} hosts", asked, *claim_rows.all_to_all(exchanges, link),
      "the longest exchange of rows, by NCCL's cost model on the vendor's links; the plan's figures"
      " are latencies of milliseconds, those of NVLink and InfiniBand are microseconds",
    )  # fmt: skip
  yield Claim(
    "all-to-all traffic between hosts, hierarchical against flat", "-60%",
    *claim_rows.saved_between_hosts(settings, exchanges),
    "each tensor rank sends its own rows only, in float8 a byte an element",
  )  # fmt: skip
  yield Claim(
    "streams per GPU", "4: compute, exchange, reduction, transfer",
    f"{len(found.runs[_first(found.runs)].seconds_by_stream) + 1}: compute and"
    f" {', '.join(found.runs[_first(found.runs)].seconds_by_stream)}",
    None, "plan.simulate; two streams on the same wires take turns",
  )  # fmt: skip


def _speed(found: Figures) -> Iterator[Claim]:
  train, gpus = found.settings.train, found.settings.mesh.num_devices
  for name, run in found.runs.items():
    rate = train.batch * train.sequence / (run.step_s * 1e3 * gpus)
    binds = binding(run)
    how = f"training, simulated step, {name}" + ("" if rate >= 100 else f"; {binds}")
    yield Claim(f"tokens/ms/GPU ({name})", "100", f"{rate:.1f}", rate >= 100, how)
    yield Claim(
      f"tokens/ms in all ({name})",
      "6,300 of 6,400",
      f"{rate * gpus:,.0f}",
      rate * gpus >= 6300,
      how,
    )
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
  asked = {"embed": 0.1, "dispatch": 1.0, "attention": 1.5, "experts": 2.0, "head": 0.1}
  run = found.runs["planned"]
  for phase, milliseconds in asked.items():
    each = run.compute_s_by_phase.get(phase, 0.0) / found.settings.pipeline.micro_batches * 1e3
    yield Claim(
      f"timeline: {phase}, per micro-batch", f"{milliseconds} ms", f"{each:.3f} ms of kernels",
      each <= milliseconds,
      "planned hardware, training (forward, again and backward), all layers of one stage",
    )  # fmt: skip


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
  yield Claim(
    "traffic: communication", "about 50 GB/ms",
    f"{sum(run.bytes_by_link.values()) / run.step_s / _TERA:.4f} GB/ms a GPU,"
    f" {run.bytes_by_link.get(links.BETWEEN, 0.0) / run.step_s / _TERA:.4f} between hosts",
    None, "bytes sent in a predicted step",
  )  # fmt: skip
  yield Claim(
    "traffic: 280 GB/ms in all = 19.4% of 1,440", "19.4%", "wrong by a factor of 1,000", False,
    "1,440 is GB/s, that is 1.44 GB/ms; 280 GB/ms would be 194 times the memory's bandwidth",
  )  # fmt: skip


def _rest(found: Figures) -> Iterator[Claim]:
  busiest = found.load.max_over_mean
  yield Claim(
    "load across GPUs", "+-2%", f"busiest rank {busiest:.3f} x the mean", busiest <= 1.02,
    "the load that was given (--zipf, --trace); without one it is even by assumption",
  )  # fmt: skip
  nodes, edges = found.graph
  yield Claim(
    "DAG", "stages, expert groups 0-3 and 4-7, tensor groups 0-3",
    f"{nodes:,} nodes, {edges:,} edges", True,
    "plan.graph: every step of every micro-batch on every module, typed edges, no cycle",
  )  # fmt: skip
  for claim, asked, how in (
    ("latency of exchanges measured: 4 GPUs per node, 16 nodes", "2 and 4 ms", _RUNNING),
    ("double buffering", "95%", _XLA),
    ("expert prefetch", "3 layers ahead, 90% accuracy",
     claim_rows.PREFETCH),
    ("memory layout: effective bandwidth", "95%, 8-way banks, L2 blocking", _XLA),
    ("monitoring", "every 100 us, P99 per expert, queue lengths, variance triggers", _RUNNING),
    ("work stealing", "< 5 ms", _RUNNING),
    ("prediction of load", "85% accuracy; by history, token type, reinforcement learning",
     _RUNNING),
    ("kernels", "routing fused with computation, >= 75% occupancy", "python -m tests.moe.kernels"),
    ("tensor reductions", "ring, chunked; pipeline bidirectional, double buffered", _XLA),
  ):  # fmt: skip
    yield Claim(claim, asked, "not for a plan to say", None, how)


def binding(run: Run) -> str:
  """Returns what binds the step, in one line."""
  terms = {
    "computation": run.compute_s,
    "link between hosts": run.seconds_by_link.get(links.BETWEEN, 0.0),
    "link inside hosts": run.seconds_by_link.get(links.INSIDE, 0.0),
  }
  name = max(terms, key=terms.get)
  return (
    f"{name} binds: {terms[name] * 1e3:.1f} ms of a step of {run.step_s * 1e3:.1f}, beside "
    + ", ".join(f"{other} {s * 1e3:.1f}" for other, s in terms.items() if other != name)
  )


def _step_counts(settings: Config):
  """Yields every step with how often a device runs it in a training step."""
  for times, blocks in program.counted(settings):
    for block in blocks:
      for op in block:
        yield op.step, times


def _first(mapping) -> str:
  return next(iter(mapping))
