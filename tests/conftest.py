"""What every test runs under: eight virtual CPU devices, and jax at its strictest.

The environment is set before jax is imported, here and for the programs that tests start. Warnings
are errors through `filterwarnings` in setup.cfg. This file knows jax and pytest; it must not know
moe_jax.
"""

import gc
import os
import shutil
import sys
import tempfile
from importlib.metadata import version

NUM_DEVICES = 8

if "jax" in sys.modules:
  raise RuntimeError(
    "jax was imported before tests/conftest.py, which sets its devices; load it later"
  )

# jax 0.10 and 0.12 take these, and abort on names that they do not know. The last setting of a
# flag holds, so what the user has in XLA_FLAGS stays, except for these.
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    f"--xla_force_host_platform_device_count={NUM_DEVICES}",
    # Compiling is most of what tests do, and their programs are small: LLVM need not try hard. It
    # saves a third of their time.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # The newer emitters go through MLIR, whatever the level, and take half of what compiling still
    # takes; the older ones write LLVM at once. Later versions have none to go back to.
    *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),
    # Dividing small modules among threads costs more than it saves.
    "--xla_cpu_parallel_codegen_split_count=1",
    # A deadlocked collective ends the process after their sum, and the report names the rendezvous
    # that was missed. On two busy cores a healthy one may wait for seconds.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=10",
    "--xla_cpu_collective_call_terminate_timeout_seconds=30",
  ]
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# Workers, and the programs that tests start, compile many a program that another has compiled. A
# cache of this session's own: a user's would be filled with the tests' programs.
_CACHE = "MOE_JAX_TESTS_CACHE"
_is_first = _CACHE not in os.environ
if _is_first:
  os.environ[_CACHE] = tempfile.mkdtemp(prefix="moe_jax_tests_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ[_CACHE]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_sessionstart(session):
  if jax.device_count() != NUM_DEVICES:
    raise pytest.UsageError(
      f"jax has {jax.device_count()} devices; the tests need {NUM_DEVICES} virtual CPU devices:"
      f" unset JAX_NUM_CPU_DEVICES, and see XLA_FLAGS={os.environ['XLA_FLAGS']!r}"
    )


def pytest_collection_finish(session):
  """Leaves what is loaded by now out of garbage collection, which is made rarer: tracing allocates
  so many objects that Python would walk through all of them hundreds of times a test."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure():
  """Removes the cache, once the workers are through."""
  if _is_first:
    shutil.rmtree(os.environ.pop(_CACHE), ignore_errors=True)


@pytest.fixture
def standard_dtype_promotion():
  """Lifts strict dtype promotion for one test: optax raises its integer step count under it."""
  with jax.numpy_dtype_promotion("standard"):
    yield
