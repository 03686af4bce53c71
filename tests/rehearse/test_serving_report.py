"""Small prefill and decode, compiled for a pod that is not there, by the users' command."""

import importlib.util
import json

import pytest

from moe_jax import config as config_lib
from moe_jax.model import flash
from moe_jax.plan import cost
from moe_jax.rehearse import memory, text, workload
from tests.rehearse.command import rehearse

if not importlib.util.find_spec("jax_plugins"):
  pytest.skip("the rehearse extra is not installed", allow_module_level=True)

# More work than tiny has, so that what formulas leave out is small beside it.
SIZES = [
  "--config.model.d_model=128", "--config.model.expert_hidden=128", "--config.model.vocab=512",
  "--config.model.head_dim=16", "--config.model.dtype=bfloat16", "--config.serve.slots=8",
  "--config.serve.max_tokens=320", "--config.serve.prefill_chunk=256",
  "--config.serve.prefill_rows=2", "--config.serve.prefill_micro_batches=4",
  "--config.serve.kv_dtype=bfloat16", "--config.serve.decode_tokens=4",
]  # fmt: skip
PROMPTS, SEQUENCES, GPUS = 2 * 2 * 4, 8 * 2 * 2, 8


@pytest.fixture(scope="module", params=["prefill", "decode"])
def done(request, tmp_path_factory):
  path = tmp_path_factory.mktemp(request.param) / "report.json"
  words = [f"--step={request.param}", "--pod=h100:2x4", "--once", f"--json={path}", *SIZES]
  finished = rehearse(*words)
  assert finished.returncode == 0, finished.stderr
  return request.param, finished.stdout, json.loads(path.read_text())


@pytest.mark.slow
def test_the_keys_are_those_of_training(done):
  step, _, report = done
  assert {"memory_bytes", "collectives", "exposure", "prediction", "claims"} <= set(report)
  keys = ("kind", "axis", "phase", "link", "count", "bytes_per_gpu", "seconds", "hidden_seconds")
  assert report["collectives"] and all(set(keys) <= set(row) for row in report["collectives"])
  assert {"hidden_fraction", "hidden_of_hideable"} <= set(report["exposure"])
  for found in (report["prediction"], report["planned"]["prediction"]):
    assert (found["ttft_s"] is not None) == (step == "prefill")
    assert (found["token_s"] is not None) == (step == "decode")
    assert 0 < found["bubble_fraction"] < 1
  assert report["workload"]["step"] == step


@pytest.mark.slow
def test_what_is_not_known_is_assumed_and_said(done):
  step, shown, report = done
  assert report["unknown"] == {}
  assumed = {"prefill": ["further_rounds: 0 turns", "sampling"], "decode": ["sampling"]}[step]
  found = list(report["assumed"])
  assert len(found) == len(assumed) and all(map(lambda a, f: a in f, assumed, found))
  assert all(name in shown for name in found)
  assert shown.rstrip() == text.render(report)


@pytest.mark.slow
def test_memory_holds_the_cache(done):
  _, _, report = done
  found = report["memory_bytes"]
  assert sum(found[part] for part in memory.PARTS) == found["total"]
  assert found["optimizer"] == found["gradients"] == found["compute_copies"] == 0
  # Keys and values, bfloat16: 4 layers, 8 heads of 16.
  assert found["cache"] == 2 * 2 * SEQUENCES * 320 * 4 * 8 * 16 / GPUS


@pytest.mark.slow
def test_times_are_those_of_the_step(done):
  step, _, report = done
  found, work = report["prediction"], report["workload"]
  assert work["sequences"] == {"prefill": PROMPTS, "decode": SEQUENCES}[step]
  assert work["tokens_each"] == {"prefill": 256, "decode": 4}[step]
  assert work["cached_tokens"] == {"prefill": 0, "decode": 316}[step]
  tokens = work["sequences"] * work["tokens_each"]
  rate = tokens / GPUS / (found["step_s"] * 1e3)
  assert found["tokens_per_ms_per_gpu"] == pytest.approx(rate)
  assert found["step_s"] == pytest.approx(
    {"prefill": found["ttft_s"], "decode": 4 * (found["token_s"] or 0)}[step]
  )


# Of decode XLA makes sums out of products with one row, which count as bytes alone.
@pytest.mark.slow
@pytest.mark.parametrize("done", ["prefill"], indirect=True)
def test_operations_are_those_of_the_formulas(done):
  _, _, report = done
  settings = config_lib.from_mapping(report["config"])
  table = workload.prefill(settings).table
  idle = table.ticks_by_kind["forward"] / table.units_by_kind["forward"]  # masked cells run too
  pairs = PROMPTS * cost.blockwise_pairs(256, flash.BLOCK)
  tokens, D, heads = PROMPTS * 256, 128, 8 * 16
  attention = 4 * (2 * tokens * D * 4 * heads + 4 * pairs * heads) * idle / GPUS
  executed = report["flops"]["executed_by_phase"]
  assert executed["attention"] == pytest.approx(attention, rel=0.01)
  assert executed["head"] == pytest.approx(2 * PROMPTS * D * 512 / GPUS, rel=0.01)
  # Whole blocks of rows, as many as there is room for: those of an even load and some more.
  rows = tokens * 2 * 4 * idle / GPUS
  assert 1 < executed["experts"] / (rows * 6 * D * 128) < 2.5


@pytest.mark.slow
def test_the_first_token_is_claimed_by_prefill_alone(done):
  step, _, report = done
  (row,) = (row for row in report["claims"] if row["claim"].startswith("time to first token"))
  assert row["asked"].startswith("< 10 s")
  assert row["holds"] is None  # nothing is as long as asked here
  assert ("s on h100" in row["found"] and "of 256 tokens" in row["found"]) == (step == "prefill")


@pytest.mark.parametrize(
  ("cache", "activations", "said"), [(8, 1, "serve.kv_dtype=int8"), (1, 8, "serve.prefill_chunk")]
)
def test_what_does_not_fit_is_answered_by_serving_fields(cache, activations, said):
  found = {"cache": cache, "activations_and_buffers": activations, "total": 10}
  assert said in memory.advice(found, config_lib.Config())


@pytest.mark.parametrize(
  ("save", "said"),
  [("everything", "save=residuals"), ("exchanges", "save=inputs"), ("inputs", "micro_batches")],
)
def test_what_does_not_fit_in_training_is_answered_by_what_keeps_less(save, said):
  found = {"cache": 0, "activations_and_buffers": 8, "total": 10}
  settings = config_lib.Config(pipeline=config_lib.Pipeline(save=save))
  assert said in memory.advice(found, settings)


def test_an_unknown_step_ends_in_one_line():
  finished = rehearse("--pod=h100:2x4", "--step=serve", timeout_s=100)
  assert finished.returncode == 2 and finished.stdout == ""
  (line,) = finished.stderr.splitlines()
  assert line == "error: --step=serve is not one of train, prefill, decode"
