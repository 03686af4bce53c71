"""What SIGTERM, Ctrl-C and a lost terminal do to a process, seen from outside."""

import os
import pathlib
import pty
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Deaf to Python's handlers, as while waiting for a device: hashing this lets go of the
# interpreter's lock for seconds, in one bytecode.
DEAF = "hashlib.pbkdf2_hmac('sha256', b'', b'', 200_000_000)"
PATIENT = "while not stopping.is_asked(): time.sleep(0.01)"
PROGRAM = """
import hashlib, signal, sys, time
from launch.stopping import Stopping
{before}
with Stopping() as stopping:
  print("ready", flush=True)
  {wait}
sys.exit(stopping.exit_code)
"""


@pytest.fixture
def start():
  processes = []

  def start(wait, hang_up="signal.SIG_DFL"):
    # Whatever pytest was started with: under nohup it is ignored, and so by its children.
    before = f"signal.signal(signal.SIGHUP, {hang_up})"
    process = subprocess.Popen(
      [sys.executable, "-W", "error", "-c", PROGRAM.format(wait=wait, before=before)],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    processes.append(process)
    assert process.stdout.readline() == "ready\n"
    return process

  yield start
  for process in processes:
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 0)]
)
def test_one_signal_is_heard_and_the_process_ends_by_itself(start, number, code):
  process = start(PATIENT)
  process.send_signal(number)
  _, errors = process.communicate(timeout=60)
  assert (process.returncode, errors) == (code, "")


def test_a_second_ctrl_c_ends_at_once_whatever_the_process_waits_for(start):
  process = start(DEAF)
  process.send_signal(signal.SIGINT)
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(timeout=1)
  process.send_signal(signal.SIGINT)
  assert process.wait(timeout=10) == 130


def test_sigterm_however_often_lets_the_process_save(start):
  process = start(DEAF)
  for _ in range(3):
    process.send_signal(signal.SIGTERM)
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(timeout=1)


def test_after_sigterm_it_takes_two_ctrl_c_to_end_unsaved(start):
  process = start(DEAF)
  for number in (signal.SIGTERM, signal.SIGINT):
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
      process.wait(timeout=1)
  process.send_signal(signal.SIGINT)
  assert process.wait(timeout=10) == 130


def test_a_run_outlives_its_terminal_and_ends_by_itself(tmp_path):
  # The session's first open terminal is its own, whose end it is told by SIGHUP.
  program = (
    "import os, signal, sys, time\nos.close(os.open(os.ttyname(0), os.O_RDWR))\n"
    "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    "from launch.stopping import Stopping\n"
    "with Stopping() as stopping:\n"
    "  print('ready', flush=True)\n"
    "  while not stopping.is_asked(): time.sleep(0.01)\n"
    "  print('one line more', flush=True)\n"
    f"  open({str(tmp_path / 'saved')!r}, 'w').close()\n"
    "sys.exit(stopping.exit_code)"
  )
  master, slave = pty.openpty()
  streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
  process = subprocess.Popen(
    [sys.executable, "-c", program], cwd=ROOT, start_new_session=True, **streams
  )
  os.close(slave)
  assert os.read(master, 5) == b"ready"
  os.close(master)
  assert process.wait(timeout=60) == 0
  assert (tmp_path / "saved").exists()


def test_under_nohup_a_lost_terminal_means_nothing(start):
  process = start(PATIENT, hang_up="signal.SIG_IGN")
  process.send_signal(signal.SIGHUP)
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(timeout=1)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=60) == 0


def test_afterwards_signals_mean_what_they_did():
  code = (
    # A shell's background jobs are born with SIGINT ignored, and pytest may be one.
    "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from launch.stopping import Stopping\nwith Stopping(): pass\n"
    "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    "assert signal.set_wakeup_fd(-1) == -1\n"
    "os.kill(os.getpid(), signal.SIGTERM)"
  )
  done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, timeout=60)
  assert done.returncode == -signal.SIGTERM
