"""Every figure of the reference plan, held against the compiled program.

One row for each: what is asked or claimed, what is found, whether it holds, and how it was found.
Knows the plan's figures and the report; must not know how the report was made.
"""

from collections.abc import Mapping

from moe_jax import config
from moe_jax.plan import claim_rows, cost
from moe_jax.plan.claim_rows import Claim, equal, fraction
from moe_jax.plan.hardware import CHIPS

ELSEWHERE = "not in this report"
UNKNOWN = "the program does not show it"
_LONGEST = 10_240  # tokens of the plan's longest sequence
_MEGA, _GIGA = 1e6, 1e9


def rows(settings: config.Config, report: Mapping) -> list[Claim]:
  """Returns a row for every figure of the plan.

  Args:
    settings: the deployment.
    report: workload, memory_bytes, collectives, exposure, prediction of the compiled chip, and
      `planned`: exposure and prediction of the planned hardware.
  """
  every_step = (_sizes, _schedule, _memory, _communication, _speed, _latency)
  training = (_timeline, _traffic, _not_here) if report["workload"]["step"] == "train" else ()
  return [row for group in (*every_step, *training) for row in group(settings, report)]


def _sizes(settings, report):
  model, mesh, work = settings.model, settings.mesh, report["workload"]
  sequence = max(work["tokens_each"], work["cached_tokens"])
  planned, parameters = CHIPS["planned"], cost.num_parameters(settings.model).total
  by_config, by_table = "the config", "moe_jax/plan/hardware.py"
  yield Claim(
    "GPU: rate of matrix products", "400 TFLOP/s at 60%",
    f"{planned.flops_per_s('bfloat16') / 1e12:.0f} TFLOP/s counted on",
    planned.flops_per_s("bfloat16") == 0.6 * 400e12, by_table,
  )  # fmt: skip
  yield Claim(
    "GPU: memory", "64 GB, 1.8 TB/s at 80%",
    f"{planned.memory_bytes / _GIGA:.0f} GB,"
    f" {planned.memory_bytes_per_s * planned.memory_fraction / 1e12:.2f} TB/s counted on",
    planned.memory_bytes == 64e9, by_table,
  )  # fmt: skip
  yield Claim(
    "model size", "10 B parameters", f"{parameters / 1e9:.2f} B",
    abs(parameters / 10e9 - 1) < 0.05,
    "plan.cost.num_parameters; the plan's own dimensions give 0.45 B (pod64), pod64_10b has 10 B",
  )  # fmt: skip
  yield Claim(
    "model size in FP16", "about 20 GB", f"{2 * parameters / _GIGA:.2f} GB",
    abs(2 * parameters / 20e9 - 1) < 0.05, "2 bytes a parameter",
  )  # fmt: skip
  asked = (16, 16, 32, 16, 1024, 512)
  found = (
    model.layers, model.heads, model.head_dim, model.experts, model.expert_hidden, model.d_model,
  )  # fmt: skip
  names = "layers, heads, head width, experts, expert hidden, token dimension"
  yield equal(f"model: {names}", asked, found, by_config)
  yield equal("batch", 128, work["sequences"], by_config)
  # What training takes is one of the plan's lengths; what serving holds, the longest of them.
  is_length = 128 <= sequence <= _LONGEST if work["step"] == "train" else sequence >= _LONGEST
  yield Claim(
    "sequence", "128 to 10,240 tokens", f"{sequence:,} tokens", is_length, by_config
  )  # fmt: skip
  yield equal(
    "experts: ranks, experts each", (8, 2), (mesh.expert, model.experts // mesh.expert), by_config
  )
  yield equal(
    "tensor: ranks, hidden units each", (4, 256), (mesh.tensor, model.expert_hidden // mesh.tensor),
    by_config,
  )  # fmt: skip
  yield equal("modules: 8 x 4 x 2 GPUs", 64, mesh.num_devices, by_config)
  chip = CHIPS["h100"]
  need = 6_400 * 1e3 * cost.forward_flops(model, [sequence]).total / sequence
  yield Claim(
    "64 GPUs are needed for 6,400 tokens/ms", "64 GPUs",
    f"computation asks for {need / planned.flops_per_s('bfloat16'):.1f} planned GPUs,"
    f" {need / chip.flops_per_s('bfloat16'):.1f} H100",
    need / planned.flops_per_s("bfloat16") > 32,
    f"model FLOPs of a forward pass at {sequence:,} tokens x 6,400 tokens/ms / peak",
  )  # fmt: skip


def _schedule(settings, report):
  pipeline, mesh = settings.pipeline, settings.mesh
  layers = settings.model.layers // mesh.stage
  work = report["workload"]
  if work["step"] == "decode":
    yield equal("pipeline: stages, layers each", (2, 8), (mesh.stage, layers), "the config")
  else:
    yield equal(
      "pipeline: stages, layers each, micro-batches",
      (2, 8, 16),
      (mesh.stage, layers, work["micro_batches"]),
      "the config",
    )
  if work["step"] == "train":
    yield Claim(
      "pipeline: schedule", "1F1B, activations recomputed",
      f"{pipeline.schedule} with {pipeline.chunks} chunks, saves {pipeline.save}",
      pipeline.save == "inputs" and pipeline.schedule != "gpipe",
      f"the config; {claim_rows.bubbles(settings)}",
    )  # fmt: skip
  bubble = report["prediction"]["bubble_fraction"]
  yield Claim(
    "bubble", "< 2% of the step", UNKNOWN if bubble is None else f"{bubble:.2%}",
    None if bubble is None else bubble < 0.02,
    "idle cells of the schedule table, at the units' simulated times in the compiled program",
  )  # fmt: skip


def _memory(settings, report):
  found = report["memory_bytes"]
  how = f"memory_analysis() of the compiled program, {report['workload']['step']}"
  yield Claim(
    "memory per GPU", "4.312 GB", f"{found['total'] / _GIGA:.3f} GB", found["total"] <= 4.312e9, how
  )
  if report["workload"]["step"] != "train":
    yield Claim(
      "memory per GPU: parameters", "312 MB", f"{found['parameters'] / _MEGA:.0f} MB",
      found["parameters"] <= 312e6, how + "; weights in the compute dtype, no master weights",
    )  # fmt: skip
    rest = found["cache"] + found["activations_and_buffers"]
    yield Claim(
      "memory per GPU: activations and buffers", "about 3 GB + 1 GB",
      f"{rest / _GIGA:.3f} GB, {found['cache'] / _GIGA:.3f} GB of it key-value cache",
      rest <= 4e9, how,
    )  # fmt: skip
    return
  yield Claim(
    "memory per GPU: parameters", "312 MB",
    f"{found['parameters'] / _MEGA:.0f} MB master weights, {found['compute_copies'] / _MEGA:.0f} MB"
    " in the compute dtype",
    found["parameters"] <= 312e6, how + "; weights in float32, split over expert as well",
  )  # fmt: skip
  rest = found["activations_and_buffers"]
  yield Claim(
    "memory per GPU: activations and buffers", "about 3 GB + 1 GB", f"{rest / _GIGA:.3f} GB",
    rest <= 4e9, how,
  )  # fmt: skip
  headroom = 1 - found["total"] / CHIPS["planned"].memory_bytes
  yield Claim("memory headroom of 64 GB", "93%", f"{headroom:.1%}", headroom >= 0.93, how)


def _communication(settings, report):
  exposures = {"on the chip": report["exposure"], "planned": report["planned"]["exposure"]}
  for name, found in exposures.items():
    of = "hidden of what can be"
    yield _simulated("communication hidden", 0.92, found["hidden_fraction"], name)
    yield _simulated(f"communication {of}", 0.92, found["hidden_of_hideable"], name)
    tensor = found["hidden_fraction_by_axis"].get("tensor")
    yield _simulated("tensor reductions hidden", 0.95, tensor, name)
    yield _simulated(
      f"tensor reductions {of}", 0.95, found["hidden_of_hideable_by_axis"].get("tensor"), name
    )
  exchanges = [
    claim_rows.Exchange(
      row["kind"], row["phase"], row["link"], row["largest_operand_bytes"], row["longest_seconds"]
    )
    for row in report["collectives"]
  ]
  for link, asked in claim_rows.ALL_TO_ALL.items():
    yield Claim(
      f"all-to-all, {link} hosts", asked, *claim_rows.all_to_all(exchanges, link),
      "the longest exchange of rows, by the link model",
    )  # fmt: skip
  yield Claim(
    "all-to-all traffic between hosts, hierarchical against flat", "-60%",
    *claim_rows.saved_between_hosts(settings, exchanges),
    "docstrings of moe/exchange.py: each tensor rank sends its own rows only, in"
    " float8 a byte an element",
  )  # fmt: skip
  yield Claim(
    "streams per GPU", "4: compute, exchange, reduction, transfer",
    "1 of computation, 1 of each link", None, "the time model; XLA chooses streams when it runs",
  )  # fmt: skip


def _speed(settings, report):
  gpus = settings.mesh.num_devices
  for name, found in (
    ("on the chip", report["prediction"]),
    ("planned", report["planned"]["prediction"]),
  ):
    rate = found["tokens_per_ms_per_gpu"]
    how = f"{report['workload']['step']}, {found['chip']}: simulated step"
    yield Claim(f"tokens/ms/GPU ({name})", "100", f"{rate:.1f}", rate >= 100, how)
    yield Claim(
      f"tokens/ms in all ({name})",
      "6,300 of 6,400",
      f"{rate * gpus:,.0f}",
      rate * gpus >= 6300,
      how,
    )


def _latency(settings, report):
  work = report["workload"]
  claim, asked = f"time to first token at {_LONGEST:,} tokens", "< 10 s, < 6 s claimed"
  if work["step"] != "prefill":
    yield Claim(claim, asked, ELSEWHERE, None, "python -m launch.rehearse --step=prefill")
    return
  found = [report["prediction"], report["planned"]["prediction"]]
  shown = ", ".join(f"{each['ttft_s']:.3f} s on {each['chip']}" for each in found)
  is_longest = work["tokens_each"] >= _LONGEST
  yield Claim(
    claim, asked, shown + ("" if is_longest else f", of {work['tokens_each']:,} tokens"),
    all(each["ttft_s"] < 6 for each in found) if is_longest else None,
    f"simulated prefill of {work['sequences']} prompts at once, until the last one's first token",
  )  # fmt: skip


def _timeline(settings, report):
  phases = report["planned"]["prediction"]["compute_s_by_phase"]
  micro_batches = settings.pipeline.micro_batches
  asked = {"embed": 0.1, "dispatch": 1.0, "attention": 1.5, "experts": 2.0, "head": 0.1}
  for phase, milliseconds in asked.items():
    each = phases.get(phase, 0.0) / micro_batches * 1e3
    yield Claim(
      f"timeline: {phase}, per micro-batch", f"{milliseconds} ms", f"{each:.3f} ms of kernels",
      each <= milliseconds, "planned hardware, training (forward, again and backward), one stage",
    )  # fmt: skip


def _traffic(settings, report):
  found = report["prediction"]
  by_link = {
    link: sum(row["bytes_per_gpu"] for row in report["collectives"] if row["link"] == link)
    for link in ("inside", "between")
  }
  step_s = found["step_s"]
  yield Claim(
    "traffic: 280 GB/ms in all = 19.4% of 1,440", "19.4%", "wrong by a factor of 1,000", False,
    "1,440 is GB/s, that is 1.44 GB/ms; 280 GB/ms would be 194 times the memory's bandwidth",
  )  # fmt: skip
  yield Claim(
    "traffic: communication", "about 50 GB/ms",
    f"{sum(by_link.values()) / step_s / 1e12:.4f} GB/ms a GPU,"
    f" {by_link['between'] / step_s / 1e12:.4f} between hosts",
    None, "bytes sent by the compiled program in a simulated step",
  )  # fmt: skip


def _not_here(settings, report):
  ahead, chunks = settings.pipeline.prefetch_layers, settings.pipeline.chunks
  found = "all weights are there"
  if ahead:
    found = f"attention's weights {ahead} layers ahead"
  elif chunks > 1 and settings.mesh.expert > 1:
    found = f"attention's weights of {chunks - 1} of {chunks} chunks while the pipeline fills"
  yield Claim("expert prefetch", "3 layers ahead, 90% accuracy", found, None, claim_rows.PREFETCH)
  balance = (
    "moe_jax/balance, which depends on the load while it runs: python -m launch.bench_balance"
  )
  for claim, asked, found, how in (
    ("latency of exchanges measured: 4 GPUs per node, 16 nodes", "2 and 4 ms", UNKNOWN,
     "a pod has to be there; by the links' bandwidth see `all-to-all` above"),
    ("double buffering", "95%", UNKNOWN, "XLA gives each collective buffers of its own"),
    ("memory layout: effective bandwidth", "95%, 8-way banks, L2 blocking", UNKNOWN,
     "XLA's and the kernels' to choose; a GPU's counters would show it"),
    ("kernels", "routing fused with computation, >= 75% occupancy", ELSEWHERE,
     "python -m tests.moe.kernels"),
    ("tensor reductions", "ring, chunked; pipeline bidirectional, double buffered", UNKNOWN,
     "NCCL's to choose; of the program's own rings see the README"),
    ("DAG", "stages, expert groups 0-3 and 4-7, tensor groups 0-3", ELSEWHERE,
     "python -m launch.plan"),
    ("load across GPUs", "+-2%", ELSEWHERE, balance),
    ("monitoring", "every 100 us, P99 per expert, queue lengths, variance triggers", ELSEWHERE,
     balance),
    ("work stealing", "< 5 ms", ELSEWHERE, balance),
    ("prediction of load", "85% accuracy; by history, token type, reinforcement learning",
     ELSEWHERE, balance),
  ):  # fmt: skip
    yield Claim(claim, asked, found, None, how)


def _simulated(claim: str, asked: float, found: float | None, name: str) -> Claim:
  how = "simulated time of the compiled schedule"
  return fraction(f"{claim} ({name})", asked, found, how)
