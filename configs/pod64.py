"""srun -N16 -n64 python -m launch.train --config=configs/pod64.py --workdir=runs/pod64

The reference deployment: 64 GPUs as 16 hosts x 4; tensor inside a host, expert across 8 hosts,
stage across the two halves. Serving drops nothing, whatever moe.dispatch says.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "model": {
        "layers": 16,
        "d_model": 512,
        "heads": 16,
        "kv_heads": 16,
        "head_dim": 32,
        "experts": 16,
        "experts_per_token": 2,
        "expert_hidden": 1024,
        "vocab": 32_000,
        "dtype": "bfloat16",
      },
      "mesh": {"expert": 8, "tensor": 4, "stage": 2},
      # Bubble (p-1)/(v*m+p-1) = 1.5% with p=2 stages, m=16 micro-batches and v=4 chunks.
      "pipeline": {
        "schedule": "interleaved",
        "micro_batches": 16,
        "chunks": 4,
        "save": "residuals",
      },
      "moe": {"dispatch": "capacity", "exchange": "hierarchical", "capacity_factor": 1.25},
      "train": {
        "batch": 128,
        "sequence": 2_048,
        "steps": 10_000,
        "warmup_steps": 500,
        "learning_rate": 6e-4,
        "checkpoint_every": 500,
        "eval_every": 500,
        "eval_batches": 16,
      },
      "data": {"tokenizer": "bpe"},
      # 128 prompts of 10,240 tokens in one call of prefill, and 256 tokens more of each.
      "serve": {
        "slots": 8,
        "max_tokens": 10_496,
        "page": 128,
        "kv_dtype": "bfloat16",
        "prefill_rows": 1,
        "prefill_chunk": 10_240,
        "prefill_micro_batches": 16,
        "decode_tokens": 8,
      },
    }
  )
