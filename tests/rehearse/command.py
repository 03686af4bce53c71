"""`launch.rehearse` as a user starts it, and its report.

Knows the command; it must not know which programs are rehearsed.
"""

import os
import subprocess
import sys

from tests.runs import ROOT


def rehearse(*words: str, config: str = "tiny", timeout_s: float = 600):
  """Returns the finished process, with its output as text.

  Compiled without the tests' own XLA flags: code for GPUs that LLVM has not made short takes
  longer to assemble than LLVM saves.
  """
  return subprocess.run(
    [sys.executable, "-m", "launch.rehearse", f"--config=configs/{config}.py", *words],
    cwd=ROOT, capture_output=True, text=True, timeout=timeout_s,
    env={**os.environ, "XLA_FLAGS": ""},
  )  # fmt: skip
