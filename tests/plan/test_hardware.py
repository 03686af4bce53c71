"""Chips: the figures that DESIGN.md reckons with, and what holds for every chip."""

import pytest

from moe_jax import config
from moe_jax.plan.hardware import CHIPS, cluster


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_every_chip_is_ordered_as_hardware_is(chip):
  assert CHIPS[chip.name] is chip
  assert chip.source
  assert "bfloat16" in chip.peak_flops_per_s
  assert set(chip.peak_flops_per_s) <= set(config.DTYPES)
  assert chip.peak_flops_per_s["bfloat16"] == max(chip.peak_flops_per_s.values())
  assert chip.memory_bytes_per_s > chip.inside_bytes_per_s > chip.between_bytes_per_s
  for each in (*chip.protocols.ring, *chip.protocols.tree):
    assert 0 < each.inside_s < each.between_s <= each.alone_s and 0 < each.fraction <= 1
  assert 0 < chip.compute_fraction <= 1 and 0 < chip.memory_fraction <= 1


def test_the_planned_hardware_is_what_the_plan_counts_on():
  planned = CHIPS["planned"]
  assert planned.flops_per_s("bfloat16") == pytest.approx(240e12)
  assert planned.memory_fraction * planned.memory_bytes_per_s == pytest.approx(1.44e12)
  assert planned.memory_bytes == 64e9


def test_between_hosts_h100_has_what_the_design_reckons_with():
  assert CHIPS["h100"].between_bytes_per_s == 50e9


def test_a_dtype_without_a_figure_is_refused():
  with pytest.raises(ValueError, match=r"planned has no peak for dtype 'float32'; .* bfloat16"):
    CHIPS["planned"].flops_per_s("float32")


def test_a_cluster_is_named_as_users_type_it():
  found = cluster("h100:16x4")
  assert (found.num_gpus, found.name, found.chip) == (64, "h100:16x4", CHIPS["h100"])
  assert found.of(2).name == "h100:1x2"
  assert found.of(32).name == "h100:8x4"
  # Whole hosts, which may have more GPUs than were asked for.
  assert cluster("h100:5x6").of(8).name == "h100:2x6"


@pytest.mark.parametrize(
  "text, message",
  [
    ("h100", "is not CHIP:HOSTSxGPUS; write it as h100:16x4"),
    ("h10:16x4", "chip 'h10' is not known; did you mean h100?"),
    ("tpu:16x4", "chip 'tpu' is not known; choose from a100, h100"),
    ("h100:0x4", "has no GPU; give at least one host and one GPU"),
  ],
)
def test_a_wrong_cluster_is_refused(text, message):
  with pytest.raises(ValueError, match=message.replace("?", r"\?")):
    cluster(text)
