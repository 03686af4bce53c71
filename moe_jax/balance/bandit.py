"""Which balancing policy a run uses, from the step times that it measures.

One policy is the baseline, doing nothing. Another is tried at once where it is expected to beat
what is known; else only on credit, a small share of the run's time that all trials have in common.
So a run in which nothing pays loses that share, and one in which something does comes near the
best. Knows names and seconds; must not know what a policy does.
"""

from collections.abc import Mapping

_FORGET = 0.9  # of an average with each further step
_MOST_WORSE = 1.5  # a trial's step this far above the best policy's ends the trial
_PATIENCE, _RAREST = 8, 4  # trials of a policy grow rarer by this factor, so often


class Bandit:
  """Chooses a policy for each step.

  Where step times keep their means, trials that no expectation led to lose at most `slack` of the
  run's time against the best policy known at the time, and one trial.
  """

  def __init__(
    self,
    expected_s: Mapping[str, float],
    baseline: str = "none",
    *,
    slack: float = 0.005,
    trial_steps: int = 3,
  ):
    """Begins without a measurement.

    Args:
      expected_s: seconds of a step by policy, as a cost model says; only their order and ratios to
        the baseline's matter, and only until they are measured.
      baseline: the policy that others are held against.
      slack: share of the run's time that trials may lose against the best policy known.
      trial_steps: of a trial, and of the baseline to begin with.

    Raises:
      ValueError: the baseline is not among the policies.
    """
    if baseline not in expected_s:
      raise ValueError(
        f"baseline={baseline!r} is not one of {', '.join(expected_s)}; choose one of them"
      )
    self._expected = {name: seconds / expected_s[baseline] for name, seconds in expected_s.items()}
    self._baseline, self._slack, self._trial_steps = baseline, slack, trial_steps
    self._mean_s: dict[str, float] = {}
    self._steps = dict.fromkeys(expected_s, 0)
    self._last_tried = dict.fromkeys(expected_s, 0)
    self._num_trials = dict.fromkeys(expected_s, 0)
    self._num_done, self._spent_s, self._lost_s = 0, 0.0, 0.0
    self._trial: list[str] = [baseline] * trial_steps

  def choose(self) -> str:
    """Returns the policy of the next step."""
    if not self._trial:
      due = self._due()
      if due is not None:
        self._trial = [due] * self._trial_steps
        self._num_trials[due] += 1
    return self._trial[0] if self._trial else self.best

  @property
  def best(self) -> str:
    """The policy with the least measured time; the baseline where none was measured."""
    return min(self._mean_s, key=self._mean_s.get, default=self._baseline)

  def observe(self, name: str, step_s: float) -> None:
    """Takes note of the time of a step under a policy."""
    old = self._mean_s.get(name)
    # A plain mean at first: one slow step must not speak for a policy.
    keep = min(_FORGET, self._steps[name] / (self._steps[name] + 1))
    self._mean_s[name] = step_s if old is None else keep * old + (1 - keep) * step_s
    self._steps[name] += 1
    self._num_done += 1
    self._spent_s += step_s
    self._last_tried[name] = self._num_done
    if self._trial and self._trial[0] == name:
      self._trial.pop(0)
      best_s = min(self._mean_s.values())
      self._lost_s += max(step_s - best_s, 0.0)
      if step_s > _MOST_WORSE * best_s:
        self._trial = []

  def _due(self) -> str | None:
    """Returns a policy to try now: the most promising of those that credit allows."""
    base_s, best_s = self._mean_s[self._baseline], self._mean_s[self.best]
    credit_s = self._slack * self._spent_s - self._lost_s
    found = []
    for name, ratio in self._expected.items():
      is_known = self._steps[name] > 0
      guess_s = self._mean_s.get(name, ratio * base_s)
      # What is known is looked at again, ever more rarely, for loads drift.
      waits = self._trial_steps * _PATIENCE ** min(self._num_trials[name], _RAREST)
      if name == self.best or (is_known and self._num_done - self._last_tried[name] < waits):
        continue
      if (not is_known and guess_s < best_s) or (
        self._trial_steps * (guess_s - best_s) <= credit_s
      ):
        found.append((guess_s, name))
    return min(found)[1] if found else None
