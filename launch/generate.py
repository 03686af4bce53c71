"""Continues a prompt with the model of a run's folder, and prints the text as it comes.

  python -m launch.generate --workdir=runs/laptop --prompt='def '

The folder is one that launch.train left, or launch.convert made of an imported model; where such a
model ends its text, the program does. Exit codes: 0 done; 2 bad input; 130 Ctrl-C.
"""

import dataclasses
import itertools
import pathlib
import sys

from absl import flags, logging

from launch import trained
from launch.flags import run
from launch.paths import define_workdir
from moe_jax import config

_WORKDIR = define_workdir()
_PROMPT = flags.DEFINE_string("prompt", None, "text to go on from", required=True)
_NEW_TOKENS = flags.DEFINE_integer(
  "new_tokens",
  0,
  "to make at most; 0 fills the window that the model was trained on",
  lower_bound=0,
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.8, "divides the logits; 0 takes the most likely token", lower_bound=0
)
_TOP_K = flags.DEFINE_integer(
  "top_k", 0, "draw from that many most likely tokens; 0 from all", lower_bound=0
)
_TOP_P = flags.DEFINE_float(
  "top_p", 1.0, "draw from the fewest tokens with this share of the probability",
  lower_bound=0, upper_bound=1,
)  # fmt: skip
_SEED = flags.DEFINE_integer("seed", 0, "of the draws", lower_bound=0, upper_bound=2**32 - 1)
_MESH = flags.DEFINE_string("mesh", "1x1x1", "devices, expert x tensor x stage, or x data")
_KV_DTYPE = flags.DEFINE_string(
  "kv_dtype", "float32", "of the key-value cache: float32, bfloat16, int8 or float8"
)


def main() -> None:
  # orbax logs the traceback of every error that it raises; the error's one line is enough.
  logging.set_verbosity(logging.FATAL)
  workdir = pathlib.Path(_WORKDIR.value)
  mesh = trained.mesh_sizes(_MESH.value)
  settings, window = trained.settings_of(
    workdir, mesh, config.Serve(slots=1, max_tokens=1, kv_dtype=_KV_DTYPE.value)
  )
  # Here and not above: a mistyped flag is answered before jax is imported.
  from moe_jax.serve.generate import Generator
  from moe_jax.serve.packing import Wish
  from moe_jax.serve.text import TextStream

  try:
    _PROMPT.value.encode()
  except UnicodeEncodeError:
    raise ValueError("--prompt is not UTF-8; give text in UTF-8") from None
  model = trained.load(workdir, settings)
  prompt = model.tokenizer.encode(_PROMPT.value)
  new_tokens = _NEW_TOKENS.value or window - len(prompt)
  if not 0 < len(prompt) < window or len(prompt) + new_tokens > window:
    raise ValueError(
      f"--prompt of {len(prompt)} tokens and --new_tokens={_NEW_TOKENS.value}: the model was"
      f" trained on windows of {window} tokens; give a prompt of 1 to {window - 1} and"
      " --new_tokens up to what is left"
    )
  serve = dataclasses.replace(settings.serve, max_tokens=window)
  generate = Generator(dataclasses.replace(settings, serve=serve), model.mesh)
  parameters = generate.programs.parameters(model.parameters)
  wish = Wish(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _SEED.value)
  text = TextStream(model.tokenizer, prompt)
  steps = generate.stream(parameters, [prompt], new_tokens=new_tokens, wishes=wish)
  _show(_PROMPT.value)
  tokens = (token for step in steps for _, token in step)
  for token in itertools.takewhile(lambda token: token not in model.end_tokens, tokens):
    _show(text.add(token))
  _show(text.end() + "\n")


def _show(text: str) -> None:
  sys.stdout.write(text)
  sys.stdout.flush()


if __name__ == "__main__":
  run(main, config=False, devices=True)
