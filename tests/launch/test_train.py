"""The program that a user starts, as a process: what it leaves, killed, stopped, and bad input."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests import runs


def command(workdir, *flags, devices=8):
  return [
    sys.executable, "-W", "error", "-m", "launch.train", f"--config={runs.TINY}",
    f"--config.data.paths={runs.TEXT}", f"--virtual_devices={devices}", f"--workdir={workdir}",
    *flags,
  ]  # fmt: skip


def finish(*arguments, **keywords):
  return subprocess.run(
    command(*arguments, **keywords), cwd=runs.ROOT, capture_output=True, text=True, timeout=300
  )


@pytest.fixture
def start():
  processes = []

  def start(*arguments):
    process = subprocess.Popen(
      command(*arguments), cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    processes.append(process)
    return process

  yield start
  for process in processes:
    process.kill()
    process.communicate()


def wait_for_steps(process, workdir, step):
  """Returns once the metrics file holds `step`."""
  deadline_s = time.monotonic() + 240
  while not any(row["step"] >= step for row in runs.rows(workdir)):
    assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < deadline_s, f"step {step} took more than four minutes"
    time.sleep(0.02)


@pytest.mark.slow
def test_killed_it_goes_on_from_the_last_save_and_sigterm_saves(tmp_path, start):
  workdir = tmp_path / "run"
  flags = ("--config.train.steps=100000", "--config.train.checkpoint_every=5")
  killed = start(workdir, *flags)
  wait_for_steps(killed, workdir, 12)
  killed.send_signal(signal.SIGKILL)
  killed.wait()
  before = runs.rows(workdir)

  resumed = start(workdir, *flags)
  time.sleep(1)  # the old file is still there
  wait_for_steps(resumed, workdir, before[-1]["step"] + 2)
  resumed.send_signal(signal.SIGTERM)
  out, errors = resumed.communicate(timeout=120)
  assert (resumed.returncode, errors) == (0, "")
  first = int(out.partition("resumed after step ")[2].split()[0])
  # The save of the last multiple of 5 may have been under way.
  assert first % 5 == 0
  assert len(before) - 10 <= first <= len(before)
  after = runs.rows(workdir)
  assert [row["step"] for row in after] == list(range(len(after)))
  # What was computed twice, in two processes, is the same to the last bit.
  losses = lambda rows: [row["loss"] for row in rows[: len(before)]]
  assert losses(after) == losses(before)
  assert f"stopped and saved after step {len(after)} of 100000" in out
  saved = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
  assert saved[-1] == len(after)


@pytest.mark.slow
def test_a_whole_run_ends_with_a_sample_and_ctrl_c_stops_it_before(tmp_path, start):
  workdir = tmp_path / "run"
  flags = ("--config.train.steps=40", "--profile_steps=1:3")
  stopped = start(workdir, *flags)
  wait_for_steps(stopped, workdir, 4)
  stopped.send_signal(signal.SIGINT)
  out, errors = stopped.communicate(timeout=120)
  assert (stopped.returncode, errors) == (130, "")
  assert "stopped and saved after step" in out
  assert list((workdir / "profile").rglob("*.xplane.pb"))
  assert not (workdir / "summary.json").exists()

  done = finish(workdir, *flags)
  assert (done.returncode, done.stderr) == (0, "")
  assert "held-out loss" in done.stdout and "bigram" in done.stdout
  sample = (workdir / "sample.txt").read_text()
  assert sample and done.stdout.rstrip("\n").endswith(sample[4:].rstrip("\n"))
  names = {path.name for path in workdir.iterdir()}
  assert names >= {
    "config.json", "metrics.jsonl", "summary.json", "loss.png", "sample.txt", "checkpoints",
    "tensorboard", "profile",
  }  # fmt: skip


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--profile_steps=3"], "profile_steps='3' is not start:stop"),
    (["--coordinator=localhost:1"], "--num_processes and --process_id missing"),
    (["--config.mesh.stage=1"], "needs 4 devices, found 8; choose mesh.expert=4"),
    (["--config.data.paths=no/such.txt"], "no/such.txt matches no file"),
    (["--confg=x"], "did you mean --config?"),
  ],
)
def test_bad_input_takes_one_line_and_leaves_no_folder(tmp_path, flags, message):
  done = finish(tmp_path / "run", *flags)
  assert done.returncode == 2
  assert message in done.stderr
  assert done.stderr.count("\n") == 1
  assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
  (tmp_path / "run").write_text("mine")
  done = finish(tmp_path / "run")
  assert done.returncode == 2
  assert f"--workdir={tmp_path / 'run'} is a file" in done.stderr
  assert done.stderr.count("\n") == 1
  assert (tmp_path / "run").read_text() == "mine"


def test_a_workdir_without_a_name_is_refused():
  done = finish("", "--config.data.paths=no/such.txt")
  assert done.returncode == 2
  assert done.stderr == "error: --workdir=: it is empty; name a folder\n"


def test_the_distributed_flags_are_checked(tmp_path):
  for flags, message in (
    (["--coordinator=here", "--num_processes=2", "--process_id=0"], "--coordinator=here is not"),
    (["--coordinator=h:1", "--num_processes=2", "--process_id=2"], "--process_id=2 is not below"),
    (["--distributed=off", "--process_id=0"], "--distributed=off contradicts --process_id"),
  ):
    done = finish(tmp_path / "run", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_a_workdir_it_says_so():
  done = subprocess.run(
    [sys.executable, "-m", "launch.train", f"--config={runs.TINY}"],
    cwd=runs.ROOT, env=os.environ, capture_output=True, text=True, timeout=60,
  )  # fmt: skip
  assert done.returncode == 2
  assert "--workdir is missing" in done.stderr
