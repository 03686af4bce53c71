"""python -m launch.train --config=configs/laptop.py --workdir=runs/laptop --virtual_devices=8

A small model on this machine's CPU, sharded as on a pod: expert 2 x tensor 2 x stage 2 virtual
devices. It reads the source of Python's standard library, as bytes: 3 to 5 minutes on 2 cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "model": {
        "layers": 4,
        "d_model": 128,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 32,
        "experts": 8,
        "experts_per_token": 2,
        "expert_hidden": 256,
        "vocab": 256,
        "dtype": "float32",  # bfloat16 is slower on CPUs
      },
      "mesh": {"expert": 2, "tensor": 2, "stage": 2},
      "pipeline": {"schedule": "interleaved", "micro_batches": 16, "chunks": 2},
      "moe": {"dispatch": "capacity", "capacity_factor": 1.5},
      "train": {
        "batch": 32,
        "sequence": 256,
        "steps": 120,
        "warmup_steps": 20,
        "learning_rate": 3e-3,
        "checkpoint_every": 40,
        "eval_every": 40,
        "eval_batches": 8,
      },
    }
  )
