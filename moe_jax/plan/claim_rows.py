"""What the table of claims before anything is compiled shares with that of a compiled program.

The row, and rows of exchanges, bubbles and shares by one rule for both. Knows the reference plan's
figures; must not know where found ones come from.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moe_jax.config import Config
from moe_jax.plan import links, steps
from moe_jax.plan.leaves import DTYPE_BYTES

PREFETCH = (
  "experts' weights are resident, and routing is not known ahead; attention's are gathered while an"
  " interleaved pipeline fills, or layer by layer with pipeline.prefetch_layers"
)

# The plan's figures of exchanges by link, and which messages are of rows: those that hold this
# share of the largest one's bytes.
ALL_TO_ALL: Mapping[str, str] = {links.INSIDE: "1-2 ms", links.BETWEEN: "2-4 ms"}
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


def all_to_all(exchanges: Sequence[Exchange], link: str) -> tuple[str, bool | None]:
  """Returns how long the longest all-to-all of rows over a link takes, and whether that is as
  claimed; inside hosts, where rows travel otherwise, how long they take that way.
  """
  rows = _of_rows(exchanges, link)
  longest = lambda kinds: max((each.seconds for each in rows if each.kind in kinds), default=0.0)
  if took_s := longest({"all-to-all"}):
    return f"{took_s * 1e3:.3f} ms each", took_s <= float(ALL_TO_ALL[link][2]) * 1e-3
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
