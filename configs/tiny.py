"""python -m launch.train --config=configs/tiny.py --workdir=runs/tiny --virtual_devices=8

For tests: seconds, not learning. Every token finds room whatever the router does, so that all
meshes compute the same loss. Its sizes fit 1, 2, 4 or 8 ranks along each axis; 8 stages need 8
layers.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "model": {
        "layers": 4,
        "d_model": 16,
        "heads": 8,
        "kv_heads": 8,
        "head_dim": 4,
        "experts": 8,
        "experts_per_token": 2,
        "expert_hidden": 16,
        "vocab": 256,
        "dtype": "float32",
      },
      "mesh": {"expert": 2, "tensor": 2, "stage": 2},
      "pipeline": {"schedule": "1f1b", "micro_batches": 4},
      # experts / experts_per_token: each expert has room for every token of a rank.
      "moe": {"dispatch": "capacity", "capacity_factor": 4.0},
      "train": {
        "batch": 32,
        "sequence": 16,
        "steps": 8,
        "warmup_steps": 2,
        "checkpoint_every": 4,
        "eval_every": 4,
        "eval_batches": 1,
      },
    }
  )
