"""Steps on devices that share cores: what holds for every machine; agreement is a command."""

import dataclasses

import pytest

from moe_jax.pipeline.table import KINDS
from moe_jax.plan import links, memory, units
from tests import runs
from tests.plan import shared_cores

CORES = shared_cores.Cores(1e11, 1e10, 1e10, 1e-5)
UNIT_S = {
  "embed": 0.01, "forward": 0.1, "head": 0.05, "backward": 0.3, "embed_gradient": 0.01,
}  # fmt: skip


def test_the_calibrated_step_is_reproduced():
  settings = runs.settings()
  model = shared_cores.calibrate(settings, CORES, UNIT_S, step_s=3.0)
  assert model.seconds(settings) == pytest.approx(3.0)


def test_a_unit_by_hand():
  """One stage of 8 ranks of `expert`: the embedding's gradient sends nothing."""
  settings = runs.settings(mesh={"expert": 8, "tensor": 1, "stage": 1})
  (step,) = (
    s for s in units.unit(settings, "embed_gradient") if not s.is_communication and s.num_bytes
  )
  found = shared_cores.unit_seconds(settings, CORES)
  assert found["embed_gradient"] == (pytest.approx(8 * step.num_bytes / 1e10), 0.0)
  # A layer's collectives over two or more: of these each device waits for the others once.
  sending = [
    s for s in units.unit(settings, "forward") if s.is_communication and "expert" in s.axes
  ]
  sent = sum(links.bytes_sent(s.kind, s.operand_bytes, 8) for s in sending)
  layers = units.layers_per_unit(settings)
  assert found["forward"].sending_s == pytest.approx(
    8 * layers * (len(sending) * 1e-5 + sent / 1e10)
  )


def test_masked_cells_cost_like_others():
  """Twice the ticks of a stage that is idle in half of them is twice the time."""
  settings = runs.settings(
    mesh={"expert": 1, "tensor": 1, "stage": 4}, pipeline={"micro_batches": 1}
  )
  model = shared_cores.calibrate(settings, CORES, UNIT_S, step_s=1.0)
  table = memory.table(settings.pipeline, 4)
  assert table.ticks_by_kind["forward"] == 4 and table.units_by_kind["forward"] == 1
  # Four ticks of each kind but the head's and the embedding's, which are one.
  seconds = sum(UNIT_S[k] * table.ticks_by_kind[k] for k in KINDS)
  assert seconds == pytest.approx(4 * (0.1 + 0.3) + 0.01 + 0.05 + 0.01)
  # One layer in each unit, so none in a loop: all of what the step takes less is theirs.
  assert model.outside == pytest.approx((1.0 - seconds) / (4 * 0.4))
  assert model.seconds(settings) == pytest.approx(1.0)


def test_layers_outside_of_the_loop():
  """Of four layers of a unit one is outside; of two both, as of one."""
  of = lambda layers: runs.settings(
    model={"layers": layers}, mesh={"expert": 2, "tensor": 2, "stage": 2}
  )
  assert [shared_cores.outside_fraction(of(n)) for n in (2, 4, 8, 16)] == [1, 1, 1 / 4, 1 / 8]
  model = shared_cores.calibrate(of(8), CORES, UNIT_S, step_s=3.0)
  table = memory.table(of(8).pipeline, 2)
  alone = sum(UNIT_S[k] * table.ticks_by_kind[k] for k in KINDS)
  assert model.outside == pytest.approx(4 * (3.0 - alone) / (5 * 0.4))


def test_slower_links_cost_only_what_is_sent():
  settings = runs.settings()
  slow = dataclasses.replace(
    shared_cores.calibrate(settings, CORES, UNIT_S, 3.0), cores=CORES._replace(sent_bytes_per_s=1e9)
  )
  assert slow.seconds(settings) > 3.0
  alone = runs.settings(mesh={"expert": 1, "tensor": 1, "stage": 1})
  fast = dataclasses.replace(slow, cores=CORES)
  assert slow.seconds(alone) == fast.seconds(alone)


def test_a_unit_shorter_than_its_collectives_is_refused():
  with pytest.raises(ValueError, match=r"unit forward took .* its collectives alone .* measure"):
    shared_cores.calibrate(runs.settings(), CORES, UNIT_S | {"forward": 1e-6}, step_s=3.0)
