"""Files to write: what cannot be written is refused with the command line, before the work."""

import os
import subprocess
import sys

import pytest

from launch import paths


def answer(program, *arguments) -> str:
  """Returns the line with which a program refuses a command line."""
  command = [sys.executable, "-m", f"launch.{program}", *arguments]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1, done
  return done.stderr


@pytest.mark.parametrize(
  ("path", "why"),
  [
    ("", "it is empty; name a file"),
    ("{}", "it is a folder; name a file"),
    ("{}/file/figures.json", "{}/file is a file, not a folder; choose another place"),
    ("{}/file/new/figures.json", "{}/file is a file, not a folder; choose another place"),
  ],
)
def test_a_file_that_cannot_be_written(tmp_path, path, why):
  (tmp_path / "file").write_text("kept")
  path, why = path.format(tmp_path), why.format(tmp_path)
  assert answer("plot_schedule", f"--json={path}") == f"error: --json={path}: {why}\n"
  assert [*tmp_path.iterdir()] == [tmp_path / "file"] and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
  ("program", "argument"),
  [
    ("plan", "--out={}"),
    ("plan", "--json={}/plan.json"),
    ("rehearse", "--json={}/report.json"),
    ("rehearse", "--picture={}/tick.html"),
    ("bench", "--json={}/bench.json"),
    ("bench_serve", "--plot={}/curve.svg"),
    ("bench_balance", "--record={}/routing.npz"),
  ],
)
def test_programs_say_so_before_they_work(tmp_path, program, argument):
  (tmp_path / "file").write_text("")
  config = "" if program == "bench_balance" else "--config=configs/tiny.py"
  needed = ["--pod=h100:1x8"] if program == "rehearse" else []
  arguments = [config, *needed, argument.format(tmp_path / "file")]
  line = answer(program, *filter(None, arguments))
  assert f"{tmp_path / 'file'} is a file, not a folder; choose another place" in line


def test_processes_of_one_program_may_try_at_once(tmp_path):
  try_often = (
    "import sys; from launch import paths\n"
    "assert not any(paths._problem_of_file(sys.argv[1], ()) for _ in range(3000))"
  )
  command = [sys.executable, "-c", try_often, str(tmp_path / "figures.json")]
  processes = [subprocess.Popen(command) for _ in range(4)]
  assert [process.wait(timeout=60) for process in processes] == [0] * 4
  assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
  tmp_path.chmod(0o500)
  line = answer("plot_schedule", f"--json={tmp_path / 'new' / 'figures.json'}")
  assert f"{tmp_path} may not be written to; choose another" in line


def test_folders_are_made(tmp_path):
  paths.write_json(tmp_path / "new" / "folder" / "figures.json", {"a": 1})
  assert (tmp_path / "new" / "folder" / "figures.json").read_text() == '{\n  "a": 1\n}\n'
