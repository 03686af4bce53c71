"""Two processes with four devices each train as one with eight, and stop together."""

import io
import signal
import subprocess
import time

import jax
import pytest

from moe_jax.train import loop
from tests import runs
from tests.launch.test_train import command

NUM_STEPS = 6


@pytest.fixture
def pair(tmp_path):
  """Two processes of a run that would take hours."""
  address = f"--coordinator=localhost:{runs.free_port()}"
  flags = (address, "--num_processes=2", "--config.train.steps=100000")
  processes = [
    subprocess.Popen(
      command(tmp_path / "pair", *flags, f"--process_id={i}", devices=4),
      cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for i in range(2)
  ]  # fmt: skip
  yield processes
  for process in processes:
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_two_processes_train_as_one_and_a_signal_to_one_stops_and_saves_both(tmp_path, pair):
  deadline_s = time.monotonic() + 300
  while len(runs.rows(tmp_path / "pair")) < NUM_STEPS:
    assert [process.poll() for process in pair] == [None, None], pair[0].stderr.read()
    assert time.monotonic() < deadline_s, "six steps took five minutes"
    time.sleep(0.05)
  pair[1].send_signal(signal.SIGTERM)
  outs = [process.communicate(timeout=120) for process in pair]
  assert [process.returncode for process in pair] == [0, 0], outs
  assert "stopped and saved after step" in outs[0][0]
  # Process 0 speaks for all. The other prints what gloo's threads do, into each other's lines.
  for ours in ("bytes to train on", "compiled in", "stopped and saved"):
    assert ours in outs[0][0]
    assert ours not in outs[1][0]

  together = runs.rows(tmp_path / "pair")
  saved = max(int(path.name) for path in (tmp_path / "pair" / "checkpoints").iterdir())
  assert saved == len(together)
  calls = []
  stop = lambda: calls.append(1) or len(calls) == NUM_STEPS
  settings = runs.settings(train={"steps": 100_000})
  with jax.numpy_dtype_promotion("standard"):
    loop.train(settings, tmp_path / "alone", stop=stop, stream=io.StringIO())
    alone = runs.rows(tmp_path / "alone")
    losses = lambda rows: [row["loss"] for row in rows[:NUM_STEPS]]
    assert losses(together) == pytest.approx(losses(alone), rel=1e-6)
    loads = lambda rows: [row["load_max_over_mean"] for row in rows[:NUM_STEPS]]
    assert loads(together) == loads(alone)

    # One process evaluates what two have saved.
    finished = runs.settings(train={"steps": saved})
    outcome = loop.train(finished, tmp_path / "pair", stream=io.StringIO())
  assert outcome.step == saved
  assert outcome.eval_loss < alone[0]["loss"]
