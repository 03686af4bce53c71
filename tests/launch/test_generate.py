"""The program that a user starts on a run's folder: the text it prints, and bad input."""

import dataclasses
import io
import json
import subprocess
import sys

import jax
import pytest

from launch import trained
from moe_jax import config
from moe_jax.serve.generate import Generator
from moe_jax.train import loop
from tests import runs


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """The folder of a run of two steps, and what its model says greedily after `def `."""
  folder = tmp_path_factory.mktemp("runs") / "tiny"
  settings = runs.settings(
    mesh={"expert": 1, "tensor": 1, "stage": 1},
    pipeline={"micro_batches": 1},
    train={"batch": 4, "sequence": 32, "steps": 2, "warmup_steps": 1},
  )
  with jax.numpy_dtype_promotion("standard"):
    outcome = loop.train(settings, folder, stream=io.StringIO(), devices=jax.devices()[:1])
  serve = dataclasses.replace(settings.serve, slots=1, max_tokens=32)
  generate = Generator(dataclasses.replace(settings, serve=serve), outcome.mesh)
  parameters = generate.programs.parameters(outcome.state.parameters)
  (new,) = generate(parameters, [list(b"def ")], new_tokens=28)
  return folder, "def " + bytes(new).decode(errors="replace")


def generate(workdir, *flags):
  command = [sys.executable, "-W", "error", "-m", "launch.generate", f"--workdir={workdir}"]
  return subprocess.run([*command, *flags], cwd=runs.ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("mesh", [(), ("--mesh=2x2x2", "--virtual_devices=8")], ids=str)
def test_it_prints_what_the_trained_model_says(workdir, mesh):
  folder, expected = workdir
  found = generate(folder, "--prompt=def ", "--temperature=0", *mesh)
  assert (found.returncode, found.stderr) == (0, "")
  assert found.stdout == expected + "\n"


@pytest.mark.slow
def test_sampled_text_depends_on_its_seed(workdir):
  flags = ("--prompt=def ", "--new_tokens=8", "--top_k=50", "--top_p=0.99", "--kv_dtype=int8")
  found = [generate(workdir[0], *flags, f"--seed={seed}") for seed in (1, 2)]
  assert [each.returncode for each in found] == [0, 0], found[0].stderr
  assert all(each.stdout.startswith("def ") for each in found)
  assert found[0].stdout != found[1].stdout


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--prompt=",), "--prompt of 0 tokens and --new_tokens=0: the model was trained on windows"),
    (("--prompt=" + "x" * 32,), "--prompt of 32 tokens"),
    (("--prompt=x", "--new_tokens=32"), "--prompt of 1 tokens and --new_tokens=32"),
    (("--prompt=x", "--mesh=2x2"), "--mesh=2x2 is not expert x tensor x stage"),
    (("--prompt=x", "--mesh=3x1x1"), "model.experts=8 is not divisible by mesh.expert=3"),
    (("--prompt=x", "--mesh=4x4x1"), "needs 16 devices, found 8"),
    (("--prompt=x", "--kv_dtype=int4"), "serve.kv_dtype='int4' is not one of"),
    (("--prompt=x", "--top_p=2"), "--top_p=2"),
    (("--prompt=x", "--temperature=2e-38"), "temperature=2e-38 is too low to divide by; choose 0"),
    ((), "--prompt is missing"),
    (("--prompt=x", "--promt=y"), "did you mean --prompt?"),
    (("--prompt=x", "--workdir="), "--workdir=: it is empty; name a folder"),
  ],
)
def test_bad_input_takes_one_line(workdir, flags, message):
  found = generate(workdir[0], *flags)
  assert found.returncode == 2
  assert message in found.stderr
  assert len(found.stderr.splitlines()) == 1
  assert found.stdout == ""


def test_a_folder_without_a_run_is_named(tmp_path, workdir):
  assert f"{tmp_path / 'config.json'} is missing" in generate(tmp_path, "--prompt=x").stderr
  settings = json.loads((workdir[0] / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(settings))
  assert "holds no checkpoint" in generate(tmp_path, "--prompt=x").stderr
  (tmp_path / "config.json").write_text("{")
  assert "config.json is not JSON" in generate(tmp_path, "--prompt=x").stderr
  for section in ("model", "mesh", "moe", "train", "data"):
    without = {name: fields for name, fields in settings.items() if name != section}
    (tmp_path / "config.json").write_text(json.dumps(without))
    with pytest.raises(ValueError, match=f"config.json has no {section} section; name the folder"):
      trained.saved(tmp_path)


def test_hosts_that_the_router_tells_apart_are_the_models(tmp_path):
  limited = runs.settings(
    mesh={"expert": 8, "tensor": 1, "stage": 1},
    moe={"dispatch": "two_level", "expert_ranks_per_host": 4, "hosts_per_token": 1},
    train={"batch": 32},
  )
  (tmp_path / "config.json").write_text(json.dumps(config.as_dict(limited)))
  on = lambda *mesh: trained.settings_of(tmp_path, config.Mesh(*mesh), config.Serve())[0].moe
  assert on(8) == config.Moe(hosts_per_token=1, expert_ranks_per_host=4)
  assert on(2, 4) == config.Moe(hosts_per_token=1, expert_ranks_per_host=1)
  with pytest.raises(
    ValueError, match=r"moe.hosts_per_token=1 .* mesh.expert=1 does not fall into 2"
  ):
    on(1, 8)
