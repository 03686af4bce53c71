"""What the table of claims before anything is compiled shares with that of a compiled program.

The row, and all rows that both have, by one rule. Knows the reference plan's figures; must not know
where found ones come from.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from moe_jax.config import Config, Model
from moe_jax.pipeline import segments
from moe_jax.plan import cost, links, memory, steps
from moe_jax.plan.hardware import CHIPS
from moe_jax.plan.leaves import DTYPE_BYTES, leaves

LONGEST = 10_240  # tokens of the plan's longest sequence
UNKNOWN = "the program does not show it"
PREFETCH = (
  "routing is not known ahead; experts' weights are resident, or where there are copies (mesh.data)"
  " in shares, as attention's are: these are gathered chunk by chunk while an interleaved schedule"
  " begins, or layer by layer with pipeline.prefetch_layers"
)

_MEGA, _GIGA, _TERA = 1e6, 1e9, 1e12
_CONFIG, _TABLE = "the config", "moe_jax/plan/hardware.py"
_PLANNED = CHIPS["planned"]
# What the plan says of what is found by no rule that both tables have.
_ASKED: Mapping[str, str] = {
  "load across GPUs": "+-2%",
  "DAG": "stages, expert groups 0-3 and 4-7, tensor groups 0-3",
  "latency of exchanges measured: 4 GPUs per node, 16 nodes": "2 and 4 ms",
  "double buffering": "95%",
  "expert prefetch": "3 layers ahead, 90% accuracy",
  "memory layout: effective bandwidth": "95%, 8-way banks, L2 blocking",
  "monitoring": "every 100 us, P99 per expert, queue lengths, variance triggers",
  "work stealing": "< 5 ms",
  "prediction of load": "85% accuracy; by history, token type, reinforcement learning",
  "kernels": "routing fused with computation, >= 75% occupancy",
  "tensor reductions": "ring, chunked; pipeline bidirectional, double buffered",
  "streams per GPU": "4: compute, exchange, reduction, transfer",
}
# The plan's milliseconds of a micro-batch by phase.
_TIMELINE = {"embed": 0.1, "dispatch": 1.0, "attention": 1.5, "experts": 2.0, "head": 0.1}
# The plan's figures of exchanges by link, and which messages are of rows: those that hold this
# share of the largest one's bytes.
_ALL_TO_ALL: Mapping[str, str] = {links.INSIDE: "1-2 ms", links.BETWEEN: "2-4 ms"}
_PHASES, _OF_LARGEST = frozenset(("dispatch", "combine")), 0.05


class Claim(NamedTuple):
  """One row.

  Attributes:
    claim: what it is about.
    asked: the reference plan's figure.
    found: ours, or why there is none.
    holds: None where nothing here answers, or nothing was asked.
    how: where the figure comes from, and why where it does not hold.
  """

  claim: str
  asked: str
  found: str
  holds: bool | None
  how: str


class Exchange(NamedTuple):
  """A collective of a layer, or the largest of several that are alike.

  Attributes:
    kind: of links.KINDS.
    phase: of the model, or several joined by +.
    link: the slowest that it crosses.
    operand_bytes: what a device puts in.
    seconds: by itself.
  """

  kind: str
  phase: str
  link: str
  operand_bytes: float
  seconds: float


def sizes(
  settings: Config,
  sequences: int,
  tokens: int,
  is_length: bool,
  gpus: Mapping[str, str],
  how: Mapping[str, str],
) -> Iterator[Claim]:
  """Yields the rows of the chip, the model, the batch and the mesh, and of how many GPUs they need.

  Args:
    settings: the deployment.
    sequences, tokens: worked on at once, and of each.
    is_length: whether that is one of the plan's lengths.
    gpus: by chip, what so many of it are called.
    how: by claim, of those that the two tables find in different ways.
  """
  model, mesh = settings.model, settings.mesh
  count, rate = cost.num_parameters(model).total, _PLANNED.flops_per_s("bfloat16")
  yield Claim(
    "GPU: rate of matrix products", "400 TFLOP/s at 60%", f"{rate / _TERA:.0f} TFLOP/s counted on",
    rate == 0.6 * 400e12, _TABLE,
  )  # fmt: skip
  yield Claim(
    "GPU: memory", "64 GB, 1.8 TB/s at 80%",
    f"{_PLANNED.memory_bytes / _GIGA:.0f} GB,"
    f" {_PLANNED.memory_bytes_per_s * _PLANNED.memory_fraction / _TERA:.2f} TB/s counted on",
    _PLANNED.memory_bytes == 64e9, _TABLE,
  )  # fmt: skip
  for claim, asked, found in (
    ("model size", "10 B parameters", f"{count / 1e9:.2f} B"),
    ("model size in FP16", "about 20 GB", f"{2 * count / _GIGA:.2f} GB"),
  ):
    yield Claim(claim, asked, found, is_as_large(model), how[claim])
  shown = (
    model.layers, model.heads, model.head_dim, model.experts, model.expert_hidden, model.d_model,
  )  # fmt: skip
  yield equal(
    "model: layers, heads, head width, experts, expert hidden, token dimension",
    (16, 16, 32, 16, 1024, 512), shown, _CONFIG,
  )  # fmt: skip
  yield equal("batch", 128, sequences, _CONFIG)
  yield Claim("sequence", "128 to 10,240 tokens", f"{tokens:,} tokens", is_length, _CONFIG)
  yield equal(
    "experts: ranks, experts each", (8, 2), (mesh.expert, model.experts // mesh.expert), _CONFIG
  )
  yield equal(
    "tensor: ranks, hidden units each", (4, 256),
    (mesh.tensor, model.expert_hidden // mesh.tensor), _CONFIG,
  )  # fmt: skip
  claim = "modules: 8 x 4 x 2 GPUs"
  yield equal(claim, 64, mesh.num_devices, how[claim])
  need = 6_400 * 1e3 * cost.forward_flops(model, [tokens]).total / tokens
  of = lambda chip: need / CHIPS[chip].flops_per_s("bfloat16")
  needed = ", ".join(f"{of(chip):.1f} {name}" for chip, name in gpus.items())
  claim = "64 GPUs are needed for 6,400 tokens/ms"
  yield Claim(
    claim, "64 GPUs", f"computation asks for {needed}", need / rate > 32,
    f"model FLOPs of a forward pass at {tokens:,} tokens x 6,400 tokens/ms / peak{how[claim]}",
  )  # fmt: skip


def is_as_large(model: Model) -> bool:
  """Returns whether the model has the parameters that the plan's memory is of."""
  return abs(cost.num_parameters(model).total / 10e9 - 1) < 0.05


def stages(settings: Config, micro_batches: int) -> Claim:
  """Returns the row of the pipeline's sizes."""
  of_stage = settings.model.layers // settings.mesh.stage
  return equal(
    "pipeline: stages, layers each, micro-batches", (2, 8, 16),
    (settings.mesh.stage, of_stage, micro_batches), _CONFIG,
  )  # fmt: skip


def schedule(settings: Config) -> Claim:
  """Returns the row of the pipeline's schedule."""
  pipeline = settings.pipeline
  return Claim(
    "pipeline: schedule", "1F1B, activations recomputed",
    f"{pipeline.schedule} with {pipeline.chunks} chunks, saves {pipeline.save}",
    pipeline.save == "inputs" and pipeline.schedule != "gpipe",
    f"{_CONFIG}; {bubbles(settings)}",
  )  # fmt: skip


def bubble(claim: str, found: float | None, how: str) -> Claim:
  """Returns a row of the share of a step that a stage is idle; None where nothing shows it."""
  return Claim(
    claim, "< 2% of the step", UNKNOWN if found is None else f"{found:.2%}",
    None if found is None else found < 0.02, how,
  )  # fmt: skip


def bubbles(settings: Config) -> str:
  """Returns what plain 1F1B's bubble is, and that of the interleaved form that was chosen, if any.

  Source: Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters Using
  Megatron-LM, 2021, section 2.2.
  """
  waits, chunks = settings.mesh.stage - 1, settings.pipeline.chunks
  of = lambda busy: f"{waits / (busy + waits):.1%}"
  micro_batches = settings.pipeline.micro_batches
  interleaved = f", with {chunks} chunks one of {of(chunks * micro_batches)}" * (chunks > 1)
  return f"plain 1F1B has a bubble of {of(micro_batches)} here{interleaved}"


def total_memory(num_bytes: int, how: str) -> Claim:
  """Returns the row of all that a GPU holds."""
  return Claim(
    "memory per GPU", "4.312 GB", f"{num_bytes / _GIGA:.3f} GB", num_bytes <= 4.312e9, how
  )


def parameter_memory(num_bytes: int, copy_bytes: int | None, how: str) -> Claim:
  """Returns the row of weights: of training master weights, and those that it computes with."""
  of_training = "" if copy_bytes is None else (
    f" master weights, {copy_bytes / _MEGA:.0f} MB in the compute dtype"
  )  # fmt: skip
  return Claim(
    "memory per GPU: parameters", "312 MB", f"{num_bytes / _MEGA:.0f} MB{of_training}",
    num_bytes <= 312e6, how,
  )  # fmt: skip


def other_memory(num_bytes: int, cache: str, how: str) -> Claim:
  """Returns the row of what is not state; `cache` says what of it is, if there is one."""
  return Claim(
    "memory per GPU: activations and buffers", "about 3 GB + 1 GB",
    f"{num_bytes / _GIGA:.3f} GB{cache}", num_bytes <= 4e9, how,
  )  # fmt: skip


def headroom(num_bytes: int, how: str) -> Claim:
  """Returns the row of the memory that is left of the planned chip's."""
  left = 1 - num_bytes / _PLANNED.memory_bytes
  return Claim("memory headroom of 64 GB", "93%", f"{left:.1%}", left >= 0.93, how)


def hidden(
  name: str, all_of_can: Sequence[float | None], tensor_of_can: Sequence[float | None],
  how: str, tensor_how: str,
) -> Iterator[Claim]:  # fmt: skip
  """Yields the rows of how much communication computation hides, of all, and of what can be hidden.

  Args:
    name: of the machine.
    all_of_can: the two shares of all communication.
    tensor_of_can: of what goes along `tensor`.
    how, tensor_how: where they come from.
  """
  for what, asked, found, of in (
    ("communication", 0.92, all_of_can, how),
    ("tensor reductions", 0.95, tensor_of_can, tensor_how),
  ):
    for part, share in zip(("", " of what can be"), found, strict=True):
      yield fraction(f"{what} hidden{part} ({name})", asked, share, of)


def of_exchanges(
  settings: Config, exchanges: Sequence[Exchange], how: str, how_saved: str
) -> Iterator[Claim]:
  """Yields the rows of the exchanges of rows by link, and of what flat ones would send.

  Args:
    settings: the deployment.
    exchanges: of a layer.
    how, how_saved: where their time comes from, and what they do not send.
  """
  for link, asked in _ALL_TO_ALL.items():
    found, holds = all_to_all(exchanges, link)
    how_long = f"the longest exchange of rows, by {how}"
    yield Claim(f"all-to-all, {link} hosts", asked, found, holds, how_long)
  found, holds = saved_between_hosts(settings, exchanges)
  yield Claim(
    "all-to-all traffic between hosts, hierarchical against flat", "-60%", found, holds,
    f"{how_saved}each tensor rank sends its own rows only, in float8 a byte an element",
  )  # fmt: skip


def rates(name: str, tokens_per_ms_per_gpu: float, gpus: int, how: str) -> Iterator[Claim]:
  """Yields the rows of tokens trained, or read and written, by a GPU and by all."""
  rate = tokens_per_ms_per_gpu
  yield Claim(f"tokens/ms/GPU ({name})", "100", f"{rate:.1f}", rate >= 100, how)
  yield Claim(
    f"tokens/ms in all ({name})", "6,300 of 6,400", f"{rate * gpus:,.0f}", rate * gpus >= 6300, how
  )


def binding(
  compute_s: float, seconds_by_link: Mapping[str, float], step_s: float, on: str = ""
) -> str:
  """Returns what binds a step, in one line.

  Args:
    compute_s, seconds_by_link: what is busy for how long in it.
    step_s: of the step.
    on: names the chip.
  """
  terms = {
    "computation": compute_s,
    "link between hosts": seconds_by_link.get(links.BETWEEN, 0.0),
    "link inside hosts": seconds_by_link.get(links.INSIDE, 0.0),
  }
  name = max(terms, key=terms.get)
  return (
    f"{name} binds{on}: {terms[name] * 1e3:.1f} ms of a step of {step_s * 1e3:.1f}, beside "
    + ", ".join(f"{other} {s * 1e3:.1f}" for other, s in terms.items() if other != name)
  )


def timeline(settings: Config, seconds_by_phase: Mapping[str, float], how: str) -> Iterator[Claim]:
  """Yields the rows of a stage's kernels by phase, of a step on the planned hardware."""
  for phase, milliseconds in _TIMELINE.items():
    each = seconds_by_phase.get(phase, 0.0) / settings.pipeline.micro_batches * 1e3
    yield Claim(
      f"timeline: {phase}, per micro-batch", f"{milliseconds} ms", f"{each:.3f} ms of kernels",
      each <= milliseconds,
      f"planned hardware, training (forward, again and backward), {how}",
    )  # fmt: skip


def traffic(bytes_by_link: Mapping[str, float], step_s: float, how: str) -> Iterator[Claim]:
  """Yields the rows of what memory and links carry in a step."""
  per_ms = lambda num_bytes: num_bytes / step_s / _TERA
  yield Claim(
    "traffic: communication", "about 50 GB/ms",
    f"{per_ms(sum(bytes_by_link.values())):.4f} GB/ms a GPU,"
    f" {per_ms(bytes_by_link.get(links.BETWEEN, 0.0)):.4f} between hosts",
    None, how,
  )  # fmt: skip
  yield Claim(
    "traffic: 280 GB/ms in all = 19.4% of 1,440", "19.4%", "wrong by a factor of 1,000", False,
    "1,440 is GB/s, that is 1.44 GB/ms; 280 GB/ms would be 194 times the memory's bandwidth",
  )  # fmt: skip


def prefetched(settings: Config) -> str:
  """Returns which weights of the layers a step begins without, and when they come."""
  mesh, pipeline = settings.mesh, settings.pipeline
  ahead, chunks = pipeline.prefetch_layers, pipeline.chunks
  in_shares = {leaf.phase for leaf in leaves(settings.model) if leaf.is_by_layer(mesh)}
  named = {"attention": "attention's", "experts": "experts'"}
  whose = " and ".join(name for phase, name in named.items() if phase in in_shares)
  if whose and ahead:
    return f"{whose} weights {ahead} layers ahead"
  if whose and segments.units(memory.table(pipeline, mesh.stage))["comes"].any():
    when = " while the pipeline fills" if mesh.stage > 1 else ", each beside the one before"
    return f"{whose} weights of {chunks - 1} of {chunks} chunks{when}"
  return "all weights are there"


def all_to_all(exchanges: Sequence[Exchange], link: str) -> tuple[str, bool | None]:
  """Returns how long the longest all-to-all of rows over a link takes, and whether that is as
  claimed; inside hosts, where rows travel otherwise, how long they take that way.
  """
  rows = _of_rows(exchanges, link)
  longest = lambda kinds: max((each.seconds for each in rows if each.kind in kinds), default=0.0)
  if took_s := longest({"all-to-all"}):
    return f"{took_s * 1e3:.3f} ms each", took_s <= float(_ALL_TO_ALL[link][2]) * 1e-3
  gathered_s = longest({"all-gather", "reduce-scatter"})
  if link == links.BETWEEN or not gathered_s:
    return "there is none", None
  way = "there is none: rows travel there by all-gather and reduce-scatter"
  return f"{way}, {gathered_s * 1e3:.3f} ms each", None


def saved_between_hosts(settings: Config, exchanges: Sequence[Exchange]) -> tuple[str, bool | None]:
  """Returns the share of a flat exchange's bytes between hosts that this exchange does not send,
  and whether it is as large as claimed.
  """
  if not any(each.kind == "all-to-all" for each in _of_rows(exchanges, links.BETWEEN)):
    return "there is none", None
  if settings.moe.exchange == "flat":
    return "-0%", False
  flat = settings.mesh.tensor * settings.model.d_model * DTYPE_BYTES[settings.model.dtype]
  saved = 1 - steps.crossing_row_bytes(settings) / flat
  return f"-{saved:.0%}", saved >= 0.6


def _of_rows(exchanges: Sequence[Exchange], link: str) -> list[Exchange]:
  """Returns the exchanges over a link that carry rows of tokens, and not counts or choices.

  What is put into a reduce-scatter is as often as large as ranks take part, so that it is no
  measure.
  """
  of_layer = [each for each in exchanges if not _PHASES.isdisjoint(each.phase.split("+"))]
  sizes = (each.operand_bytes for each in of_layer if each.kind in ("all-to-all", "all-gather"))
  least = _OF_LARGEST * max(sizes, default=0.0)
  return [each for each in of_layer if each.link == link and each.operand_bytes >= least]


def answer(claim: str, found: str, holds: bool | None, how: str) -> Claim:
  """Returns the row of a claim that is found by no rule that both tables have."""
  return Claim(claim, _ASKED[claim], found, holds, how)


def equal(claim: str, asked, found, how: str) -> Claim:
  """Returns the row of a figure, or of several in a tuple, that holds if it is just as asked."""
  return Claim(claim, _shown(asked), _shown(found), asked == found, how)


def fraction(claim: str, asked: float, found: float | None, how: str) -> Claim:
  """Returns the row of a share that holds if it is as large as asked; None where there is none."""
  return Claim(
    claim, f"{asked:.0%}", "there is none" if found is None else f"{found:.1%}",
    None if found is None else found >= asked, how,
  )  # fmt: skip


def _shown(value) -> str:
  return ", ".join(f"{v:,}" for v in value) if isinstance(value, tuple) else f"{value:,}"
