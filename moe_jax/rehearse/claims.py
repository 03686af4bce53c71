"""Every figure of the reference plan, held against the compiled program.

One row for each: what is asked or claimed, what is found, whether it holds, and how it was found.
Knows the plan's figures and the report; must not know how the report was made.
"""

from collections.abc import Mapping

from moe_jax import config
from moe_jax.plan import claim_rows
from moe_jax.plan.claim_rows import LONGEST, UNKNOWN, Claim
from moe_jax.plan.links import BETWEEN, INSIDE

ELSEWHERE = "not in this report"
_GIGA = 1e9


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
  work = report["workload"]
  tokens = max(work["tokens_each"], work["cached_tokens"])
  how = {
    "model size": (
      "plan.cost.num_parameters; the plan's own dimensions give 0.45 B (pod64), pod64_10b has 10 B"
    ),
    "model size in FP16": "2 bytes a parameter",
    "modules: 8 x 4 x 2 GPUs": "the config",
    "64 GPUs are needed for 6,400 tokens/ms": "",
  }
  # What training takes is one of the plan's lengths; what serving holds, the longest of them.
  is_length = 128 <= tokens <= LONGEST if work["step"] == "train" else tokens >= LONGEST
  gpus = {"planned": "planned GPUs", "h100": "H100"}
  yield from claim_rows.sizes(settings, work["sequences"], tokens, is_length, gpus, how)


def _schedule(settings, report):
  work = report["workload"]
  if work["step"] == "decode":
    stages = settings.mesh.stage
    found = (stages, settings.model.layers // stages)
    yield claim_rows.equal("pipeline: stages, layers each", (2, 8), found, "the config")
  else:
    yield claim_rows.stages(settings, work["micro_batches"])
  if work["step"] == "train":
    yield claim_rows.schedule(settings)
  yield claim_rows.bubble(
    "bubble", report["prediction"]["bubble_fraction"],
    "idle cells of the schedule table, at the units' simulated times in the compiled program",
  )  # fmt: skip


def _memory(settings, report):
  found = report["memory_bytes"]
  how = f"memory_analysis() of the compiled program, {report['workload']['step']}"
  yield claim_rows.total_memory(found["total"], how)
  if report["workload"]["step"] != "train":
    yield claim_rows.parameter_memory(
      found["parameters"], None, how + "; weights in the compute dtype, no master weights"
    )
    rest = found["cache"] + found["activations_and_buffers"]
    cache = f", {found['cache'] / _GIGA:.3f} GB of it key-value cache"
    yield claim_rows.other_memory(rest, cache, how)
    return
  yield claim_rows.parameter_memory(
    found["parameters"], found["compute_copies"],
    how + "; weights in float32, split over expert as well",
  )  # fmt: skip
  yield claim_rows.other_memory(found["activations_and_buffers"], "", how)
  yield claim_rows.headroom(found["total"], how)


def _communication(settings, report):
  exposures = {"on the chip": report["exposure"], "planned": report["planned"]["exposure"]}
  how = "simulated time of the compiled schedule"
  for name, found in exposures.items():
    shares = ("hidden_fraction", "hidden_of_hideable")
    of_tensor = [found[f"{share}_by_axis"].get("tensor") for share in shares]
    yield from claim_rows.hidden(name, [found[share] for share in shares], of_tensor, how, how)
  exchanges = [
    claim_rows.Exchange(
      row["kind"], row["phase"], row["link"], row["largest_operand_bytes"], row["longest_seconds"]
    )
    for row in report["collectives"]
  ]
  yield from claim_rows.of_exchanges(
    settings, exchanges, "the link model", "docstrings of moe/exchange.py: "
  )
  yield claim_rows.answer(
    "streams per GPU", "1 of computation, 1 of each link", None,
    "the time model; XLA chooses streams when it runs",
  )  # fmt: skip


def _speed(settings, report):
  for name, found in (
    ("on the chip", report["prediction"]),
    ("planned", report["planned"]["prediction"]),
  ):
    how = f"{report['workload']['step']}, {found['chip']}: simulated step"
    rate = found["tokens_per_ms_per_gpu"]
    yield from claim_rows.rates(name, rate, settings.mesh.num_devices, how)


def _latency(settings, report):
  work = report["workload"]
  claim, asked = f"time to first token at {LONGEST:,} tokens", "< 10 s, < 6 s claimed"
  if work["step"] != "prefill":
    yield Claim(claim, asked, ELSEWHERE, None, "python -m launch.rehearse --step=prefill")
    return
  found = [report["prediction"], report["planned"]["prediction"]]
  shown = ", ".join(f"{each['ttft_s']:.3f} s on {each['chip']}" for each in found)
  is_longest = work["tokens_each"] >= LONGEST
  yield Claim(
    claim, asked, shown + ("" if is_longest else f", of {work['tokens_each']:,} tokens"),
    all(each["ttft_s"] < 6 for each in found) if is_longest else None,
    f"simulated prefill of {work['sequences']} prompts at once, until the last one's first token",
  )  # fmt: skip


def _timeline(settings, report):
  by_phase = report["planned"]["prediction"]["compute_s_by_phase"]
  yield from claim_rows.timeline(settings, by_phase, "one stage")


def _traffic(settings, report):
  by_link = {
    link: sum(row["bytes_per_gpu"] for row in report["collectives"] if row["link"] == link)
    for link in (INSIDE, BETWEEN)
  }
  how = "bytes sent by the compiled program in a simulated step"
  yield from claim_rows.traffic(by_link, report["prediction"]["step_s"], how)


def _not_here(settings, report):
  balance = (
    "moe_jax/balance, which depends on the load while it runs: python -m launch.bench_balance"
  )
  for claim, found, how in (
    ("expert prefetch", claim_rows.prefetched(settings), claim_rows.PREFETCH),
    ("latency of exchanges measured: 4 GPUs per node, 16 nodes", UNKNOWN,
     "a pod has to be there; by the links' bandwidth see `all-to-all` above"),
    ("double buffering", UNKNOWN, "XLA gives each collective buffers of its own"),
    ("memory layout: effective bandwidth", UNKNOWN,
     "XLA's and the kernels' to choose; a GPU's counters would show it"),
    ("kernels", ELSEWHERE, "python -m tests.moe.kernels"),
    ("tensor reductions", UNKNOWN,
     "NCCL's to choose; of the program's own rings see the README"),
    ("DAG", ELSEWHERE, "python -m launch.plan"),
    ("load across GPUs", ELSEWHERE, balance),
    ("monitoring", ELSEWHERE, balance),
    ("work stealing", ELSEWHERE, balance),
    ("prediction of load", ELSEWHERE, balance),
  ):  # fmt: skip
    yield claim_rows.answer(claim, found, None, how)
