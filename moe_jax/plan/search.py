"""Every way to lay a model out on a cluster, ranked by predicted time under the memory limit.

What cannot be among the best by its computation alone is left out before it is simulated. Knows
configurations, machines and targets; must not know flags or files.
"""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.config import EXCHANGE, SAVE, Config, Mesh, Moe
from moe_jax.plan import memory, serve, simulate, steps, units
from moe_jax.plan.calibration import NONE, Calibration
from moe_jax.plan.hardware import Cluster
from moe_jax.plan.machine import Machine, seconds

# Micro-batches and sizes beyond these do not pay on any cluster that we have plans for.
_MOST_MICRO_BATCHES = 64
_KEPT = 10
# The dispatches that a search chooses from, and the one given. Under an even load stealing only
# costs; of ragged no time is known on any GPU, and past 32 ranks it has been reported to crash.
CONSIDERED = ("capacity", "dropless", "two_level", "dense", "gathered")
_OWN_EXCHANGE = ("two_level", "ragged", "gathered")


class Plan(NamedTuple):
  """One way.

  Attributes:
    settings: the deployment.
    machine: that it runs on.
    seconds: of a training step, or to serve the whole workload.
    tokens_per_ms_per_gpu: trained, or read and written.
    memory_bytes: on one GPU.
    served: of a serving workload, else None.
  """

  settings: Config
  machine: Machine
  seconds: float
  tokens_per_ms_per_gpu: float
  memory_bytes: int
  served: serve.Served | None = None

  @property
  def num_gpus(self) -> int:
    return self.settings.mesh.num_devices


class Targets(NamedTuple):
  """What a plan has to reach; None is nothing.

  Attributes:
    tokens_per_ms: of the whole cluster.
    ttft_s: at most.
  """

  tokens_per_ms: float | None = None
  ttft_s: float | None = None


class Found(NamedTuple):
  """The outcome of a search.

  Attributes:
    best: plans, the fastest first.
    considered: legal plans.
    simulated: of which were simulated; the others are slower by their computation alone.
    too_large: of which do not fit into memory.
    least_bytes: of the smallest plan seen, where none fits.
  """

  best: list[Plan]
  considered: int
  simulated: int
  too_large: int
  least_bytes: int


def search(
  settings: Config,
  cluster: Cluster,
  *,
  workload: serve.Workload | None = None,
  ttft_s: float | None = None,
  bubble: float | None = None,
  calibration: Calibration = NONE,
  tied: bool = True,
) -> Found:
  """Returns the best plans for a model and batch on all GPUs of a cluster.

  Args:
    settings: model, batch and sequence are kept; mesh, pipeline and dispatch are chosen. To serve,
      the workload's sequences take the place of the batch.
    cluster: all its GPUs are used, by as many copies of a mesh as there is room for.
    workload: to serve; None trains.
    ttft_s: until the first token, at most; slower plans are left out.
    bubble: share of a training step that a stage may be idle, at most; plans with more are left
      out.
    calibration: of the machine.
    tied: as in program.train.

  Raises:
    ValueError: no plan is legal, or none fits into memory or keeps to a limit; says what is missing
      or by how much.
  """
  rank = _Ranking(settings, cluster, workload, ttft_s, bubble, calibration, tied)
  for mesh in meshes(settings, cluster.num_gpus, workload):
    rank.mesh(mesh)
  if not rank.considered:
    raise ValueError(_why_none(settings, cluster, workload))
  if not rank.best and rank.least_ttft_s < math.inf:
    raise ValueError(
      f"no plan gives the first token within {ttft_s:g} s: the fastest takes"
      f" {rank.least_ttft_s:.3f} s; give more GPUs, fewer sequences or shorter prompts"
    )
  if not rank.best and rank.least_bubble < math.inf:
    raise ValueError(
      f"no plan has a bubble of {bubble:.2%} at most: the least is {rank.least_bubble:.2%}; allow"
      " more, or give a larger train.batch for more micro-batches"
    )
  if not rank.best:
    have = cluster.chip.memory_bytes
    raise ValueError(
      f"no plan fits: the smallest needs {rank.least_bytes / 1e9:.1f} GB on each"
      f" {cluster.chip.name}, which has {have / 1e9:.0f} GB,"
      f" {(rank.least_bytes - have) / 1e9:.1f} GB too little; give more GPUs, a chip with more"
      f" memory, or {'fewer sequences' if workload else 'a smaller train.batch'}"
    )
  best = sorted(rank.best.values(), key=lambda plan: plan.seconds)
  return Found(best, rank.considered, rank.simulated, rank.too_large, rank.least_bytes)


def evaluate(
  settings: Config,
  machine: Machine,
  workload: serve.Workload | None = None,
  tied: bool = True,
) -> Plan:
  """Returns a deployment as a plan, whether it fits or not."""
  if workload is not None:
    found = serve.run(settings, machine, workload)
    return Plan(
      settings,
      machine,
      found.whole_s,
      found.tokens_per_ms_per_gpu,
      found.memory.total,
      found,
    )
  step_s = simulate.step_seconds(settings, machine, tied)
  tokens = settings.train.batch * settings.train.sequence
  rate = tokens / (step_s * 1e3 * settings.mesh.num_devices)
  return Plan(settings, machine, step_s, rate, memory.train(settings).total)


def smallest(
  settings: Config, cluster: Cluster, targets: Targets, **options
) -> tuple[Plan | None, list[tuple[int, Plan | None, str]]]:
  """Returns the best plan of the smallest cluster that meets the targets, and what each size does.

  Sizes are powers of two, as far as whole hosts have them, and the cluster itself; the second
  result is (GPUs, plan, why it fails).
  """
  counts = (*(2**exponent for exponent in range(cluster.num_gpus.bit_length())), cluster.num_gpus)
  tried = []
  for part in dict.fromkeys(map(cluster.of, counts)):
    try:
      best = search(settings, part, **options).best[0]
    except ValueError as error:
      tried.append((part.num_gpus, None, str(error)))
      continue
    missing = missed(best, targets)
    tried.append((part.num_gpus, best, missing))
    if not missing:
      return best, tried
  return None, tried


def missed(plan: Plan, targets: Targets) -> str:
  """Returns by how much a plan misses the targets; empty where it meets them."""
  parts = []
  rate = plan.tokens_per_ms_per_gpu * plan.num_gpus
  if targets.tokens_per_ms is not None and rate < targets.tokens_per_ms:
    parts.append(f"{rate:,.0f} of {targets.tokens_per_ms:,.0f} tokens/ms")
  if targets.ttft_s is not None and plan.served is not None and plan.served.ttft_s > targets.ttft_s:
    parts.append(f"first token after {plan.served.ttft_s:.2f} s, asked {targets.ttft_s:g} s")
  return " and ".join(parts)


def meshes(
  settings: Config, num_gpus: int, workload: serve.Workload | None = None
) -> Iterator[Mesh]:
  """Yields the legal meshes of a number of GPUs: `data` is what the other axes leave of them."""
  model = settings.model
  widths = math.gcd(model.heads, model.kv_heads, model.expert_hidden)
  axes = (_divisors(model.experts), _divisors(widths), _divisors(model.layers))
  for expert, tensor, stage in itertools.product(*axes):
    data, rest = divmod(num_gpus, expert * tensor * stage)
    if rest:
      continue
    mesh = Mesh(expert=expert, tensor=tensor, stage=stage, data=data)
    fits = model.vocab % (stage * tensor) == 0 and settings.train.sequence % tensor == 0
    if fits and _batch(settings, workload) % mesh.sequence_shares == 0:
      yield mesh


def _batch(settings: Config, workload: serve.Workload | None) -> int:
  """Returns the sequences that the ranks of a mesh share."""
  return workload.sequences if workload else settings.train.batch


def ranks_per_host(mesh: Mesh, cluster: Cluster) -> int:
  """Returns how many consecutive ranks of `expert` share a host of the cluster, `tensor` innermost;
  1 where a host does not hold whole groups of them.
  """
  ranks = max(1, cluster.gpus_per_host // mesh.tensor)
  return ranks if mesh.expert % ranks == 0 and ranks * mesh.tensor == cluster.gpus_per_host else 1


class _Ranking:
  """The best plans so far."""

  def __init__(self, settings, cluster, workload, ttft_s, bubble, calibration, tied):
    self.settings, self.cluster = settings, cluster
    self.workload, self.ttft_s, self.bubble = workload, ttft_s, bubble
    self.least_ttft_s = self.least_bubble = math.inf
    self.calibration, self.tied = calibration, tied
    self.best: dict[Config, Plan] = {}
    self.slowest: list[float] = []  # a heap of the negated seconds of the best
    self.considered = self.simulated = self.too_large = 0
    self.least_bytes = 0

  def mesh(self, mesh: Mesh) -> None:
    """Considers every plan on a mesh."""
    machine = Machine(self.cluster, self.calibration)
    for settings in self._layouts(mesh):
      self.considered += 1
      if self._bound(settings, machine) > self._limit():
        continue
      self.simulated += 1
      plan = evaluate(settings, machine, self.workload, self.tied)
      if not self.least_bytes or plan.memory_bytes < self.least_bytes:
        self.least_bytes = plan.memory_bytes
      if plan.memory_bytes > self.cluster.chip.memory_bytes:
        self.too_large += 1
      elif not self._is_late(plan) and plan.seconds < self._limit() and not self._is_idle(plan):
        self._keep(plan)

  def _is_late(self, plan: Plan) -> bool:
    if plan.served is None or self.ttft_s is None:
      return False
    self.least_ttft_s = min(self.least_ttft_s, plan.served.ttft_s)
    return plan.served.ttft_s > self.ttft_s

  def _is_idle(self, plan: Plan) -> bool:
    if plan.served is not None or self.bubble is None:
      return False
    found = simulate.bubble_fraction(plan.settings, plan.machine, self.tied)
    self.least_bubble = min(self.least_bubble, found)
    return found > self.bubble

  def _layouts(self, mesh: Mesh) -> Iterator[Config]:
    given, model = self.settings, self.settings.model
    batch = _batch(given, self.workload)
    train = dataclasses.replace(given.train, batch=batch)
    # A prefill saves nothing, and all schedules of one chunk are the same forwards.
    saves = SAVE[:1] if self.workload else SAVE
    per_rank = batch // mesh.sequence_shares
    # As given, where the mesh lets it: it costs time and saves little, so it is not searched for.
    most_ahead = model.layers // mesh.stage - 1 if mesh.sequence_shares > 1 else 0
    ahead = min(given.pipeline.prefetch_layers, most_ahead)
    micro_batches = [n for n in _divisors(per_rank) if n <= _MOST_MICRO_BATCHES]
    for moe, save in itertools.product(self._ways(mesh), saves):
      for count, (schedule, chunks) in itertools.product(
        micro_batches, self._schedules(model.layers // mesh.stage, mesh)
      ):
        if mesh.stage == 1 < min(chunks, count):
          continue  # beside other micro-batches weights of copies have room enough
        # Halves where units have no other beside them.
        are_alone = mesh.stage == count == 1 and per_rank % 2 == 0 and not self.workload
        for halves in (False, True) if are_alone else (False,):
          pipeline = dataclasses.replace(
            given.pipeline, schedule=schedule, chunks=chunks, micro_batches=count, save=save,
            prefetch_layers=ahead, halves=halves,
          )  # fmt: skip
          yield dataclasses.replace(given, mesh=mesh, pipeline=pipeline, moe=moe, train=train)

  def _ways(self, mesh: Mesh) -> Iterator[Moe]:
    """Yields the ways to bring tokens to experts on a mesh."""
    # A limit of the router is the model's, and so is the number of hosts that it tells apart.
    hosts = self.settings.router_hosts
    if mesh.expert % hosts:
      return
    given = self.settings.moe_on(mesh)
    if self.workload:
      yield dataclasses.replace(given, dispatch="dropless", spill=False, shadow_tokens=0.0)
      return
    # Where one rank holds all tensor shares or all experts, both exchanges are the same. Whether
    # float8 is precise enough is not for a search over time to say.
    both = EXCHANGE[:2] if mesh.tensor > 1 and mesh.expert > 1 else EXCHANGE[:1]
    for dispatch in (*CONSIDERED, *({given.dispatch} - set(CONSIDERED))):
      ranks, of_host = given.expert_ranks_per_host, ranks_per_host(mesh, self.cluster)
      # Elsewhere it says no more than that no exchange leaves a host.
      if hosts == 1 and (dispatch == "two_level" or of_host == mesh.expert):
        ranks = of_host
      if dispatch == "two_level" and not 1 < ranks < mesh.expert:
        continue
      for exchange in both if dispatch not in _OWN_EXCHANGE else EXCHANGE[:1]:
        yield dataclasses.replace(
          given,
          dispatch=dispatch,
          exchange=exchange,
          spill=given.spill and dispatch == "capacity",
          shadow_tokens=given.shadow_tokens if dispatch == "stealing" else 0.0,
          expert_ranks_per_host=ranks,
        )

  def _schedules(self, layers_per_stage: int, mesh: Mesh) -> Iterator[tuple[str, int]]:
    yield "1f1b", 1
    if mesh.stage > 1 and not self.workload:
      yield "gpipe", 1
    # Without stages chunks are still what weights of copies come by, and gradients leave.
    if mesh.stage > 1 or (mesh.data > 1 and not self.workload):
      for chunks in _divisors(layers_per_stage)[1:]:
        yield "interleaved", chunks

  def _bound(self, settings: Config, machine: Machine) -> float:
    """Returns seconds that no way to overlap can beat: the layers' computation alone."""
    if self.workload or len(self.best) < _KEPT:
      return 0.0
    at = steps.sizes(settings)
    layers = settings.model.layers // settings.mesh.stage * settings.pipeline.micro_batches
    computation = sum(
      seconds(step, settings, machine)
      for kind in ("forward", "backward")
      for step in units.unit(settings, kind, at)
      if not step.is_communication
    )
    return layers * computation

  def _limit(self) -> float:
    return -self.slowest[0] if len(self.slowest) == _KEPT else math.inf

  def _keep(self, plan: Plan) -> None:
    heapq.heappush(self.slowest, -plan.seconds)
    self.best[plan.settings] = plan
    if len(self.slowest) > _KEPT:
      limit = -heapq.heappop(self.slowest)
      slow = next(s for s, p in self.best.items() if p.seconds == limit)
      del self.best[slow]


def _why_none(settings: Config, cluster: Cluster, workload: serve.Workload | None) -> str:
  """Returns why no mesh of the cluster is legal."""
  hosts = ""
  if settings.router_hosts > 1:
    hosts = (
      f"; moe.hosts_per_token={settings.moe.hosts_per_token} asks for"
      f" {settings.router_hosts} hosts or more along expert"
    )
  name = f"sequences={workload.sequences}" if workload else f"train.batch={settings.train.batch}"
  model = settings.model
  widths = math.gcd(model.heads, model.kv_heads, model.expert_hidden)
  return (
    f"no mesh of {cluster.num_gpus} GPUs is legal: expert divides model.experts={model.experts},"
    f" tensor divides heads and hidden units ({widths}), stage divides model.layers={model.layers},"
    f" data is what they leave of the GPUs, and {name} must divide by expert x data; choose another"
    f" number of GPUs, or {'sequences' if workload else 'a batch'} that is a multiple of more"
    f"{hosts}"
  )


def _divisors(number: int) -> list[int]:
  return [d for d in range(1, number + 1) if number % d == 0]
