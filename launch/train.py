"""Trains what a config file describes, or goes on with the run that lies in --workdir.

  python -m launch.train --config=configs/laptop.py --virtual_devices=8 --workdir=runs/laptop

SIGTERM, Ctrl-C or a closed terminal finishes the step and saves; the same command goes on from
there. Exit codes: 0 finished, or saved after SIGTERM; 130 saved after Ctrl-C, unsaved after a
second one; 1 too many steps were not finite; 2 bad input.
"""

import dataclasses
import pathlib
import sys

from absl import flags, logging

from launch import distributed, stopping
from launch.flags import run
from launch.paths import define_workdir

_WORKDIR = define_workdir()
_PROFILE_STEPS = flags.DEFINE_string(
  "profile_steps", None, "steps to trace, start:stop such as 10:13, counted from 0"
)
_DIVERGED = 1
_TEMPERATURE = 0.8


def main(config) -> int:
  # orbax logs the traceback of every error that it raises; the error's one line is enough.
  logging.set_verbosity(logging.FATAL)
  distributed.start()  # first, for jax.distributed takes SIGTERM for itself
  with stopping.Stopping() as signals:
    # Here and not above: a mistyped flag is answered before jax is imported.
    from moe_jax.observe import profile
    from moe_jax.train import log, loop

    workdir = pathlib.Path(_WORKDIR.value)
    if workdir.exists() and not workdir.is_dir():
      raise ValueError(f"--workdir={workdir} is a file; name a folder")
    steps = profile.parse_steps(_PROFILE_STEPS.value) if _PROFILE_STEPS.value else None
    try:
      outcome = loop.train(config, workdir, stop=signals.is_asked, profile_steps=steps)
    except log.Diverged as error:
      print(error, file=sys.stderr)
      return _DIVERGED
  if not outcome.is_finished:
    return signals.exit_code
  if config.train.sequence > 1:  # one token to go on from, one to go on with
    _sample(config, outcome, workdir)
  return 0


def _sample(config, outcome, workdir: pathlib.Path) -> None:
  import jax

  from moe_jax.serve.generate import Generator
  from moe_jax.serve.packing import Wish
  from moe_jax.serve.text import TextStream

  dataset, sequence = outcome.dataset, config.train.sequence
  prompt = dataset.eval_batch(0)["tokens"][0, : max(1, sequence // 4)]
  serve = dataclasses.replace(config.serve, slots=1, max_tokens=sequence)
  generate = Generator(dataclasses.replace(config, serve=serve), outcome.mesh)
  parameters = generate.programs.parameters(outcome.state.parameters)
  (new,) = generate(
    parameters, [prompt], new_tokens=sequence - len(prompt),
    wishes=Wish(_TEMPERATURE, seed=config.train.seed),
  )  # fmt: skip
  if jax.process_index() > 0:
    return
  text = TextStream(dataset.tokenizer, prompt)
  before, after = dataset.tokenizer.decode(prompt), "".join(map(text.add, new)) + text.end()
  (workdir / "sample.txt").write_text(before + after, encoding="utf-8")
  print(f"sample: {len(prompt)} held-out tokens\n{before}\nand how the model goes on\n{after}")


if __name__ == "__main__":
  run(main, devices=True)
