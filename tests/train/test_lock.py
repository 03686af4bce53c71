import errno
import fcntl
import signal
import subprocess
import sys

import pytest

from moe_jax.train import lock
from tests import runs

HOLD = """
import sys, time, pathlib
from moe_jax.train import lock
with lock.held(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(600)
"""


def is_refused(folder) -> bool:
  try:
    with lock.held(folder):
      return False
  except ValueError as error:
    assert str(error) == f"another run writes to {folder}; stop it, or name another --workdir"
    return True


def test_one_at_a_time_holds_a_folder_and_leaves_no_trace(tmp_path):
  folder = tmp_path / "runs" / "run"
  with lock.held(folder):
    assert is_refused(folder)
    assert is_refused(folder)
    (folder / "written").touch()
  assert [path.name for path in folder.iterdir()] == ["written"]
  assert not is_refused(folder)


def test_a_folder_in_which_nothing_was_written_is_taken_away_again(tmp_path):
  with pytest.raises(KeyError), lock.held(tmp_path / "runs" / "run"):
    raise KeyError
  assert list(tmp_path.iterdir()) == []
  (tmp_path / "mine").mkdir()
  with lock.held(tmp_path / "mine"):
    pass
  assert list((tmp_path / "mine").iterdir()) == []


def test_the_lock_ends_with_a_process_that_is_killed(tmp_path):
  command = [sys.executable, "-c", HOLD, str(tmp_path)]
  with subprocess.Popen(command, cwd=runs.ROOT, stdout=subprocess.PIPE) as process:
    process.stdout.readline()
    assert is_refused(tmp_path)
    process.send_signal(signal.SIGKILL)
  assert (tmp_path / ".lock").exists()
  assert not is_refused(tmp_path)


def test_a_file_that_its_holder_takes_away_meanwhile_is_no_lock(tmp_path, monkeypatch):
  flock, calls = fcntl.flock, []

  def late(file, flags):
    if not calls:
      (tmp_path / ".lock").unlink()
    calls.append(flags)
    flock(file, flags)

  monkeypatch.setattr(fcntl, "flock", late)
  with lock.held(tmp_path):
    assert len(calls) == 2
    assert is_refused(tmp_path)


def test_where_files_cannot_be_locked_a_run_goes_on_without(tmp_path, monkeypatch):
  def refuse(file, flags):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", refuse)
  with lock.held(tmp_path), lock.held(tmp_path):
    pass
  assert list(tmp_path.iterdir()) == []
