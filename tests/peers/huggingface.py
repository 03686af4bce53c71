"""Side by side with Hugging Face transformers on torch CPU: the same sizes, batch and threads.

  python -m tests.peers.huggingface --json=peers.json

Two processes, ours and theirs, take turns in one run, so that whatever else the machine does meets
both: one waits while the other computes. Theirs is MixtralForCausalLM with torch's fused attention
and AdamW, in the fastest of the experts implementations that transformers has for a CPU, timed
first. A train step is loss with load-balancing term, gradients, clipping by global norm, AdamW.
Theirs drops no token; ours says how many it dropped, and model FLOPs count without those.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from launch import bench, config_file, environment
from moe_jax import config as config_lib

KINDS = ("train", "forward")
# sonicmoe and deepgemm are GPU kernels.
EXPERTS = ("eager", "grouped_mm", "batched_mm")
ADAMW = ("fused", "foreach")
TRIALS = 3  # of each of theirs, to find the fastest


def main() -> None:
  arguments = _arguments()
  settings = config_lib.from_mapping(config_file.load(arguments.config))
  if arguments.worker:
    WORKERS[arguments.worker](settings)
    return
  found = compare(arguments.config, settings, arguments.rounds)
  print(to_text(found))
  if arguments.json:
    pathlib.Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")


def compare(config: str, settings: config_lib.Config, rounds: int) -> dict:
  """Returns the figures of both programs, and how many times faster ours is.

  Args:
    config: path of the config file.
    settings: what it holds.
    rounds: timed steps of each kind and program, taken in turns.
  """
  ours, theirs = Worker("moe_jax", config), Worker("huggingface", config)
  trials = {kind: _trials(theirs, kind) for kind in KINDS}
  fastest = {kind: min(trials[kind], key=trials[kind].get) for kind in KINDS}
  peaks = [ours.ask("gemm")]
  steps = {}
  for kind in KINDS:
    ours.ask(kind), ours.ask(kind), theirs.ask(fastest[kind])
    turns = [(ours.ask(kind), theirs.ask(fastest[kind])) for _ in range(rounds)]
    steps[kind] = {"moe_jax": [a for a, _ in turns], "huggingface": [b for _, b in turns]}
    peaks.append(ours.ask("gemm"))
  versions = {"moe_jax": ours.stop(), "huggingface": theirs.stop()}
  found = {
    name: {kind: bench.figures(settings, kind, steps[kind][name], max(peaks)) for kind in KINDS}
    for name in ("moe_jax", "huggingface")
  }
  return {
    **found,
    "speedup": {kind: _speedup(**steps[kind]) for kind in KINDS},
    "fastest": fastest,
    "trials_s": trials,
    "left_out": left_out(settings),
    "matmul_peak_flops_per_s": peaks,
    "threads": num_threads(),
    "versions": versions,
    "config": config_lib.as_dict(settings),
  }


def to_text(found: dict) -> str:
  """Returns what `compare` found as a small table."""
  rows = [f"{'':<10}{'':<14}{'ms':>10}{'tokens/s':>12}{'of peak':>10}{'speedup':>10}"]
  for kind in KINDS:
    for name in ("moe_jax", "huggingface"):
      part = found[name][kind]
      speedup = f"{found['speedup'][kind]:.2f}x" if name == "moe_jax" else ""
      rows.append(
        f"{kind:<10}{name:<14}{part['step_s'] * 1e3:>10.1f}{part['tokens_per_s']:>12.0f}"
        f"{part['fraction_of_peak']:>10.1%}{speedup:>10}"
      )
  dropped = found["moe_jax"]["train"]["dropped_fraction"]
  rows.append(f"theirs: {found['fastest']}; ours dropped {dropped:.1%} of its assignments")
  rows += [f"left out: {name}, {why}" for name, why in found["left_out"].items()]
  return "\n".join(rows)


class Worker:
  """A process that does one step each time it is asked, and sleeps in between."""

  def __init__(self, name: str, config: str, module: str = "tests.peers.huggingface"):
    command = [sys.executable, "-m", module, f"--worker={name}"]
    self.process = subprocess.Popen(
      [*command, f"--config={config}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
      env={**os.environ, **environment.malloc(1)},  # which serves both
    )  # fmt: skip
    self.name = name
    self.versions = self._read()

  def ask(self, what: str):
    """Returns the worker's answer to one line."""
    self.process.stdin.write(what + "\n")
    self.process.stdin.flush()
    return self._read()

  def stop(self) -> str:
    """Ends the process and returns the versions that it ran."""
    self.process.stdin.close()
    self.process.wait()
    return self.versions

  def _read(self):
    line = self.process.stdout.readline()
    if not line:
      raise RuntimeError(f"worker {self.name} ended with {self.process.wait()}; see its stderr")
    return json.loads(line)


def run_ours(settings: config_lib.Config) -> None:
  environment.virtual_devices(1)
  import jax

  from launch import stopwatch

  program, gemms = stopwatch.Program(settings), stopwatch.Gemms(settings)

  def peak():
    gemms.measure()
    return gemms.peak_flops_per_s

  answer(
    f"jax {jax.__version__}",
    {"train": program.train, "forward": program.forward, "gemm": peak},
  )


def run_theirs(settings: config_lib.Config) -> None:
  import torch
  import transformers

  from launch import stopwatch
  from tests import mixtral

  torch.set_num_threads(num_threads())
  inputs = stopwatch.random_inputs(settings)
  rows = lambda leaf: torch.from_numpy(leaf.reshape(-1, leaf.shape[-1]).astype("int64"))
  batch = {"input_ids": rows(inputs.tokens_bS), "labels": rows(inputs.targets_bS)}
  # Their loss shifts labels by one, so one token of each row fewer is predicted than by ours.
  model = mixtral.build(settings.model, settings.train.seed).train()
  model.set_attn_implementation("sdpa")
  loss = functools.partial(model, **batch, output_router_logits=True, use_cache=False)
  train = settings.train
  adamw = {
    name: torch.optim.AdamW(
      model.parameters(), lr=train.learning_rate, betas=(train.beta1, train.beta2),
      weight_decay=train.weight_decay, **{name: True},
    )
    for name in ADAMW
  }  # fmt: skip

  def train_step(experts, name):
    model.set_experts_implementation(experts)
    adamw[name].zero_grad(set_to_none=True)
    loss().loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm, foreach=True)
    adamw[name].step()

  def forward(experts):
    model.set_experts_implementation(experts)
    with torch.no_grad():
      loss()

  possible = [name for name in EXPERTS if name not in left_out(settings)]
  variants = {f"forward {name}": functools.partial(forward, name) for name in possible}
  for experts, name in itertools.product(possible, ADAMW):
    variants[f"train {experts} {name}"] = functools.partial(train_step, experts, name)
  answer(
    f"transformers {transformers.__version__}, torch {torch.__version__}",
    {name: functools.partial(_timed, step) for name, step in variants.items()}
    | {"names": lambda: list(variants)},
  )


WORKERS = {"moe_jax": run_ours, "huggingface": run_theirs}


def answer(versions: str, functions: dict[str, Callable]) -> None:
  """Answers each line of stdin with what the function of that name returns, as a line of JSON."""
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what a library prints is not an answer
  print(json.dumps(versions), file=answers, flush=True)
  for line in sys.stdin:
    print(json.dumps(functions[line.strip()]()), file=answers, flush=True)


def _timed(step: Callable[[], object]) -> tuple[tuple[float, float], float]:
  """Returns what launch.stopwatch.Step holds, of a program without jax that drops nothing."""
  wall, cpu = time.perf_counter(), time.process_time()
  step()
  return (time.perf_counter() - wall, time.process_time() - cpu), 0.0


def _trials(worker: Worker, kind: str) -> dict[str, float]:
  """Returns the fastest seconds of each of their variants of one kind of step."""
  seconds = {}
  for name in worker.ask("names"):
    if name.startswith(kind):
      worker.ask(name)
      seconds[name] = min(worker.ask(name)[0][0] for _ in range(TRIALS))
  return seconds


def _speedup(moe_jax: list, huggingface: list) -> float:
  """Returns the median over rounds of their time over ours."""
  turns = zip(moe_jax, huggingface, strict=True)
  return statistics.median(theirs[0][0] / ours[0][0] for ours, theirs in turns)


def left_out(settings: config_lib.Config) -> dict[str, str]:
  """Returns the experts implementations that this machine cannot run, and why."""
  model, train = settings.model, settings.train
  # batched_mm copies the weights of its expert for every assignment, float32: gate, up and down.
  rows = train.batch * train.sequence * model.experts_per_token
  needed = rows * 3 * model.d_model * model.expert_hidden * 4
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if needed <= memory / 2:
    return {}
  why = f"which copies {needed / 1e9:.0f} GB of weights a layer; the machine has {memory / 1e9:.0f}"
  return {"batched_mm": why}


def num_threads() -> int:
  """Returns the cores that this process may use."""
  return len(os.sched_getaffinity(0))


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="configs/bench.py")
  parser.add_argument("--rounds", type=int, default=7, help="timed steps of each, in turns")
  parser.add_argument("--json", help="also write the figures here")
  parser.add_argument("--worker", choices=["moe_jax", "huggingface"], help=argparse.SUPPRESS)
  return parser.parse_args()


if __name__ == "__main__":
  main()
