"""Folders there and back by the command, and what it answers to bad input."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from moe_jax import config
from moe_jax.interop import huggingface, tokenizer
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.train import loop
from tests import runs
from tests.interop.test_huggingface import like, random_parameters

MODEL = config.Model(
  layers=4, d_model=16, heads=8, kv_heads=8, head_dim=4, experts=8, experts_per_token=2,
  expert_hidden=16, vocab=256, dtype="float32", qk_norm="head", normalize_choices=False,
)  # fmt: skip


def convert(*flags):
  return subprocess.run(
    [sys.executable, "-W", "error", "-m", "launch.convert", *flags],
    cwd=runs.ROOT, capture_output=True, text=True, timeout=300,
  )  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
  """A folder in Hugging Face's format whose ids are bytes."""
  folder = tmp_path_factory.mktemp("convert") / "theirs"
  mesh = mesh_lib.make(config.Mesh(), jax.devices()[:1])
  parameters = random_parameters(like(MODEL, mesh))
  huggingface.save(
    folder, parameters, MODEL, np.arange(4), tokenizer.Bytes(), num_positions=16,
    end_tokens=(7,), largest_file_bytes=50_000,
  )  # fmt: skip
  return folder


@pytest.fixture(scope="module")
def imported(theirs):
  """The run's folder that the command makes of it, on another mesh."""
  workdir = theirs.with_name("imported")
  found = convert(
    f"--from={theirs}", f"--to={workdir}", "--sequence=16", "--mesh=2x2x2", "--virtual_devices=8"
  )
  assert found.returncode == 0, found.stderr
  assert found.stderr == ""
  assert found.stdout.startswith("imported ")
  return workdir


def tensors(folder):
  return {
    name: values
    for path in folder.glob("*.safetensors")
    for name, values in safetensors.load_file(path).items()
  }


def test_there_and_back_gives_the_same_weights(theirs, imported):
  back = theirs.with_name("back")
  found = convert(f"--from={imported}", f"--to={back}")
  assert found.returncode == 0, found.stderr
  assert "checkpoint 0" in found.stdout and found.stderr == ""
  assert {path.name for path in back.iterdir()} == {
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
  }  # fmt: skip
  expected, got = tensors(theirs), tensors(back)
  assert set(got) == set(expected)
  for name, values in expected.items():
    np.testing.assert_array_equal(got[name], values, err_msg=name)
  read = lambda folder: json.loads((folder / "config.json").read_text())
  assert read(back) == read(theirs)
  ids = lambda folder: tokenizer.Imported.load(folder, 256).encode("Grüße\n").tolist()
  assert ids(back) == ids(theirs) == list("Grüße\n".encode())


def test_the_run_describes_itself(imported):
  saved = config.from_mapping(json.loads((imported / "config.json").read_text()))
  assert saved.model == MODEL
  assert saved.mesh == config.Mesh(2, 2, 2)
  assert (saved.moe.dispatch, saved.data.tokenizer, saved.train.sequence) == (
    "dropless", "imported", 16,
  )  # fmt: skip
  assert not list(imported.parent.glob("*.partial"))


def test_the_window_is_what_the_model_was_trained_for(theirs, tmp_path):
  found = convert(f"--from={theirs}", f"--to={tmp_path / 'run'}")
  assert found.returncode == 0, found.stderr
  saved = config.from_mapping(json.loads((tmp_path / "run" / "config.json").read_text()))
  assert saved.train.sequence == 16


def generate(workdir):
  found = subprocess.run(
    [
      sys.executable, "-m", "launch.generate", f"--workdir={workdir}", "--prompt=def ",
      "--new_tokens=6", "--temperature=0",
    ],
    cwd=runs.ROOT, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert found.returncode == 0, found.stderr
  return found.stdout


def test_the_run_generates(imported):
  found = generate(imported)
  assert found.startswith("def ") and len(found) > len("def \n")


def test_the_run_keeps_what_ends_its_text(theirs, imported, tmp_path):
  assert huggingface.read_end_tokens(imported, MODEL.vocab) == (7,)
  assert json.loads((theirs / "config.json").read_text())["eos_token_id"] == 7
  ends = shutil.copytree(imported, tmp_path / "ends")
  every = json.dumps({"eos_token_id": list(range(MODEL.vocab))})
  (ends / "generation_config.json").write_text(every)
  assert generate(ends) == "def \n"


@pytest.mark.slow
def test_training_goes_on_from_what_was_imported(imported, tmp_path, standard_dtype_promotion):
  """As any run, on another mesh and in another order of layers; and the result is exported."""
  workdir = shutil.copytree(imported, tmp_path / "run")
  saved = json.loads((workdir / "config.json").read_text())
  settings = runs.settings(
    model=saved["model"], data={"tokenizer": "imported"},
    pipeline={"schedule": "interleaved", "chunks": 2}, train={"steps": 4},
    mesh={"expert": 2, "tensor": 2, "stage": 2},
  )  # fmt: skip
  with open(tmp_path / "output.txt", "w") as stream:
    outcome = loop.train(settings, workdir, stream=stream)
  assert "resumed after step 0" in (tmp_path / "output.txt").read_text()
  assert outcome.step == 4
  losses = [row["loss"] for row in runs.rows(workdir)]
  assert losses[-1] < losses[0]
  target = tmp_path / "trained"
  found = convert(f"--from={workdir}", f"--to={target}", "--dtype=bfloat16")
  assert found.returncode == 0, found.stderr
  assert "checkpoint 4" in found.stdout
  embedding = np.asarray(outcome.state.parameters.shared["embedding"]["table"][...])
  got = tensors(target)["model.embed_tokens.weight"]
  assert got.dtype.name == "bfloat16"
  np.testing.assert_array_equal(got, embedding.astype(got.dtype))


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--to={new}"], "error: --from is missing; folder with a model"),
    (["--from={theirs}", "--to={theirs}"], "exists already; name a new folder"),
    (["--from={new}", "--to={new}2"], "config.json is missing; name a folder"),
    (["--from={theirs}", "--to={new}", "--mesh=2x2"], "--mesh=2x2 is not expert x tensor x stage"),
    (["--from={theirs}", "--to={new}", "--mesh=0x1x1"], "mesh.expert=0 is not positive"),
    (
      ["--from={theirs}", "--to={new}", "--dtype=float16"],
      "--dtype=float16 is not one of float32, bfloat16",
    ),
    (
      ["--from={theirs}", "--to={new}", "--sequence=17"],
      "--sequence=17 is past what the model was trained for, max_position_embeddings=16 of",
    ),
    (["--from={theirs}", "--to={busy}"], "busy.partial exists already: another process writes"),
    (["--from={odd}", "--to={new}"], "has neither model_type, as Hugging Face's, nor a model"),
    (["--from={bare}", "--to={new}"], "has no tokenizer.json; fetch it from where"),
    (["--from={bare}", "--to={new}", "--tokenizer=bytes"], "holds neither model.safetensors"),
    (["--from={empty_run}", "--to={new}"], "holds no checkpoint; name the folder of a run"),
    (["--from={limited}", "--to={new}"], "was trained with moe.hosts_per_token, some of 2 hosts"),
  ],
)
def test_bad_input_gets_one_line(theirs, tmp_path, flags, message):
  made = ("odd", "bare", "empty_run", "limited", "busy.partial")
  folders = {name: tmp_path / name for name in (*made, "busy", "new")}
  for name in made:
    folders[name].mkdir()
  (folders["odd"] / "config.json").write_text("{}")
  (folders["bare"] / "config.json").write_bytes((theirs / "config.json").read_bytes())
  settings = config.as_dict(runs.settings())
  (folders["empty_run"] / "config.json").write_text(json.dumps(settings))
  settings["moe"]["hosts_per_token"] = 1
  (folders["limited"] / "config.json").write_text(json.dumps(settings))
  found = convert(*(flag.format(theirs=theirs, **folders) for flag in flags))
  assert found.returncode == 2
  assert message in found.stderr
  assert found.stderr.count("\n") == 1 and found.stdout == ""
  assert not folders["new"].exists()
