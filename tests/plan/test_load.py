"""Loads and calibrations: by hand, and what is wrong with them in one line."""

import json

import numpy as np
import pytest

from moe_jax.plan import calibration, load, machine, simulate
from moe_jax.plan.hardware import CHIPS, cluster
from tests import runs

DROPLESS = runs.settings(moe={"dispatch": "dropless", "capacity_factor": 1.25})


def test_zipf_by_hand():
  """Of 8 experts a token draws 2: the i-th first, or another first and the i-th of the rest."""
  weight_E = [1 / i for i in range(1, 9)]
  total = sum(weight_E)
  chosen_E = [
    w / total + sum(v / total * w / (total - v) for v in weight_E if v != w) for w in weight_E
  ]
  found = load.zipf(DROPLESS, 1.0)
  assert found.share_LE == pytest.approx(np.array([chosen_E] * 4) / 2, rel=1e-6)
  # The first four, on the first of 2 ranks, are 0.727 of the choices: 1.45 times the even share,
  # where a round takes 1.25 times: two rounds.
  assert found.max_over_mean == pytest.approx(sum(chosen_E[:4]), rel=1e-6)
  assert (found.rounds_L == 2).all()
  assert found.dropped_fraction == 0


def test_draws():
  weight_E = np.array([4.0, 2.0, 1.0, 1e-3])
  assert load.drawn(weight_E, 1) == pytest.approx(weight_E / weight_E.sum(), rel=1e-6)
  assert load.drawn(weight_E, 3).sum() == pytest.approx(3)
  assert load.drawn(weight_E, 4).tolist() == [1] * 4
  # However popular, an expert is chosen at most once a token.
  assert load.zipf(DROPLESS, 4.0).share_LE.max() < 0.5


def test_blocks_of_rows_by_hand():
  """A source has 32 tokens, so 64 assignments, and there are 4; blocks have 64 rows, and a round
  takes 1.25 x 32 = 40 rows from a source to a rank. Even, an expert's 4 x 8 rows are a block.

  One expert with half of all and 7 with a 14th: 32 + 3 x 4.57 = 45.7 rows to the first rank. Its
  first round: 128 rows of the first expert, 18.3 of the second, 13.7 of the third, in 2 + 1 + 1
  blocks; the second: 4.6 of the third and 18.3 of the fourth, in 1 + 1.
  """
  found = load.of(DROPLESS, np.array([[7.0] + [1.0] * 7] * 4))
  assert (found.rounds_L == 2).all()
  assert found.computed_LX.tolist() == [[6 / 4, 1]] * 4
  assert found.first_LX.tolist() == [[1, 1]] * 4


def test_even_is_even():
  found = load.zipf(DROPLESS, 0.0)
  assert found.max_over_mean == 1 and (found.rounds_L == 1).all()


def test_a_capacity_dispatch_drops_what_has_no_room():
  """Half of all tokens to one of 8 experts, which has room for 4 x 1/8: none is dropped; with room
  for 1/8 three eighths are."""
  counts = np.array([[7.0] + [1.0] * 7] * 4)
  assert load.of(runs.settings(), counts).dropped_fraction == 0
  tight = runs.settings(moe={"capacity_factor": 1.0})
  assert load.of(tight, counts).dropped_fraction == pytest.approx(3 / 8)


def test_a_recorded_trace(tmp_path):
  path = tmp_path / "trace.json"
  counts = np.random.default_rng(0).integers(1, 100, (4, 8))
  path.write_text(json.dumps({"counts_LE": counts.tolist()}))
  found = load.trace(DROPLESS, str(path))
  assert found.share_LE == pytest.approx(counts / counts.sum(1, keepdims=True))


@pytest.mark.parametrize(
  "content, message",
  [
    ("{", "is not a trace"),
    ("{}", "is not a trace"),
    ('{"counts_LE": [[1, 2]]}', r"has shape \(1, 2\), the model has \(4, 8\)"),
    (json.dumps({"counts_LE": [[0] * 8] * 4}), "above 0 in every layer"),
    (json.dumps({"counts_LE": [[-1] + [1] * 7] * 4}), "must be 0 or more"),
    (json.dumps({"counts_LE": [[float("inf")] + [1] * 7] * 4}), "must be 0 or more and finite"),
    (json.dumps({"counts_LE": [[float("nan")] + [1] * 7] * 4}), "must be 0 or more and finite"),
  ],
)
def test_a_wrong_trace_is_refused(tmp_path, content, message):
  path = tmp_path / "trace.json"
  path.write_text(content)
  with pytest.raises(ValueError, match=message):
    load.trace(DROPLESS, str(path))


@pytest.mark.parametrize("exponent", [-1.0, float("nan"), float("inf")])
def test_a_wrong_exponent_is_refused(exponent):
  with pytest.raises(ValueError, match="is not a number from 0 up"):
    load.zipf(DROPLESS, exponent)


def test_an_exponent_that_leaves_an_expert_nothing_is_refused():
  """The last of 8 has 8 ** -110 of the first one's weight, which is 1e-99."""
  assert load.zipf(DROPLESS, 110.0).share_LE[0, :2] == pytest.approx([0.5, 0.5], rel=1e-4)
  for exponent in (112.0, 300.0, 1e300):
    with pytest.raises(ValueError, match=r"the last of 8 experts next to nothing; .* at most 110,"):
      load.zipf(DROPLESS, exponent)
  alone = runs.settings(model={"experts": 1, "experts_per_token": 1}, mesh={"expert": 1})
  assert load.zipf(alone, 1e300).share_LE.tolist() == [[1.0]] * 4


def test_a_calibration_makes_the_prediction_what_was_found():
  on = machine.Machine(cluster("h100:2x4"))
  predicted = simulate.train(DROPLESS, on)
  found = {
    "compute_s_by_phase": {p: 3 * s for p, s in predicted.compute_s_by_phase.items()},
    "seconds_by_link": {link: 2 * s for link, s in predicted.seconds_by_link.items()},
  }
  fitted = calibration.fit(predicted._asdict(), found, "a test")
  again = simulate.train(DROPLESS, on._replace(calibration=fitted))
  assert again.compute_s == pytest.approx(3 * predicted.compute_s)
  assert sum(again.seconds_by_link.values()) == pytest.approx(
    2 * sum(predicted.seconds_by_link.values())
  )


def test_calibrations_that_fit_nothing_are_refused():
  on = simulate.train(DROPLESS, machine.Machine(cluster("h100:2x4")))._asdict()
  other = {"compute_s_by_phase": {"convolution": 1.0}, "seconds_by_link": {}}
  with pytest.raises(ValueError, match="a test and the plan share no phase: convolution against"):
    calibration.fit(on, other, "a test")


def test_rates_of_float32():
  chip = CHIPS["h100"]
  rate = calibration.NONE.flops_per_s
  assert rate(chip, "bfloat16", False) == chip.flops_per_s("bfloat16")
  assert rate(chip, "float32", False) == chip.flops_per_s("bfloat16") / 2  # TensorFloat-32
  assert rate(chip, "bfloat16", True) == rate(chip, "float32", True) == chip.flops_per_s("float32")
  planned = CHIPS["planned"]
  assert rate(planned, "float32", True) == pytest.approx(240e12 * 66.9 / 989.4)
