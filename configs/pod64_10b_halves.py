"""srun -N16 -n64 python -m launch.train --config=configs/pod64_10b_halves.py --workdir=runs/10b

pod64_10b's model and batch on another mesh of its 64 GPUs: one expert a host, and no stages. A step
is one micro-batch of eight sequences a rank, in two halves: a fifth more tokens a second, for three
times the memory.
"""

from ml_collections import ConfigDict

from configs import pod64_10b


def get_config() -> ConfigDict:
  config = pod64_10b.get_config()
  config.mesh.update(expert=16, tensor=4, stage=1)
  # Chunks of two layers: beside each attention's weights of the next come from the other hosts.
  config.pipeline.update(micro_batches=1, chunks=8, halves=True, gradient_dtype="bfloat16")
  # The same 128 prompts in one call of prefill, now on 16 ranks.
  config.serve.update(slots=8, prefill_micro_batches=8)
  return config
