"""Memory as planned beside memory as compiled for H100s that need not be there: cases and table.

Run by `python -m tests.plan.agreement memory`. The compiled figure is XLA's own
`memory_analysis()`: arguments, temporaries and outputs of the launcher's train step on one GPU.
"""

from collections.abc import Sequence

from launch import config_file
from moe_jax import config as config_lib
from moe_jax.plan import memory
from moe_jax.rehearse import lowering, pod
from moe_jax.rehearse import memory as compiled_memory

_PLAIN = {"schedule": "1f1b", "chunks": 1}
# Name -> (config, pod, changes). The arrays that plan.workspace and plan.layer_arrays list, and the
# constants, were chosen by those above the line of dashes; those below it were compiled afterwards.
CASES = {
  "tiny": ("tiny", "h100:2x4", {}),
  "tiny 1x2x4, gpipe, everything": (
    "tiny", "h100:2x4",
    {"mesh": {"expert": 1, "stage": 4}, "pipeline": {"schedule": "gpipe", "save": "everything"}},
  ),
  "laptop": ("laptop", "h100:2x4", {}),
  "laptop, 1f1b, residuals": (
    "laptop", "h100:2x4", {"pipeline": {**_PLAIN, "save": "residuals"}},
  ),
  "laptop 4x1x2, residuals": (
    "laptop", "h100:2x4",
    {"mesh": {"expert": 4, "tensor": 1}, "pipeline": {"save": "residuals", "micro_batches": 8}},
  ),
  "laptop 8x1x1": (
    "laptop", "h100:2x4",
    {"mesh": {"expert": 8, "tensor": 1, "stage": 1}, "pipeline": {**_PLAIN, "micro_batches": 4}},
  ),
  "laptop 1x2x4, gpipe": (
    "laptop", "h100:2x4",
    {"mesh": {"expert": 1, "stage": 4}, "pipeline": {"schedule": "gpipe", "chunks": 1}},
  ),
  "laptop 4x2x1, bfloat16": (
    "laptop", "h100:2x4",
    {"mesh": {"expert": 4, "stage": 1}, "model": {"dtype": "bfloat16"},
     "pipeline": {**_PLAIN, "micro_batches": 8}},
  ),
  "laptop, dropless": ("laptop", "h100:2x4", {"moe": {"dispatch": "dropless"}}),
  "bench": ("bench", "h100:1x1", {}),
  "pod64": ("pod64", "h100:16x4", {}),
  "pod64_10b": ("pod64_10b", "h100:16x4", {}),
  "pod64, saves inputs": ("pod64", "h100:16x4", {"pipeline": {"save": "inputs"}}),
  "pod64 16x4x1": (
    "pod64", "h100:16x4",
    {"mesh": {"expert": 16, "stage": 1}, "pipeline": {**_PLAIN, "micro_batches": 8}},
  ),
  "pod64 4x4x4": ("pod64", "h100:16x4", {"mesh": {"expert": 4, "stage": 4}}),
  "pod64, dropless": ("pod64", "h100:16x4", {"moe": {"dispatch": "dropless"}}),
  "tiny 4x2x1, residuals": (
    "tiny", "h100:2x4",
    {"mesh": {"expert": 4, "stage": 1}, "pipeline": {"save": "residuals"}},
  ),
  "laptop 2x1x2, factor 1, residuals": (
    "laptop", "h100:1x4",
    {"mesh": {"tensor": 1}, "moe": {"capacity_factor": 1.0}, "pipeline": {"save": "residuals"}},
  ),
  "laptop 1x4x2, 512 tokens": (
    "laptop", "h100:2x4",
    {"mesh": {"expert": 1, "tensor": 4}, "model": {"kv_heads": 4}, "train": {"sequence": 512}},
  ),
  "pod64 4x8x2, factor 2": (
    "pod64", "h100:8x8",
    {"mesh": {"expert": 4, "tensor": 8}, "moe": {"capacity_factor": 2.0}},
  ),
  "pod64 2x4x8, everything": (
    "pod64", "h100:16x4",
    {"mesh": {"expert": 2, "stage": 8}, "pipeline": {"chunks": 2, "save": "everything"}},
  ),
  "pod64_10b, 1f1b, saves inputs": (
    "pod64_10b", "h100:16x4", {"pipeline": {**_PLAIN, "save": "inputs"}},
  ),
  "tiny 8x1x1": ("tiny", "h100:2x4", {"mesh": {"expert": 8, "tensor": 1, "stage": 1}}),
  "tiny 2x1x4": (
    "tiny", "h100:2x4",
    {"mesh": {"tensor": 1, "stage": 4}, "pipeline": {"micro_batches": 8}},
  ),
  "laptop 2x1x4, 8 layers": (
    "laptop", "h100:2x4",
    {"mesh": {"tensor": 1, "stage": 4}, "model": {"layers": 8}, "pipeline": _PLAIN},
  ),
  "laptop 1x8x1, tied": (
    "laptop", "h100:1x8",
    {"mesh": {"expert": 1, "tensor": 8, "stage": 1},
     "model": {"tied_embeddings": True, "heads": 8, "kv_heads": 8},
     "pipeline": {**_PLAIN, "micro_batches": 8}},
  ),
  "laptop 256 wide, bfloat16, residuals": (
    "laptop", "h100:2x4",
    {"model": {"dtype": "bfloat16", "d_model": 256}, "pipeline": {"save": "residuals"}},
  ),
  "laptop 4x2x1, dropless, residuals": (
    "laptop", "h100:2x4",
    {"mesh": {"expert": 4, "stage": 1}, "moe": {"dispatch": "dropless"},
     "pipeline": {**_PLAIN, "micro_batches": 8, "save": "residuals"}},
  ),
  "laptop, stealing": ("laptop", "h100:2x4", {"moe": {"dispatch": "stealing"}}),
  "laptop, exchanges": ("laptop", "h100:2x4", {"pipeline": {"save": "exchanges"}}),
  "pod64, exchanges": ("pod64", "h100:16x4", {"pipeline": {"save": "exchanges"}}),
  "pod64_10b, exchanges": ("pod64_10b", "h100:16x4", {"pipeline": {"save": "exchanges"}}),
  "laptop 4x1x2, dropless, exchanges": (
    "laptop", "h100:2x4",
    {"mesh": {"expert": 4, "tensor": 1}, "moe": {"dispatch": "dropless"},
     "pipeline": {"save": "exchanges", "micro_batches": 8}},
  ),
  "-" * 30: None,
  "tiny 4x1x2, residuals": (
    "tiny", "h100:2x4",
    {"mesh": {"expert": 4, "tensor": 1}, "pipeline": {"save": "residuals"}},
  ),
  "laptop, everything": ("laptop", "h100:2x4", {"pipeline": {"save": "everything"}}),
  "laptop 8x1x1, 8 layers, residuals": (
    "laptop", "h100:2x4",
    {"mesh": {"expert": 8, "tensor": 1, "stage": 1}, "model": {"layers": 8},
     "pipeline": {**_PLAIN, "micro_batches": 4, "save": "residuals"}},
  ),
  "laptop 1x4x2, bfloat16, gpipe": (
    "laptop", "h100:2x4",
    {"mesh": {"expert": 1, "tensor": 4}, "model": {"dtype": "bfloat16", "kv_heads": 4},
     "pipeline": {"schedule": "gpipe", "chunks": 1}},
  ),
  "laptop 4x1x2, 256 wide": (
    "laptop", "h100:2x4",
    {"mesh": {"expert": 4, "tensor": 1}, "model": {"d_model": 256},
     "pipeline": {"micro_batches": 8}},
  ),
  "tiny 4x1x2, stealing, residuals": (
    "tiny", "h100:2x4",
    {"mesh": {"expert": 4, "tensor": 1}, "moe": {"dispatch": "stealing"},
     "pipeline": {"save": "residuals"}},
  ),
  "pod64 8x2x4, 2 chunks, saves inputs": (
    "pod64", "h100:16x4",
    {"mesh": {"tensor": 2, "stage": 4}, "pipeline": {"save": "inputs", "chunks": 2}},
  ),
  "pod64 16x2x2, 1f1b": (
    "pod64", "h100:16x4",
    {"mesh": {"expert": 16, "tensor": 2}, "pipeline": {**_PLAIN, "micro_batches": 8}},
  ),
  "pod64 32x2x1, 32 experts": (
    "pod64", "h100:16x4",
    {"model": {"experts": 32}, "mesh": {"expert": 32, "tensor": 2, "stage": 1},
     "pipeline": {**_PLAIN, "micro_batches": 4}},
  ),
  "tiny 4x2x1, streams 1 layer": (
    "tiny", "h100:2x4",
    {"mesh": {"expert": 4, "stage": 1}, "pipeline": {"prefetch_layers": 1}},
  ),
  "laptop 8x1x1, 8 layers, streams 3": (
    "laptop", "h100:2x4",
    {"mesh": {"expert": 8, "tensor": 1, "stage": 1}, "model": {"layers": 8},
     "pipeline": {**_PLAIN, "micro_batches": 4, "prefetch_layers": 3}},
  ),
  "pod64_10b, streams 1 layer": ("pod64_10b", "h100:16x4", {"pipeline": {"prefetch_layers": 1}}),
  "pod64_10b, streams 3 layers": ("pod64_10b", "h100:16x4", {"pipeline": {"prefetch_layers": 3}}),
  "laptop 1x1x1, 8 copies": (
    "laptop", "h100:2x4",
    {"mesh": {"expert": 1, "tensor": 1, "stage": 1, "data": 8},
     "pipeline": {**_PLAIN, "micro_batches": 4}},
  ),
  "laptop 2x1x2, 2 copies, residuals": (
    "laptop", "h100:2x4",
    {"mesh": {"tensor": 1, "data": 2}, "pipeline": {"save": "residuals", "micro_batches": 8}},
  ),
  "pod64 4x1x1, 16 copies": (
    "pod64", "h100:16x4",
    {"mesh": {"expert": 4, "tensor": 1, "stage": 1, "data": 16},
     "pipeline": {**_PLAIN, "micro_batches": 2}},
  ),
  "pod64 4x1x2, 8 copies": (
    "pod64", "h100:16x4",
    {"mesh": {"expert": 4, "tensor": 1, "data": 8}, "pipeline": {"micro_batches": 2}},
  ),
  "pod64_10b 8x2x2, 2 copies": (
    "pod64_10b", "h100:16x4", {"mesh": {"tensor": 2, "data": 2}, "pipeline": {"micro_batches": 8}},
  ),
}  # fmt: skip
BAR = 0.02


def settings_of(name: str, sections) -> config_lib.Config:
  """Returns a shipped config with some fields changed."""
  values = config_lib.as_dict(config_lib.from_mapping(config_file.load(f"configs/{name}.py")))
  for section, fields in sections.items():
    values[section].update(fields)
  return config_lib.from_mapping(values)


def compiled_bytes(settings: config_lib.Config, pod_name: str) -> int:
  """Returns what XLA says that a train step takes on one GPU of a pod."""
  mesh = pod.describe(pod_name).mesh(settings.mesh)
  compiled = lowering.train(settings, mesh)
  return compiled_memory.by_part(settings, compiled)["total"]


def table(names: Sequence[str]) -> tuple[int, int]:
  """Prints some cases, of none all; returns how many keep to the bar, and how many there are."""
  kept = count = 0
  for name in names or CASES:
    if CASES[name] is None:
      print(name)
      continue
    config, pod_name, sections = CASES[name]
    settings = settings_of(config, sections)
    planned, found = memory.train(settings), compiled_bytes(settings, pod_name)
    error = planned.total / found - 1
    kept, count = kept + (abs(error) <= BAR), count + 1
    print(
      f"{name:<36}{found / 1e6:>11.3f} MB{planned.total / 1e6:>11.3f} MB{error:>+8.2%}"
      f"  {planned.peak_unit}",
      flush=True,
    )
  return kept, count
