"""The run: dispatches step n and only then logs step n - 1, so that the device never waits.

Composes data, step, checkpoints and what looks at them. Must not know flags, signals or how text is
generated.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.interop.tokenizer import TOKENIZERS, Tokenizer
from moe_jax.observe.metrics import write_summary
from moe_jax.observe.profile import Profiler
from moe_jax.observe.progress import Progress, duration
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.train import (
  batches,
  bigram,
  lock,
  log,
  migration,
  optimizer,
  processes,
  resume,
  step,
)
from moe_jax.train import state as state_lib
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.corpus import Corpus, load_corpus
from moe_jax.train.data import Dataset
from moe_jax.train.evaluation import Evaluation, targets_per_byte
from moe_jax.train.rebalance import Balancer, Placed
from moe_jax.train.state import State

_SUMMARY = "summary.json"


class Outcome(NamedTuple):
  """What a run leaves in memory.

  Attributes:
    state: layers as the schedule places them, experts as `expert_LP` says.
    expert_LP: the expert at each slot, layers in logical order.
    step: steps done.
    is_finished: whether those are all; if not, the run was asked to stop, and saved.
    eval_loss: after the last step done, nats per byte; None where that one was not evaluated.
    bigram_loss: of a bigram model of the same text on the same held-out bytes, nats per byte.
    mesh: where the state lies.
    dataset: with its tokenizer.
  """

  state: State
  expert_LP: np.ndarray
  step: int
  is_finished: bool
  eval_loss: float | None
  bigram_loss: float
  mesh: Mesh
  dataset: Dataset


def train(
  settings: config.Config,
  workdir: str | Path,
  *,
  stop: Callable[[], bool] = lambda: False,
  profile_steps: tuple[int, int] | None = None,
  stream: TextIO | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Outcome:
  """Trains to `train.steps`, from the newest checkpoint in `workdir` or from the start.

  Every process of the run calls it with the same arguments; process 0 prints and writes.

  Args:
    settings: what to train.
    workdir: the run's folder, seen by all processes: config.json, metrics.jsonl, load.jsonl (tokens
      of every layer's experts), tensorboard/, checkpoints/, and at the end summary.json, loss.png.
    stop: asked before every step; once it is true in any process, the run saves and returns after
      that step.
    profile_steps: (start, stop) of the steps to trace to profile/.
    stream: where progress is shown; standard output by default.
    devices: of the mesh; by default all devices of all processes.

  Raises:
    ValueError: model, mesh, text, checkpoints or `profile_steps` do not fit, processes have other
      data than each other, or another run writes to `workdir`; nothing was written.
    OSError: a file cannot be read or written.
    log.Diverged: `train.max_skipped_steps` steps in a row were not finite; the message names the
      last good checkpoint, or says that none is left.
  """
  workdir, model = Path(workdir), settings.model
  if model.experts_per_token == 1 < model.experts and model.normalize_choices:
    raise ValueError(
      "model.experts_per_token=1 with model.normalize_choices=True weighs the one expert of each"
      " token 1, whatever the router says, which so learns nothing from the loss; choose"
      " model.normalize_choices=False"
    )
  if profile_steps and profile_steps[0] >= settings.train.steps:
    raise ValueError(
      f"profile_steps={profile_steps[0]}:{profile_steps[1]} begins after the last step of"
      f" train.steps={settings.train.steps}; steps count from 0"
    )
  with contextlib.ExitStack() as stack:
    if jax.process_index() > 0:
      stream = stack.enter_context(open(os.devnull, "w"))
    progress = stack.enter_context(contextlib.closing(Progress(settings.train.steps, stream)))
    stack.enter_context(lock.held(workdir))
    run = _Run(settings, workdir, mesh_lib.make(settings.mesh, devices), progress)
    stack.push(lambda kind, *_: run.checkpoints.close(failed=kind is not None))
    beginning = run.keeper.begin(run.dataset)
    for note in beginning.notes:
      progress.message(note)
    if beginning.step >= settings.train.steps:
      return run.already_finished(beginning)
    if profile_steps and profile_steps[1] <= beginning.step:
      # No error: the command of a run that was stopped goes on with it.
      progress.message(
        f"nothing is profiled: profile_steps={profile_steps[0]}:{profile_steps[1]} are over, the"
        f" run goes on with step {beginning.step}; steps count from 0"
      )
    return run.train(beginning, stop, profile_steps)


class _Programs(NamedTuple):
  """What is compiled before the first step; `migrate` where experts may move."""

  step: Callable
  evaluation: Evaluation
  migrate: Callable[[State, migration.Moves], State] | None


class _Run:
  """The pieces of a run; holds what every step shares."""

  def __init__(self, settings: config.Config, workdir: Path, mesh: Mesh, progress: Progress):
    self.settings, self.workdir, self.mesh, self.progress = settings, workdir, mesh, progress
    self.checkpoints = Checkpoints(
      workdir / "checkpoints", keep=settings.train.keep_checkpoints, report=progress.message
    )
    corpus, self.dataset = _same_everywhere(self._data)
    held_out = (self.dataset.eval_batch(i) for i in range(self.dataset.num_eval_batches))
    pieces = self.dataset.tokenizer.pieces
    self.bigram_loss = bigram.loss(bigram.fit(corpus.train_documents), held_out, pieces)
    self.optimizer = optimizer.make(settings.train)
    order = state_lib.placement(settings, step.table(settings).layer_order)
    self.keeper = resume.Keeper(settings, self.mesh, self.optimizer, order, self.checkpoints)

  def already_finished(self, beginning: resume.Beginning) -> Outcome:
    """Evaluates the state of a run that has no step left."""
    self.progress.message(
      f"{self.workdir} holds a finished run: {beginning.step} steps,"
      f" train.steps={self.settings.train.steps};"
      " a larger --config.train.steps continues it, another --workdir starts anew"
    )
    evaluation = self._evaluation()
    eval_loss = evaluation.finish(evaluation.start(beginning.state))
    expert_LP = beginning.placed.expert_LP
    outcome = self._outcome(beginning.state, expert_LP, beginning.step, eval_loss)
    if not (self.workdir / _SUMMARY).exists():
      log.summarise(self.workdir, self._known(outcome, beginning.train_seconds))
    return outcome

  def train(self, beginning: resume.Beginning, stop, profile_steps) -> Outcome:
    """Runs the steps that are left, or those until `stop`."""
    self.started_s = time.monotonic() - beginning.train_seconds
    # First, for it may refuse the config, and then nothing is to be written.
    expert_bytes = migration.expert_bytes(self.settings, self.optimizer)
    balancer = Balancer(self.settings, self.keeper.order, beginning.placed, expert_bytes)
    if jax.process_index() == 0:
      write_summary(self.workdir / "config.json", config.as_dict(self.settings))
      (self.workdir / _SUMMARY).unlink(missing_ok=True)  # of fewer steps
      self.dataset.tokenizer.save(self.workdir)
    programs, compile_seconds = self._compile(balancer)
    with contextlib.ExitStack() as stack:
      log_ = log.Log(
        self.settings, self.workdir, self.progress, programs.evaluation, balancer,
        self.keeper.order, beginning.step,
      )  # fmt: skip
      stack.callback(log_.close)
      profiler = Profiler(
        self._profile_folder(), *(profile_steps or (0, 0)),
        about=config.as_dict(self.settings), report=self.progress.message,
      )  # fmt: skip
      stack.callback(profiler.close)
      state, num_done, eval_loss = self._steps(beginning, programs, balancer, log_, profiler, stop)
      self.checkpoints.wait()
    outcome = self._outcome(state, balancer.expert_LP, num_done, eval_loss)
    if outcome.is_finished:
      known = self._known(outcome, time.monotonic() - self.started_s)
      log.summarise(self.workdir, {**known, "compile_seconds": compile_seconds})
    else:
      self.progress.message(
        f"stopped and saved after step {num_done} of {self.settings.train.steps}; the same command"
        " goes on from there"
      )
    return outcome

  def _compile(self, balancer: Balancer) -> tuple[_Programs, float]:
    self.progress.message("compiling ...")
    start_s = time.monotonic()
    jitted = jax.jit(
      step.train_step(self.settings, self.mesh, self.optimizer),
      donate_argnums=0,
      out_shardings=(self.keeper.shardings, NamedSharding(self.mesh, P())),
    )
    inputs = batches.abstract(self.settings, self.mesh)
    train_step = jitted.lower(self.keeper.abstract(), inputs).compile()
    evaluation, migrate = self._evaluation(), None
    if balancer.is_on:
      migrate = migration.program(self.settings, self.mesh, self.optimizer, self.keeper.abstract())
    compile_seconds = time.monotonic() - start_s
    self.progress.message(f"compiled in {duration(compile_seconds)}")
    return _Programs(train_step, evaluation, migrate), compile_seconds

  def _steps(
    self, beginning, programs, balancer, log_, profiler, stop
  ) -> tuple[State, int, float | None]:
    train = self.settings.train
    state, waiting = beginning.state, None
    with contextlib.closing(self.dataset.batches(beginning.step)) as stream:
      for step_id, batch in stream:
        is_stop = batches.any_process(stop(), self.mesh)
        profiler.before_step(step_id)
        state, metrics = programs.step(state, batches.place(batch, self.settings, self.mesh))
        profiler.after_step(step_id, metrics)
        if waiting is not None:
          log_.step(waiting)
        num_done = step_id + 1
        is_last = num_done == train.steps
        is_evaluated = is_last or num_done % train.eval_every == 0
        losses = programs.evaluation.start(state) if is_evaluated else None
        expert_LP, look = balancer.expert_LP, balancer.look(num_done)
        waiting = log.Dispatched(
          step_id, metrics, losses, targets_per_byte(self.dataset, batch), expert_LP, look
        )
        if look is not None:
          self.progress.message(f"after step {num_done}: {look}")
          state = programs.migrate(state, look.moves) if look.moves else state
        is_last |= bool(is_stop)
        if is_last or num_done % train.checkpoint_every == 0:
          eval_loss, waiting = log_.step(waiting), None
          if self._save(num_done, state, balancer.placed, is_last, bool(metrics.is_finite)):
            log_.saved(num_done)
        if is_last:
          return state, num_done, eval_loss

  def _save(
    self, num_done: int, state: State, placed: Placed, is_last: bool, is_finite: bool
  ) -> bool:
    # While steps are skipped the parameters stand still, and may be what is wrong: saving them
    # again and again would push out the good checkpoints.
    if not is_last and not is_finite:
      self.progress.message(f"checkpoint {num_done} is left out: its last step was skipped")
      return False
    train_seconds = time.monotonic() - self.started_s
    self.keeper.save(num_done, state, placed, self.dataset, train_seconds)
    return True

  def _data(self) -> tuple[Corpus, Dataset]:
    train, corpus = self.settings.train, load_corpus(self.settings.data)
    self.progress.message(str(corpus.report))
    return corpus, Dataset(
      corpus, self._tokenizer(corpus),
      batch=train.batch, sequence=train.sequence, seed=train.seed, eval_batches=train.eval_batches,
    )  # fmt: skip

  def _tokenizer(self, corpus: Corpus) -> Tokenizer:
    kind, vocab = TOKENIZERS[self.settings.data.tokenizer], self.settings.model.vocab
    if self.checkpoints.latest_step() is not None:
      return kind.load(self.workdir, vocab)
    return kind.train((document.text for document in corpus.train_documents), vocab)

  def _profile_folder(self) -> Path:
    folder = self.workdir / "profile"
    is_alone = jax.process_count() == 1
    return folder if is_alone else folder / f"process_{jax.process_index()}"

  def _evaluation(self) -> Evaluation:
    return Evaluation(self.settings, self.mesh, self.dataset, self.keeper.abstract())

  def _outcome(
    self, state: State, expert_LP: np.ndarray, num_done: int, eval_loss: float | None
  ) -> Outcome:
    is_finished = num_done >= self.settings.train.steps
    if is_finished:
      self.progress.message(
        f"held-out loss {eval_loss:.4f} nats per byte; a bigram model of the same text:"
        f" {self.bigram_loss:.4f}"
      )
    return Outcome(
      state, expert_LP, num_done, is_finished, eval_loss, self.bigram_loss, self.mesh, self.dataset
    )

  def _known(self, outcome: Outcome, train_seconds: float) -> dict:
    return {
      "eval_loss": outcome.eval_loss,
      "bigram_loss": outcome.bigram_loss,
      "train_seconds": train_seconds,
      "steps": outcome.step,
      "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(outcome.state.parameters)),
    }


def _same_everywhere(make: Callable[[], tuple[Corpus, Dataset]]) -> tuple[Corpus, Dataset]:
  """Returns what `make` does, once every process has made the same.

  Raises:
    ValueError: one has made something else, or nothing: there the error of `make`, or its OSError.

  Communication: with several processes, all-gather of 32 bytes.
  """
  made, error, digest = None, None, bytes(32)
  try:
    made = make()
    data = made[1].state(0)
    digest = hashlib.sha256((data["fingerprint"] + data["tokenizer"]).encode()).digest()
  except (OSError, ValueError) as raised:
    error = raised
  digests_N32 = processes.of_each(np.frombuffer(digest, np.uint8))
  if error is not None:
    raise error
  others = np.flatnonzero((digests_N32 != digests_N32[0]).any(axis=1)).tolist()
  if others:
    shown = ", ".join(map(str, others))
    raise ValueError(
      f"processes do not have the same data: {shown} of {len(digests_N32)} differ from process 0,"
      " or failed to read theirs; give every host the same files for data.paths, the same Python"
      " where it is empty, and one --workdir that all see"
    )
  return made
