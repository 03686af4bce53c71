"""Latencies of a phase: by hand, and of a real trace."""

import numpy as np
import pytest

from moe_jax.observe import stretches, trace
from tests.observe.test_trace import NUM_STEPS, folder, phase_seconds

assert folder  # the fixture: two profiled steps of a model on two devices
NUM_LAYERS = 3  # of that model


def event(phase, start, stop, device=0):
  scope = f"jit(step)/{phase}/dot" if phase else "jit(step)/dot"
  return trace.Event("fusion", scope, "jit_step(1)", "1", device, start, stop - start)


def test_a_stretch_ends_where_another_phase_begins():
  events = [
    event("experts", 0.0, 1.0),
    event("experts", 0.5, 0.75),  # within the first
    event(None, 1.0, 5.0),  # of no phase
    event("experts", 5.0, 6.0),
    event("experts", 5.5, 6.5),  # half of it beside the one before
    event("attention", 6.0, 7.0, device=1),  # elsewhere
    event("experts", 6.5, 7.0, device=1),
    event("combine", 7.0, 8.0),
    event("experts", 8.0, 8.25),
  ]
  found = stretches.of_events(events, "experts")
  assert list(found) == [0, 1]
  np.testing.assert_allclose(found[0], [2.5, 0.25])
  np.testing.assert_allclose(found[1], [0.5])


def test_a_trace_has_a_stretch_for_every_pass_of_a_layer(folder):
  events = trace.read_events(folder)
  found = stretches.of_events(events, "experts")
  total = phase_seconds(folder)["experts"]
  assert set(found) == {0, 1}
  for device, seconds in found.items():
    # Forward, computed again, and backward; the last two may follow each other at once.
    assert len(seconds) >= 2 * NUM_LAYERS * NUM_STEPS
    assert (seconds >= 0).all()
    np.testing.assert_allclose(seconds.sum(), total[device], rtol=1e-6)


def test_percentiles_are_latencies_that_occurred():
  assert stretches.percentiles(np.arange(1.0, 101.0)) == [50, 90, 99]


@pytest.mark.parametrize("longest", [0.0, 1e-3, 7.3])
def test_histograms_hold_every_stretch(longest):
  random = np.random.default_rng(0)
  given = {0: random.uniform(0, longest, 50), 3: np.array([0.0, longest])}
  edges_s, counts = stretches.histogram(given, 10)
  assert (np.diff(edges_s) > 0).all()
  assert {device: count.sum() for device, count in counts.items()} == {0: 50, 3: 2}


@pytest.mark.parametrize(
  ("phase", "said"), [("expert", "phase='expert' is not one of embed"), ("head", "nothing of")]
)
def test_a_phase_that_is_not_there_is_named(phase, said):
  with pytest.raises(ValueError, match=said):
    stretches.of_events([event("experts", 0, 1)], phase)
