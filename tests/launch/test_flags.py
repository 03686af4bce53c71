"""Every mistake that a command line can hold: one line, exit code 2, what is wrong, what is right.

Through subprocesses of a small program, since exit codes and stderr are what is promised.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny.py")
WORKDIR = "--workdir=runs/x"

PROGRAM = '''"""Prints what it was given.

One paragraph about it.
"""
import sys
from absl import flags
from launch.flags import run

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
_REPEATS = flags.DEFINE_integer("repeats", 3, "how often", lower_bound=1)
_RATE = flags.DEFINE_float("rate", 1.0, "requests per second")
flags.register_validator("rate", lambda rate: rate > 0, "must be above 0")
_MODE = flags.DEFINE_enum("mode", "fast", ["fast", "slow"], "how")
_LOUD = flags.DEFINE_boolean("loud", False, "whether to shout")

def main(config):
  assert "jax" not in sys.modules
  print(config)
  print(_WORKDIR.value, _REPEATS.value, _MODE.value, _LOUD.value)

if __name__ == "__main__":
  run(main)
'''


@dataclasses.dataclass(frozen=True)
class Finished:
  code: int
  out: str
  err: str


@pytest.fixture
def launch(tmp_path):
  """Runs a program's text with arguments, in an empty folder."""

  def launch(*arguments, program=PROGRAM, **environment):
    file = tmp_path / "program.py"
    file.write_text(program)
    done = subprocess.run(
      [sys.executable, "-W", "error", str(file), *arguments],
      cwd=tmp_path,
      env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **environment},
      capture_output=True,
      text=True,
      timeout=120,
    )
    return Finished(done.returncode, done.stdout, done.stderr)

  return launch


def assert_one_line(finished, *parts):
  assert finished.code == 2, finished
  assert finished.out == ""
  assert finished.err.startswith("error: ") and finished.err.endswith("\n")
  assert finished.err.count("\n") == 1, finished.err
  for part in parts:
    assert part in finished.err, (part, finished.err)


def test_the_config_arrives_frozen_and_overridden(launch):
  done = launch(
    "--config.train.steps=20",  # before the file, and a field that the file sets
    "--config", TINY,
    "--config.train.weight_decay=1",  # a field that the file leaves out; an int for a float
    "--config.model.tied_embeddings",
    "--noconfig.moe.spill",
    "--config.data.paths=a/*.py,b",
    WORKDIR, "--mode=slow", "--loud",
  )  # fmt: skip
  assert done.code == 0, done.err
  assert done.err == ""
  for part in (
    "steps=20", "weight_decay=1.0", "tied_embeddings=True", "spill=False", "paths='a/*.py,b'",
    "d_model=16", "runs/x 3 slow True",
  ):  # fmt: skip
    assert part in done.out


@pytest.mark.parametrize(
  ("arguments", "parts"),
  [
    (["--config.train.stepz=3"], ["--config.train.stepz=3", "did you mean train.steps?"]),
    (["--config.train.stepz", "3"], ["--config.train.stepz", "did you mean train.steps?"]),
    (["--config.trian.steps=3"], ["--config.trian.steps=3", "did you mean train.steps?"]),
    (["--config.model.batch=3"], ["--config.model.batch=3", "did you mean train.batch?"]),
    (["--config.steps=3"], ["--config.steps=3", "did you mean train.steps?"]),
    (["--config.zebra.x=3"], ["--config.zebra.x=3", "sections are model, mesh"]),
    (["--config.mesh.zebra=3"], ["--config.mesh.zebra=3", "mesh has expert, tensor, stage"]),
    (["--config.train=3"], ["--config.train=3", "train.batch"]),
    (["--config.train.steps.x=3"], ["--config.train.steps.x=3", "did you mean train.steps?"]),
    (["--noconfig.train.steps"], ["--noconfig.train.steps", "did you mean --config.train.steps?"]),
    (["--confg.train.steps=3"], ["--confg.train.steps=3", "did you mean --config.train.steps?"]),
    (["--config.train.steps=ten"], ["--config.train.steps=ten", "expected an integer"]),
    (["--config.train.steps=1.5"], ["--config.train.steps=1.5", "expected an integer"]),
    (["--config.train.steps="], ["--config.train.steps=", "expected an integer"]),
    (["--config.train.steps"], ["--config.train.steps", "Missing value"]),
    (["--config.train.learning_rate=x"], ["--config.train.learning_rate=x", "expected a number"]),
    (["--config.train.learning_rate=nan"], ["train.learning_rate=nan", "not a finite number"]),
    (["--config.moe.spill=maybe"], ["--config.moe.spill=maybe", "expected true or false"]),
    (["--config.train.steps=-1"], ["train.steps=-1", "choose at least 1"]),
    (["--config.model.dtype=float16"], ["model.dtype='float16'", "did you mean bfloat16?"]),
    (["--config.mesh.tensor=3"], ["model.heads=8", "mesh.tensor=3", "1, 2, 4, 8", "model.heads=9"]),
    (["--config.model.vocab=1234567890123"], ["model.vocab=1234567890123", "choose"]),
    (["--workdri=x"], ["--workdri=x", "did you mean --workdir?"]),
    (["--zebra=x"], ["--zebra=x", "see --help"]),
    (["--repeats=many"], ["--repeats=many", "expected a positive integer"]),
    (["--repeats=0"], ["--repeats=0", "expected a positive integer"]),
    (["--rate=fast"], ["--rate=fast", "expected a number"]),
    (["--rate=-1"], ["error: --rate=-1.0: must be above 0"]),
    (["--mode=fsat"], ["--mode=fsat", "fast, slow", "did you mean fast?"]),
    (["--loud=maybe"], ["--loud=maybe", "expected true or false"]),
    (["--noloud=3"], ["--noloud=3", "does not take an argument"]),
    (["--norepeats"], ["--norepeats", "did you mean --repeats?"]),
    (["train"], ["train does not belong to a flag", "--name=value"]),
    (["config.train.steps=3"], ["did you mean --config.train.steps=3?"]),
    (["--", "--repeats=4"], ["--repeats=4", "does not belong to a flag"]),
    (["--", "--config=x.py"], ["--config=x.py does not belong to a flag"]),
    (["--", "--config.zebra.x=3"], ["--config.zebra.x=3 does not belong to a flag"]),
    (["--flagfile=missing"], ["missing"]),
    (["--config=x.py"], ["--config is given twice", TINY, "x.py"]),
    (["--config", "x.py"], ["--config is given twice", TINY, "x.py"]),
    (["--config"], ["--config is given twice", TINY]),
  ],
)
def test_a_mistyped_command_line(launch, arguments, parts):
  assert_one_line(launch(f"--config={TINY}", WORKDIR, *arguments), *parts)


def test_a_stream_of_few_characters_takes_any_text(launch):
  program = PROGRAM.replace("print(config)", 'print("\u2019", config)')
  finished = launch(f"--config={TINY}", WORKDIR, program=program, PYTHONIOENCODING="ascii")
  assert (finished.code, finished.err) == (0, "")
  assert finished.out.startswith("\\u2019 Config(")


def test_a_required_flag_that_is_missing(launch):
  assert_one_line(launch(f"--config={TINY}"), "--workdir is missing", "folder of the run")
  assert_one_line(launch(WORKDIR), "--config is missing", "configs/laptop.py")
  assert_one_line(launch(WORKDIR, "--confg=x.py"), "--config is missing, got --confg; give a file")
  assert_one_line(launch(WORKDIR, "--config"), "--config has no file")
  assert_one_line(launch(WORKDIR, "--config="), "--config has no file")
  assert_one_line(launch("--config", WORKDIR), "--config has no file", WORKDIR)


CONFIG_FILES = {
  "syntax": ("def get_config(:\n  pass\n", ["line 1: SyntaxError", "invalid syntax"]),
  "no_function": ("def get_confg():\n  pass\n", ["no function get_config()"]),
  "arguments": ("def get_config(size):\n  pass\n", ["TypeError", "missing 1 required"]),
  "raises": ("def get_config():\n\n  return 1 / 0\n", ["line 3: ZeroDivisionError"]),
  "lines": ("def get_config():\n  raise KeyError('a\\nb')\n", ["line 2: KeyError"]),
  "exits": ("import sys\nsys.exit(0)\n", ["line 2: SystemExit"]),
  "imports": ("import no_such_module\n", ["line 1: ModuleNotFoundError", "no_such_module"]),
  "binary": ("x = '\0'\n", ["null bytes"]),
  "nothing": ("def get_config():\n  pass\n", ["returned None", "return an ml_collections"]),
  "plain": ("def get_config():\n  return {'train': {}}\n", ["of type dict", "ConfigDict"]),
  "section": ("CONFIG({'trian': {}})", ["trian is not a config section", "did you mean train?"]),
  "field": ("CONFIG({'train': {'stepz': 3}})", ["train.stepz", "did you mean train.steps?"]),
  "type": ("CONFIG({'train': {'steps': '3'}})", ["train.steps='3'", "expected int"]),
  "scalar": ("CONFIG({'train': 3})", ["train=3 is of type int", "expected a mapping"]),
  "placeholder": (
    "CONFIG({'train': {'steps': PLACEHOLDER}})",
    ["train.steps=None", "expected int"],
  ),
  "sizes": ("CONFIG({'mesh': {'tensor': 3}})", ["model.heads=16", "mesh.tensor=3"]),
}


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_a_broken_config_file(launch, tmp_path, name):
  text, parts = CONFIG_FILES[name]
  if text.startswith("CONFIG"):
    text = (
      "from ml_collections.config_dict import ConfigDict as CONFIG, placeholder\n"
      f"PLACEHOLDER = placeholder(int)\ndef get_config():\n  return {text}\n"
    )
  (tmp_path / f"{name}.py").write_text(text)
  assert_one_line(launch(f"--config={name}.py", WORKDIR), f"--config={name}.py: ", *parts)


def test_a_config_file_that_is_not_there(launch, tmp_path):
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "laptop.py").touch()
  (tmp_path / "configs" / "__init__.py").touch()
  for path, part in {
    "configs/laptob.py": "did you mean configs/laptop.py?",
    "configs/zebra.py": "configs has laptop.py",
    "configs": "is a folder; give a Python file, such as configs/laptop.py",
    "confgs/laptop.py": "nor a folder confgs",
  }.items():
    assert_one_line(launch(f"--config={path}", WORKDIR), f"--config={path}: ", part)


def test_a_field_that_refers_to_another_follows_it(launch, tmp_path):
  (tmp_path / "linked.py").write_text(
    "from ml_collections import ConfigDict\n"
    "def get_config():\n"
    "  config = ConfigDict({'pipeline': {'micro_batches': 2}, 'train': {}})\n"
    "  config.train.batch = config.pipeline.get_ref('micro_batches') * 8\n"
    "  return config\n"
  )
  done = launch("--config=linked.py", "--config.pipeline.micro_batches=3", WORKDIR)
  assert done.code == 0, done.err
  assert "micro_batches=3" in done.out and "batch=24" in done.out


def test_help_is_short_and_names_the_programs_own_flags(launch):
  for word in ("--help", "-h"):
    done = launch(word, "--nonsense")
    assert done.code == 0 and done.err == ""
    assert done.out.startswith("Prints what it was given.\n\nOne paragraph about it.\n")
    for part in ("--config=FILE", "(required)", "--workdir", "folder of the run", "--traceback"):
      assert part in done.out
    assert "--repeats=INT" in done.out and "how often (default 3)" in done.out
    assert len(done.out.splitlines()) < 20


def test_helpfull_lists_config_fields_and_library_flags(launch):
  done = launch("--helpfull")
  assert done.code == 0 and done.err == ""
  assert "--config.train.learning_rate=FLOAT" in done.out
  assert "--verbosity" in done.out  # absl.logging's


def program_that(statement, arguments="main, config=False"):
  return f"from launch.flags import run\ndef main(*_):\n  {statement}\nrun({arguments})\n"


def test_a_program_without_config(launch):
  assert launch(program=program_that("print('ran')")).out == "ran\n"
  assert launch(program=program_that("return 3")).code == 3
  done = launch("--config=x.py", program=program_that("print('ran')"))
  assert_one_line(done, "--config=x.py", "takes no --config")


def test_a_default_config_can_be_overridden(launch):
  program = program_that("print(_)", f"main, default_config={TINY!r}")
  done = launch("--config.train.steps=77", program=program)
  assert done.code == 0 and "steps=77" in done.out and "d_model=16" in done.out
  assert f"(default {TINY})" in launch("--help", program=program).out


@pytest.mark.parametrize(
  ("statement", "part"),
  [
    ("raise ValueError('runs/x holds\\n another model')", "error: runs/x holds another model"),
    ("raise NotImplementedError('needs a GPU')", "error: needs a GPU"),
    ("open('no/such/file')", "error: no/such/file: No such file or directory"),
    ("from moe_jax import config; config.Model(layers=0)", "error: model.layers=0"),
    (
      "import jax; from moe_jax import config; jax.jit(lambda x: config.Model(layers=0))(1)",
      "error: model.layers=0",
    ),
  ],
)
def test_bad_input_found_by_the_program_takes_one_line(launch, statement, part):
  assert_one_line(launch(program=program_that(statement)), part)
  explained = launch("--traceback", program=program_that(statement))
  assert explained.code == 2
  assert "Traceback (most recent call last)" in explained.err and part in explained.err


@pytest.mark.parametrize(
  ("statement", "part"),
  [
    ("assert 1 == 2", "AssertionError"),
    ("[].zebra", "AttributeError"),
    ("int('ten')", "ValueError: invalid literal"),  # by C code, not for the user
    ("import statistics; statistics.NormalDist(0, -1)", "StatisticsError"),  # by a library
    ("import jax; jax.numpy.zeros(3).reshape(2)", "TypeError"),
    ("import jax; jax.jit(lambda x: jax.numpy.stack([]))(1)", "ValueError: Need at least one"),
  ],
)
def test_a_bug_keeps_its_traceback(launch, statement, part):
  done = launch(program=program_that(statement))
  assert done.code == 1
  assert "Traceback (most recent call last)" in done.err and part in done.err


def test_an_interrupt_takes_one_line(launch):
  done = launch(program=program_that("raise KeyboardInterrupt"))
  assert (done.code, done.err) == (130, "interrupted\n")


def test_virtual_devices(launch):
  program = program_that(
    "import jax; print(jax.device_count())", "main, config=False, devices=True"
  )
  assert launch("--virtual_devices=3", program=program).out == "3\n"
  alone = launch(program=program, XLA_FLAGS="--xla_force_host_platform_device_count=2")
  assert alone.out == "2\n"
  assert_one_line(launch("--virtual_devices=-1", program=program), "--virtual_devices=-1")
