"""Whole runs in one process: what they leave, how they go on, when they stop, what they refuse."""

import contextlib
import io
import json
import shutil
from typing import NamedTuple

import jax
import numpy as np
import pytest

from moe_jax import config
from moe_jax.train import lock, log, loop, manifest, processes, resume
from moe_jax.train.checkpoint import Checkpoints
from tests import runs

# Interleaved, so that the layers in memory do not lie as on disk.
PIPELINE = {"schedule": "interleaved", "chunks": 2, "micro_batches": 4}


@pytest.fixture(autouse=True, scope="module")
def optax_promotes():
  with jax.numpy_dtype_promotion("standard"):
    yield


class Ran(NamedTuple):
  outcome: loop.Outcome
  text: str
  num_compiled: list[int]  # programs compiled before each step


_compiled: list[str] = []


@jax.monitoring.register_event_duration_secs_listener
def _count(event, duration_s, **_):
  if event == "/jax/core/compile/backend_compile_duration":
    _compiled.append(event)


def run(workdir, settings, stop_after=None, **arguments) -> Ran:
  """Trains; asks to stop during step `stop_after` of this call."""
  counts = []

  def stop():
    counts.append(len(_compiled))
    return len(counts) == stop_after

  stream = io.StringIO()
  outcome = loop.train(settings, workdir, stop=stop, stream=stream, **arguments)
  return Ran(outcome, stream.getvalue(), counts)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run of 8 steps, saved after 4 and 8, never interrupted."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  return workdir, run(workdir, runs.settings(pipeline=PIPELINE))


@pytest.fixture
def copy(whole, tmp_path):
  return shutil.copytree(whole[0], tmp_path / "copy")


def losses(workdir):
  return [row["loss"] for row in runs.rows(workdir)]


def arrays(outcome):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(outcome.state)]


def test_a_run_leaves_its_figures(whole):
  workdir, ran = whole
  rows = runs.rows(workdir)
  assert [row["step"] for row in rows] == list(range(8))
  assert all(
    set(row) >= {"loss", "grad_norm", "learning_rate", "dropped_fraction", "skipped_steps",
                 "load_balance_loss", "router_z_loss", "tokens_per_s"}
    for row in rows
  )  # fmt: skip
  assert [row["eval_loss"] is not None for row in rows] == [False] * 3 + [True] + [False] * 3 + [
    True
  ]
  assert rows[-1]["loss"] < rows[0]["loss"]
  assert all(len(row["load_max_over_mean"]) == 4 for row in rows)
  assert all(row["dropped_fraction"] == 0 for row in rows)  # tiny.py has room for all
  assert all(row["tokens_per_s"] > 0 for row in rows[1:])
  assert [row["learning_rate"] for row in rows[:3]] == pytest.approx([0, 1.5e-3, 3e-3])

  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["eval_loss"] == rows[-1]["eval_loss"] == ran.outcome.eval_loss
  assert summary["bigram_loss"] == ran.outcome.bigram_loss < np.log(256)
  assert summary["steps"] == 8
  assert summary["train_seconds"] > summary["compile_seconds"] > 0
  assert summary["tokens_per_s"] > 0
  parameters = jax.tree.leaves(ran.outcome.state.parameters)
  assert summary["num_parameters"] == sum(leaf.size for leaf in parameters)
  assert json.loads((workdir / "config.json").read_text())["mesh"]["stage"] == 2
  assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
  assert list((workdir / "tensorboard").iterdir())
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["4", "8"]


@pytest.mark.slow
def test_load_figures_are_in_logical_order(whole, tmp_path):
  # The same first step without chunks, where the layers lie in logical order.
  plain = runs.settings(train={"steps": 8})
  run(tmp_path / "plain", plain, stop_after=1)
  first, same = runs.rows(whole[0])[0], runs.rows(tmp_path / "plain")[0]
  assert first["load_max_over_mean"] == same["load_max_over_mean"]
  assert len(set(first["load_max_over_mean"])) > 1
  assert first["loss"] == pytest.approx(same["loss"], rel=1e-6)


def test_steps_after_the_first_compile_nothing(whole):
  counts = whole[1].num_compiled
  assert counts[0] > 0
  # The first step also compiled how processes agree to stop, unless this one had done so before.
  assert counts[1] == counts[2] == counts[3]
  assert counts[5:] == counts[4:-1]  # the fourth step also saved and evaluated for the first time
  before = len(_compiled)
  jax.jit(lambda x: x + len(counts))(0)
  assert len(_compiled) > before  # the counter counts


def test_resumed_on_the_same_mesh_it_is_bit_identical_and_passes_over_a_damaged_checkpoint(
  whole, copy
):
  workdir, never_stopped = whole
  runs.flip_a_bit(copy / "checkpoints" / "8")
  resumed = run(copy, runs.settings(pipeline=PIPELINE))
  assert "checkpoints/8 is damaged" in resumed.text
  assert "resumed after step 4" in resumed.text
  assert "changed" not in resumed.text
  names = ("step", "loss", "eval_loss", "grad_norm", "load_max_over_mean", "learning_rate")
  figures = lambda folder: [[row[name] for name in names] for row in runs.rows(folder)]
  assert figures(copy) == figures(workdir)
  for left, right in zip(arrays(resumed.outcome), arrays(never_stopped.outcome), strict=True):
    np.testing.assert_array_equal(left, right)
  assert (copy / "checkpoints" / "8.damaged").is_dir()


@pytest.mark.parametrize(("steps", "is_over"), [((2, 4), True), ((2, 5), False)])
def test_a_run_resumed_past_the_steps_to_profile_says_so(whole, copy, steps, is_over, monkeypatch):
  shutil.rmtree(copy / "checkpoints" / "8")
  monkeypatch.setattr(loop._Run, "train", lambda *given: None)
  ran = run(copy, runs.settings(pipeline=PIPELINE), profile_steps=steps)
  said = "nothing is profiled: profile_steps=2:4 are over, the run goes on with step 4"
  assert (said in ran.text) == is_over


def test_resumed_with_streamed_weights_it_goes_on_from_the_same_files(whole, copy):
  """A checkpoint knows nothing of it: streaming may begin, and end, at any step."""
  workdir, never_stopped = whole
  shutil.rmtree(copy / "checkpoints" / "8")
  streamed = runs.settings(pipeline=PIPELINE | {"prefetch_layers": 1})
  stopped = run(copy, streamed, stop_after=2)
  assert "resumed after step 4" in stopped.text
  assert "pipeline.prefetch_layers 0 -> 1" in stopped.text
  assert stopped.outcome.step == 6
  resumed = run(copy, runs.settings(pipeline=PIPELINE))
  assert "resumed after step 6" in resumed.text
  assert losses(copy) == pytest.approx(losses(workdir), rel=1e-5)
  assert resumed.outcome.eval_loss == pytest.approx(never_stopped.outcome.eval_loss, rel=1e-5)


@pytest.mark.slow
def test_resumed_on_other_meshes_it_goes_on_to_float_tolerance(whole, copy):
  workdir, never_stopped = whole
  shutil.rmtree(copy / "checkpoints" / "8")
  wide = runs.settings(mesh={"expert": 4, "tensor": 2, "stage": 1})
  stopped = run(copy, wide, stop_after=2)
  assert not stopped.outcome.is_finished
  assert stopped.outcome.step == 6
  assert "stopped and saved after step 6 of 8" in stopped.text
  for change in ("mesh.expert 2 -> 4", "mesh.stage 2 -> 1", "pipeline.chunks 2 -> 1"):
    assert change in stopped.text
  single = runs.settings(mesh={"expert": 1, "tensor": 1, "stage": 1})
  resumed = run(copy, single, devices=jax.devices()[3:4])
  assert "resumed after step 6" in resumed.text
  assert losses(copy) == pytest.approx(losses(workdir), rel=1e-5)
  assert resumed.outcome.eval_loss == pytest.approx(never_stopped.outcome.eval_loss, rel=1e-5)


def test_a_finished_run_says_so_and_is_left_as_it_is(whole, copy):
  before = runs.digests(copy)
  again = run(copy, runs.settings(pipeline=PIPELINE))
  assert "holds a finished run: 8 steps" in again.text
  assert again.num_compiled == []  # not one step
  assert again.outcome.is_finished
  assert again.outcome.eval_loss == whole[1].outcome.eval_loss
  assert runs.digests(copy) == before


def test_steps_that_are_not_finite_are_skipped_and_then_stop_the_run(copy):
  # Goes on from a finished run, for more steps and at an absurd rate.
  settings = runs.settings(
    pipeline=PIPELINE, train={"steps": 40, "learning_rate": 1e30, "checkpoint_every": 3}
  )
  before = runs.digests(copy / "checkpoints")
  stream = io.StringIO()
  with pytest.raises(log.Diverged) as error:
    loop.train(settings, copy, stream=stream)
  assert f"last good checkpoint is {copy}/checkpoints/8;" in str(error.value)
  assert "5 steps in a row" in str(error.value)
  assert "\n" not in str(error.value)
  text = stream.getvalue()
  assert "train.steps 8 -> 40, train.learning_rate 0.003 -> 1e+30" in text
  rows = runs.rows(copy)
  assert [row["skipped_steps"] for row in rows[-5:]] == [1, 2, 3, 4, 5]
  assert all(row["loss"] is None or row["grad_norm"] is None for row in rows[-5:])
  assert rows[8]["loss"] < 10  # the first step after the checkpoint was sound
  # Not one checkpoint is of a time when steps were skipped, and the good one is as it was.
  saved = {int(path.name) for path in (copy / "checkpoints").iterdir()}
  assert max(saved) <= len(rows) - 5
  after = runs.digests(copy / "checkpoints")
  assert {n: d for n, d in after.items() if n.startswith("8/")} == {
    n: d for n, d in before.items() if n.startswith("8/")
  }


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model": {"layers": 8}}, "is of another model: .*layers.*expected"),
    (
      {"model": {"experts_per_token": 1, "normalize_choices": False}},
      "model.experts_per_token is 2 there and 1 in this",
    ),
    ({"model": {"experts_per_token": 1}}, "weighs the one expert of .* choose"),
    ({"model": {"vocab": 512}}, "is of another model: "),
    ({"model": {"tied_embeddings": True}}, "is of another model: .*no such leaf"),
    ({"data": {"tokenizer": "bpe"}}, "tokenizer.json is missing"),
    ({"mesh": {"expert": 4}}, "needs 16 devices, found 8; choose mesh.expert=2"),
    ({"data": {"paths": "/nowhere/*.txt"}}, "/nowhere/.*matches no file"),
    ({"train": {"sequence": 1 << 20}}, "train.sequence=1048576 needs at least"),
    (
      {
        "train": {"steps": 12},
        "moe": {"dispatch": "dropless"},
        "balance": {"every": 1, "chip": "planned"},
      },
      "chip planned has no peak for dtype .float32.; choose",
    ),
  ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_touched(whole, fields, message):
  before = runs.digests(whole[0])
  fields = {"pipeline": PIPELINE, **fields}
  with pytest.raises(ValueError, match=message) as error:
    loop.train(runs.settings(**fields), whole[0], stream=io.StringIO())
  assert "\n" not in str(error.value)
  assert runs.digests(whole[0]) == before


def rewrite_config(checkpoint, change):
  """Changes the config that a checkpoint was saved with."""
  meta = json.loads((checkpoint / "meta.json").read_text())
  change(meta["meta"]["config"])
  (checkpoint / "meta.json").write_text(json.dumps(meta))
  (checkpoint / manifest.NAME).unlink()
  manifest.write(checkpoint)


def test_a_mesh_on_which_tokens_choose_other_experts_is_refused_and_a_limit_that_changed_is_not(
  copy,
):
  rewrite_config(copy / "checkpoints" / "8", lambda saved: saved["moe"].update(hosts_per_token=1))
  on_one_host = {"hosts_per_token": 1, "expert_ranks_per_host": 2}
  with pytest.raises(ValueError, match=r"chose among those of 1 of 2 hosts; .* choose") as error:
    run(copy, runs.settings(pipeline=PIPELINE, moe=on_one_host))
  assert "among all experts; choose moe.expert_ranks_per_host=1, or" in str(error.value)
  free = run(copy, runs.settings(pipeline=PIPELINE))
  assert "tokens choose among all experts, until then among those of 1 of 2 hosts" in free.text


@pytest.mark.parametrize(
  ("saved", "now", "message"),
  [
    ((8, 2, 1), (4, 2, 1), "of 1 of 4 hosts; .* 1 of 2 hosts; choose moe.expert_ranks_per_host=1"),
    ((8, 2, 1), (2, 2, 1), "among all experts; choose mesh.expert from multiples of 4"),
    (
      (4, 2, 2),
      (8, 2, 2),
      "chose among all experts; .* 2 of 4 hosts; choose moe.hosts_per_token=0",
    ),
    ((8, 2, 1), (4, 1, 1), None),
    ((8, 2, 0), (4, 1, 0), None),
    ((4, 2, 2), (8, 2, 0), None),
  ],
)
def test_which_hosts_a_token_may_choose_stays_or_is_named(saved, now, message):
  of = lambda expert, ranks, hosts: runs.settings(
    mesh={"expert": expert, "stage": 1, "tensor": 1},
    moe={"expert_ranks_per_host": ranks, "hosts_per_token": hosts},
    model={"experts_per_token": 1},
  )
  check = lambda: resume._other_choice(8, config.as_dict(of(*saved)), of(*now))
  if message is None:
    assert check() == []
  else:
    with pytest.raises(ValueError, match=message) as error:
      check()
    assert "\n" not in str(error.value)


def test_a_field_of_the_model_that_is_younger_than_the_checkpoint_had_its_default(copy):
  rewrite_config(copy / "checkpoints" / "8", lambda saved: saved["model"].pop("clip_qkv"))
  with pytest.raises(ValueError, match=r"model\.clip_qkv is 0\.0 there and 0\.5 in this config"):
    loop.train(
      runs.settings(pipeline=PIPELINE, model={"clip_qkv": 0.5}), copy, stream=io.StringIO()
    )


def test_a_second_run_in_the_same_folder_is_refused_and_touches_nothing(whole):
  workdir, _ = whole
  with lock.held(workdir):
    before = runs.digests(workdir)
    with pytest.raises(ValueError, match=f"another run writes to {workdir}; stop it, or name"):
      run(workdir, runs.settings(pipeline=PIPELINE))
    assert runs.digests(workdir) == before


@pytest.mark.parametrize("is_ours", [True, False])
def test_processes_with_other_data_are_all_refused(tmp_path, monkeypatch, is_ours):
  def of_each(mine):
    digests = [np.zeros(32, np.uint8), mine]
    return np.stack(digests if is_ours else digests[::-1])

  monkeypatch.setattr(processes, "of_each", of_each)
  with pytest.raises(ValueError, match="1 of 2 differ from process 0, or failed to read"):
    run(tmp_path / "run", runs.settings())
  nowhere = runs.settings(data={"paths": "/nowhere/*.txt"})
  with pytest.raises(ValueError, match=r"/nowhere/.*matches no file"):
    run(tmp_path / "run", nowhere)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", [True, False])
def test_an_error_waits_for_no_other_process(copy, monkeypatch, fails):
  def train(*given):
    if fails:
      raise OSError("disk full")

  closed, close = [], Checkpoints.close

  def note(self, **given):
    closed.append(given)
    close(self, **given)

  monkeypatch.setattr(loop._Run, "train", train)
  monkeypatch.setattr(Checkpoints, "close", note)
  with pytest.raises(OSError, match="disk full") if fails else contextlib.nullcontext():
    run(copy, runs.settings(pipeline=PIPELINE, train={"steps": 9}))
  assert closed == [{"failed": fails}]


def test_a_profile_after_the_last_step_is_refused(tmp_path):
  with pytest.raises(ValueError, match="profile_steps=8:9 begins after the last step of"):
    loop.train(runs.settings(), tmp_path / "run", profile_steps=(8, 9), stream=io.StringIO())
  assert not (tmp_path / "run").exists()


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew(copy):
  for checkpoint in (copy / "checkpoints").iterdir():
    runs.flip_a_bit(checkpoint)
  before = runs.digests(copy)
  with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
    loop.train(runs.settings(pipeline=PIPELINE), copy, stream=io.StringIO())
  assert runs.digests(copy) == before
