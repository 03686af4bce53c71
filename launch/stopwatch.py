"""What launch.bench times: a deployment's steps as the training loop runs them, and matrix products
that show what the machine can do.

Must not know flags, files or how figures are shown.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.model.transformer import Inputs
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.train import optimizer as optimizer_lib
from moe_jax.train import state as state_lib
from moe_jax.train import step as step_lib
from moe_jax.train import units

GEMM_REPEATS = 10


class Time(NamedTuple):
  """What one call took: seconds by the clock, and of this process on all its cores.

  Where the second is well below cores x the first, the process waited: for a neighbour, or because
  it had work for one core only.
  """

  wall_s: float
  cpu_s: float


class Step(NamedTuple):
  """One step: its time, and the fraction of its assignments that no expert computed."""

  time: Time
  dropped_fraction: float


class Program:
  """A deployment, compiled, with its state and one batch on the devices.

  Attributes:
    schedule: its table.
    compile_s: seconds that tracing and XLA took, by kind of step.
    temporary_bytes: of the train step, on all devices together.
  """

  def __init__(self, settings: config.Config):
    mesh = mesh_lib.make(settings.mesh)
    optimizer = optimizer_lib.make(settings.train)
    self.schedule = step_lib.table(settings)
    order = state_lib.placement(settings, self.schedule.layer_order)
    key = jax.random.key(settings.train.seed)
    self.state = state_lib.initialiser(settings, mesh, optimizer, order)(key)
    # Every process makes the whole batch, and places what lies on its own devices.
    place = lambda leaf, spec: jax.make_array_from_callback(
      leaf.shape, NamedSharding(mesh, spec), lambda part: leaf[part]
    )
    self.inputs = jax.tree.map(place, random_inputs(settings), step_lib.inputs_spec())
    sums = lambda counts: (counts.dropped.sum(), counts.sent.sum())
    self._sums = jax.jit(sums, out_shardings=NamedSharding(mesh, P()))
    self.compile_s: dict[str, float] = {}
    self._units = units.programs(settings, mesh)
    self._to_compute = jax.jit(step_lib.compute_parameters(settings, mesh))
    train = jax.jit(step_lib.train_step(settings, mesh, optimizer), donate_argnums=0)
    self._train = self._compile("train", train)
    self.temporary_bytes = self._train.memory_analysis().temp_size_in_bytes * mesh.size
    self._forward = self._compile("forward", jax.jit(step_lib.evaluate_step(settings, mesh)))

  def train(self) -> Step:
    """Takes one optimizer step."""
    took, (self.state, metrics) = timed(lambda: self._train(self.state, self.inputs))
    return Step(took, self._dropped_fraction(metrics.losses))

  def forward(self) -> Step:
    """Evaluates the batch."""
    took, losses = timed(lambda: self._forward(self.state, self.inputs))
    return Step(took, self._dropped_fraction(losses))

  def unit_seconds(self, repeats: int) -> dict[str, float]:
    """Returns the median seconds of each unit of a tick, run alone on all devices."""
    given = (self._to_compute(self.state.parameters), step_lib.normalised(self.inputs))
    found = {}

    def take(kind, *arrays):
      call = lambda: self._units[kind](*given, *arrays)
      result = timed(call)[1]  # compiles
      found[kind] = statistics.median(timed(call)[0].wall_s for _ in range(repeats))
      return result

    y, saved = take("forward", take("embed"))
    _, _, gy = take("head", y)
    _, gx = take("backward", saved, gy)
    take("embed_gradient", gx)
    return found

  def _dropped_fraction(self, losses: step_lib.Losses) -> float:
    dropped, sent = self._sums(losses.report.counts)
    return int(dropped) / int(sent)

  def _compile(self, kind: str, function):
    start = time.perf_counter()
    compiled = function.lower(self.state, self.inputs).compile()
    self.compile_s[kind] = time.perf_counter() - start
    return compiled


def random_inputs(settings: config.Config) -> Inputs:
  """Returns one step's batch, numpy: rows of uniform random tokens, each row one document."""
  train, micro_batches = settings.train, settings.pipeline.micro_batches
  shape = (micro_batches, train.batch // micro_batches, train.sequence)
  random = np.random.default_rng(train.seed)
  tokens = random.integers(0, settings.model.vocab, (*shape[:2], shape[2] + 1), dtype=np.int32)
  return Inputs(
    tokens_bS=tokens[..., :-1],
    targets_bS=tokens[..., 1:],
    positions_bS=np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape),
    segments_bS=np.ones(shape, np.int32),
    weights_bS=np.ones(shape, np.float32),
  )


class Gemms:
  """Three matrix products on one device, in the deployment's dtype: the machine's own peak.

  Attributes:
    shapes: (M, K, N) by name: a square one, and the tokens of a micro-batch into and out of a
      hidden layer as wide as one expert's.
    flops_per_s: by name, of all devices together, what each `measure` found.
  """

  def __init__(self, settings: config.Config):
    model, train = settings.model, settings.train
    tokens = train.batch * train.sequence // settings.pipeline.micro_batches
    on_cpu = jax.default_backend() == "cpu"
    side = 2048 if on_cpu else 8192
    self.shapes = {
      "square": (side, side, side),
      "into_hidden": (tokens, model.d_model, model.expert_hidden),
      "out_of_hidden": (tokens, model.expert_hidden, model.d_model),
    }
    self.flops_per_s: dict[str, list[float]] = {name: [] for name in self.shapes}
    self._dtype = jnp.dtype(model.dtype)
    self._multiply = jax.jit(jnp.matmul)
    # Virtual CPU devices share the cores, and one product uses them all.
    self._num_alike = 1 if on_cpu else jax.device_count()

  def measure(self) -> None:
    """Times every product once more, the best of GEMM_REPEATS."""
    for name, (M, K, N) in self.shapes.items():
      a, b = jnp.ones((M, K), self._dtype), jnp.ones((K, N), self._dtype)
      multiply = lambda a=a, b=b: self._multiply(a, b)
      timed(multiply)
      seconds = min(timed(multiply)[0].wall_s for _ in range(GEMM_REPEATS))
      self.flops_per_s[name].append(self._num_alike * 2 * M * K * N / seconds)

  @property
  def peak_flops_per_s(self) -> float:
    """The best of all products and times."""
    return max(rate for rates in self.flops_per_s.values() for rate in rates)


def timed(function: Callable[[], Any]) -> tuple[Time, Any]:
  """Returns the time of a call, until all that it returns is there, and what it returned."""
  wall, cpu = time.perf_counter(), time.process_time()
  result = jax.block_until_ready(function())
  return Time(time.perf_counter() - wall, time.process_time() - cpu), result
