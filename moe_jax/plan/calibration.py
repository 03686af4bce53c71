"""What a machine reached in one run or rehearsal, over what its tables promise: factors on time.

Made from one report, applied to every plan. Knows phases, links and chips; must not know how time
was measured.
"""

from collections.abc import Mapping
from typing import NamedTuple

from moe_jax.plan.hardware import CHIPS, Chip

# What the launch of a kernel keeps its stream idle before it, from a CUDA graph, as XLA launches
# them. Source: Alan Gray, Getting Started with CUDA Graphs, NVIDIA developer blog, 2019: kernels of
# 2.9 us take 3.4 us each.
LAUNCH_S = 0.5e-6
# TensorFloat-32, which XLA takes for float32 products that need not be exact, runs at half of
# bfloat16 on every chip of ours. Source: their tables, as in plan.hardware.
_TF32_OF_BFLOAT16 = 0.5


class Calibration(NamedTuple):
  """Factors on the seconds of the tables.

  Attributes:
    compute: by phase, as sorted pairs; of other phases `everything_else`.
    everything_else: of computation.
    inside, between: of collectives by link.
    launch_s: of one kernel.
    source: where they come from.
  """

  compute: tuple[tuple[str, float], ...] = ()
  everything_else: float = 1.0
  inside: float = 1.0
  between: float = 1.0
  launch_s: float = LAUNCH_S
  source: str = "vendors' tables"

  def compute_factor(self, phase: str) -> float:
    """Returns the factor on a kernel of `phase`."""
    return dict(self.compute).get(phase, self.everything_else)

  def link_factor(self, link: str) -> float:
    """Returns the factor on a collective over `link`."""
    return {"inside": self.inside, "between": self.between}[link]

  def flops_per_s(self, chip: Chip, dtype: str, is_exact: bool) -> float:
    """Returns the rate of matrix products; float32 ones run as TensorFloat-32 unless exact.

    A chip that names bfloat16 only (the reference plan) takes H100's ratio for exact float32.
    """
    if dtype == "bfloat16" and not is_exact:
      return chip.flops_per_s("bfloat16")
    if not is_exact:
      return chip.flops_per_s("bfloat16") * _TF32_OF_BFLOAT16
    if "float32" in chip.peak_flops_per_s:
      return chip.flops_per_s("float32")
    peaks = CHIPS["h100"].peak_flops_per_s
    return chip.flops_per_s("bfloat16") * peaks["float32"] / peaks["bfloat16"]


NONE = Calibration()
# What `fit` asks for, by phase and by link.
FITTED = ("compute_s_by_phase", "seconds_by_link")


def fit(
  predicted: Mapping[str, Mapping[str, float]],
  found: Mapping[str, Mapping[str, float]],
  source: str,
) -> Calibration:
  """Returns the factors that turn what was predicted into what was found.

  Args:
    predicted: what FITTED names, uncalibrated.
    found: the same of a run or rehearsal, and `everything else`'s phases among the first.
    source: what `found` comes from.

  Raises:
    ValueError: the two share no phase.
  """
  both = [p for p, s in predicted["compute_s_by_phase"].items() if s and
          found["compute_s_by_phase"].get(p)]  # fmt: skip
  if not both:
    raise ValueError(
      f"{source} and the plan share no phase: {', '.join(found['compute_s_by_phase'])} against"
      f" {', '.join(predicted['compute_s_by_phase'])}; calibrate with a report of this program"
    )
  total = lambda part: sum(part["compute_s_by_phase"].values())
  ratio = lambda link: (
    found["seconds_by_link"].get(link, 0.0) / predicted["seconds_by_link"][link]
    if predicted["seconds_by_link"].get(link) and found["seconds_by_link"].get(link)
    else 1.0
  )
  return Calibration(
    compute=tuple(
      sorted((p, found["compute_s_by_phase"][p] / predicted["compute_s_by_phase"][p]) for p in both)
    ),
    everything_else=total(found) / total(predicted),
    inside=ratio("inside"),
    between=ratio("between"),
    source=source,
  )
