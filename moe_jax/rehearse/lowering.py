"""The exact train step, prefill and decode, compiled for devices that need not exist.

Knows the steps, what they hold and their shardings, as the launchers use them; must not know pods,
or how the compiled program is read.
"""

import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from moe_jax import config
from moe_jax.model.transformer import Inputs
from moe_jax.serve.programs import Programs
from moe_jax.train import optimizer as optimizer_lib
from moe_jax.train import state as state_lib
from moe_jax.train import step as step_lib

# Of `launch.environment`, too: there a live process sets it for all of its programs.
_PROFILE_OPTION = "xla_gpu_pgle_profile_file_or_directory_path"


class Compiled(NamedTuple):
  """A program for one device of the mesh.

  Attributes:
    text: the scheduled HLO.
    memory: XLA's own account, as `Compiled.memory_analysis()` returns it.
    held: the arguments that stay from step to step, by part of the memory: ShapeDtypeStructs with
      shardings.
    lower_s: seconds that tracing took.
    compile_s: seconds that XLA took.
    lowered: what was compiled.
  """

  text: str
  memory: object
  held: Mapping[str, Any]
  lower_s: float
  compile_s: float
  lowered: jax.stages.Lowered


def train(
  settings: config.Config, mesh: jax.sharding.Mesh, progress: Callable[[str], None] = lambda _: None
) -> Compiled:
  """Returns the launcher's train step, its state donated, compiled for `mesh`.

  Args:
    settings: the deployment.
    mesh: of live or described devices.
    progress: is told what is being done.
  """
  optimizer = optimizer_lib.make(settings.train)
  state = abstract_state(settings, mesh, optimizer)
  step = jax.jit(step_lib.train_step(settings, mesh, optimizer), donate_argnums=0)
  lower = lambda: step.lower(state, abstract_inputs(settings, mesh))
  held = {"parameters": state.parameters, "optimizer": state.optimizer}
  return _lower_and_compile("the train step", lower, held, mesh, progress)


def prefill(
  settings: config.Config, mesh: jax.sharding.Mesh, progress: Callable[[str], None] = lambda _: None
) -> Compiled:
  """Returns the engine's prefill of prompts that begin, its cache donated, compiled for `mesh`.

  Args:
    settings, mesh, progress: as `train` takes them.
  """
  programs = Programs(settings, mesh)
  lower = lambda: programs.lower_prefill(0)
  return _lower_and_compile("prefill", lower, programs.abstract._asdict(), mesh, progress)


def decode(
  settings: config.Config, mesh: jax.sharding.Mesh, progress: Callable[[str], None] = lambda _: None
) -> Compiled:
  """Returns the engine's decode of the longest sequences, its cache donated, compiled for `mesh`.

  Args:
    settings, mesh, progress: as `train` takes them.
  """
  programs = Programs(settings, mesh)
  lower = lambda: programs.lower_decode(programs.widths()[-1])
  return _lower_and_compile("decode", lower, programs.abstract._asdict(), mesh, progress)


COMPILED = {"train": train, "prefill": prefill, "decode": decode}


def schedule_again(before: Compiled, profile: str, progress: Callable[[str], None]) -> Compiled:
  """Returns the same program, scheduled by a profile (`rehearse.profile`); `compile_s` is the sum.

  Args:
    before: the program as it was compiled without.
    profile: the text of a `ProfiledInstructionsProto`.
    progress: is told what is being done.
  """
  progress("compiling again, scheduled by what the kernels and collectives take")
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "profile.pbtxt"
    path.write_text(profile, encoding="utf-8")
    compiled, compile_s = _compile(before.lowered, {_PROFILE_OPTION: str(path)})
  progress(f"compiled in {compile_s:.1f} s")
  return before._replace(
    text=compiled.as_text(),
    memory=compiled.memory_analysis(),
    compile_s=before.compile_s + compile_s,
  )


def _lower_and_compile(
  name: str, lower: Callable, held: Mapping[str, Any], mesh: jax.sharding.Mesh, progress: Callable
) -> Compiled:
  progress(f"tracing {name}")
  start = time.perf_counter()
  lowered = lower()
  lower_s = time.perf_counter() - start
  progress(f"traced in {lower_s:.1f} s; compiling for {mesh.devices.flat[0].device_kind}")
  compiled, compile_s = _compile(lowered, {})
  progress(f"compiled in {compile_s:.1f} s")
  return Compiled(compiled.as_text(), compiled.memory_analysis(), held, lower_s, compile_s, lowered)


def _compile(lowered: jax.stages.Lowered, options: dict) -> tuple[jax.stages.Compiled, float]:
  start = time.perf_counter()
  compiled = lowered.compile(compiler_options=options or None)
  return compiled, time.perf_counter() - start


def abstract_state(settings: config.Config, mesh: jax.sharding.Mesh, optimizer) -> state_lib.State:
  """Returns shapes, dtypes and shardings of a run's state."""
  placed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  state = state_lib.abstract(settings.model, optimizer)
  return jax.tree.map(placed, state, state_lib.shardings(settings, mesh, optimizer))


def abstract_inputs(settings: config.Config, mesh: jax.sharding.Mesh) -> Inputs:
  """Returns shapes, dtypes and shardings of one step's batch."""
  micro_batches = settings.pipeline.micro_batches
  shape = (micro_batches, settings.train.batch // micro_batches, settings.train.sequence)
  dtypes = Inputs(*[jnp.int32] * len(Inputs._fields))._replace(weights_bS=jnp.float32)
  return jax.tree.map(
    lambda dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec)),
    dtypes,
    step_lib.inputs_spec(),
  )
