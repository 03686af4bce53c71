"""The whole of moe_jax.plan imports where there is no jax."""

import pkgutil
import subprocess
import sys

from moe_jax import plan

PROGRAM = """
import importlib, sys
for name in ("jax", "jaxlib", "flax", "optax"):
  sys.modules[name] = None  # importing it raises ImportError
for name in sys.argv[1:]:
  importlib.import_module(name)
"""


def test_the_plan_imports_without_jax():
  names = [f"moe_jax.plan.{module.name}" for module in pkgutil.iter_modules(plan.__path__)]
  assert {"moe_jax.plan.cost", "moe_jax.plan.hardware"} <= set(names)
  subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM, *names], check=True, timeout=60)
