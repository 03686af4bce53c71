"""The harness of executed step times: what was measured before it was stopped is not lost."""

import json
import pathlib

import pytest

from moe_jax.pipeline.table import KINDS
from tests.plan import agreement
from tests.plan.shared_cores import Cores, Model

MODEL = Model(Cores(1e11, 1e10, 1e9, 1e-5), dict.fromkeys(KINDS, 1.0), 0.1)


class Stopped(Exception):
  pass


@pytest.fixture
def harness(monkeypatch):
  """Returns the names that were measured; nothing runs, and every case takes what is predicted."""
  names = []

  class Program:
    def __init__(self, settings):
      pass

    def train(self):
      pass

    def calibrate(self, settings, rounds):
      names.append("calibration")
      return MODEL, 2.0

  def measured(name, reference, rounds):
    if len(names) == 4:
      raise Stopped
    names.append(name)
    return MODEL.seconds(agreement.settings_of(agreement.CASES[name])) / 2.0

  monkeypatch.setattr(agreement, "Program", Program)
  monkeypatch.setattr(agreement, "_measured", measured)
  return names


def test_a_stopped_run_goes_on_with_the_other_cases(harness, tmp_path):
  path = str(tmp_path / "times.json")
  with pytest.raises(Stopped):
    agreement.times(1, [], path)
  assert len(harness) == 4 and len(json.loads(pathlib.Path(path).read_text())["measured"]) == 3
  before = harness.copy()
  harness.clear()
  first = [name for name in agreement.CASES if name != agreement.CALIBRATED]
  assert agreement.times(1, first[3:6], path)  # three at most, and none of those before
  assert harness == first[3:6] and before == ["calibration", *first[:3]]


def test_ranks_and_errors(capsys):
  measured = {"a": 1.0, "b": 2.0, "c": 4.0}
  assert agreement.summary(measured, {"a": 1.1, "b": 2.0, "c": 5.0}) == (1.0, pytest.approx(0.1))
  assert agreement.spearman([1, 2, 3], [3, 2, 1]) == -1.0
  assert "largest 25.0%" in capsys.readouterr().out
