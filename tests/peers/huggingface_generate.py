"""Generation side by side with Hugging Face transformers' `generate` on torch CPU.

  python -m tests.peers.huggingface_generate --json=generate.json

The layers of pod64, four of them, in float32, the same weights: a batch of prompts, greedy. Two
processes take turns in one run, as in tests/peers/huggingface.py. Prefill is the time to all first
tokens; decode the time of the further ones. Theirs runs in its fastest experts implementation of
each kind, timed first; and both must give the same text.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time

import numpy as np

from launch import config_file, environment
from moe_jax import config as config_lib
from tests.peers import huggingface
from tests.peers.huggingface import EXPERTS, Worker, answer, num_threads

BATCH, PROMPT, NEW = 8, 512, 64
KINDS = ("prefill", "decode")
TRIALS = 2


def main() -> None:
  arguments = _arguments()
  settings = _settings(arguments.config)
  if arguments.worker:
    WORKERS[arguments.worker](settings)
    return
  found = compare(arguments.config, settings, arguments.rounds)
  print(to_text(found))
  if arguments.json:
    pathlib.Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")


def compare(config: str, settings: config_lib.Config, rounds: int) -> dict:
  """Returns seconds of both programs, and how many times faster ours is.

  Args:
    config: path of the config file.
    settings: what it holds.
    rounds: timed generations of each program, taken in turns.
  """
  module = "tests.peers.huggingface_generate"
  ours, theirs = (Worker(name, config, module) for name in WORKERS)
  trials = {name: theirs.ask(name) for name in theirs.ask("names") for _ in range(TRIALS)}
  fastest = {kind: min(trials, key=lambda name: trials[name][kind]) for kind in KINDS}
  for _ in range(2):
    mine = ours.ask("generate")
  turns = [(ours.ask("generate"), *(theirs.ask(fastest[k]) for k in KINDS)) for _ in range(rounds)]
  seconds = {
    kind: {
      "moe_jax": [turn[0][kind] for turn in turns],
      "huggingface": [turn[1 + i][kind] for turn in turns],
    }
    for i, kind in enumerate(KINDS)
  }
  return {
    "seconds": seconds,
    "speedup": {
      kind: statistics.median(
        b / a for a, b in zip(each["moe_jax"], each["huggingface"], strict=True)
      )
      for kind, each in seconds.items()
    },
    "same_tokens": float(np.mean(np.array(mine["text"]) == np.array(turns[0][1]["text"]))),
    "fastest": fastest,
    "trials": {name: {k: each[k] for k in KINDS} for name, each in trials.items()},
    "threads": num_threads(),
    "versions": {"moe_jax": ours.stop(), "huggingface": theirs.stop()},
    "config": config_lib.as_dict(settings),
  }


def to_text(found: dict) -> str:
  """Returns what `compare` found as a small table."""
  num_tokens = {"prefill": BATCH * PROMPT, "decode": BATCH * (NEW - 1)}
  rows = [f"{'':<10}{'':<14}{'s':>10}{'tokens/s':>12}{'speedup':>10}"]
  for kind in KINDS:
    for name in ("moe_jax", "huggingface"):
      median_s = statistics.median(found["seconds"][kind][name])
      speedup = f"{found['speedup'][kind]:.2f}x" if name == "moe_jax" else ""
      rows.append(
        f"{kind:<10}{name:<14}{median_s:>10.3f}{num_tokens[kind] / median_s:>12.0f}{speedup:>10}"
      )
  rows.append(f"theirs: {found['fastest']}; {found['same_tokens']:.1%} of the tokens are the same")
  return "\n".join(rows)


def run_ours(settings: config_lib.Config) -> None:
  environment.virtual_devices(1)
  import jax

  from moe_jax.parallel import mesh as mesh_lib
  from moe_jax.serve.generate import Generator
  from tests import mixtral
  from tests.train import parity

  mesh = mesh_lib.make(settings.mesh)
  generator = Generator(settings, mesh)
  params = mixtral.parameters(mixtral.build(settings.model, settings.train.seed), settings.model)
  parameters = generator.programs.parameters(parity.parameters_on(mesh, settings, params))
  prompts = _prompts(settings).tolist()

  def generate():
    start, times, text = time.perf_counter(), [], [[] for _ in prompts]
    for step in generator.stream(parameters, prompts, new_tokens=NEW):
      times.append(time.perf_counter())
      for i, token in step:
        text[i].append(token)
    return {"prefill": times[0] - start, "decode": times[-1] - times[0], "text": text}

  answer(f"jax {jax.__version__}", {"generate": generate})


def run_theirs(settings: config_lib.Config) -> None:
  import torch
  import transformers

  from tests import mixtral

  torch.set_num_threads(num_threads())
  model = mixtral.build(settings.model, settings.train.seed)
  model.set_attn_implementation("sdpa")
  prompts = torch.from_numpy(_prompts(settings)).long()
  call = functools.partial(
    model.generate, prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
    use_cache=True, pad_token_id=0,
  )  # fmt: skip

  def generate(experts):
    model.set_experts_implementation(experts)
    start = time.perf_counter()
    call(max_new_tokens=1)
    first = time.perf_counter()
    text = call(max_new_tokens=NEW)[:, PROMPT:].tolist()
    prefill_s, whole_s = first - start, time.perf_counter() - first
    return {"prefill": prefill_s, "decode": whole_s - prefill_s, "text": text}

  possible = [name for name in EXPERTS if name not in huggingface.left_out(settings)]
  functions = {name: functools.partial(generate, name) for name in possible}
  answer(
    f"transformers {transformers.__version__}, torch {torch.__version__}",
    functions | {"names": lambda: list(functions)},
  )


WORKERS = {"moe_jax": run_ours, "huggingface": run_theirs}


def _settings(config: str) -> config_lib.Config:
  values = config_file.load(config).to_dict()
  values["train"] |= {"batch": BATCH, "sequence": PROMPT}
  values["serve"] |= {
    "slots": BATCH, "max_tokens": PROMPT + NEW, "prefill_rows": BATCH, "prefill_chunk": PROMPT,
    "prefill_micro_batches": 1, "decode_tokens": 9,  # seven calls of decode make the 63
  }  # fmt: skip
  return config_lib.from_mapping(values)


def _prompts(settings: config_lib.Config) -> np.ndarray:
  return np.random.default_rng(0).integers(0, settings.model.vocab, (BATCH, PROMPT), np.int32)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="configs/bench.py")
  parser.add_argument("--rounds", type=int, default=5, help="timed generations of each, in turns")
  parser.add_argument("--json", help="also write the figures here")
  parser.add_argument("--worker", choices=["moe_jax", "huggingface"], help=argparse.SUPPRESS)
  return parser.parse_args()


if __name__ == "__main__":
  main()
