"""srun -N16 -n64 python -m launch.train --config=configs/pod64_copies.py --workdir=runs/copies

pod64's model and batch on another mesh of its 64 GPUs: all experts inside each host, four ranks,
and sixteen copies of that, one a host, which sum gradients and share the optimizer's state. No
token is dropped.
"""

from ml_collections import ConfigDict

from configs import pod64


def get_config() -> ConfigDict:
  config = pod64.get_config()
  config.mesh.update(expert=4, tensor=1, stage=1, data=16)
  config.moe.update(expert_ranks_per_host=4, dispatch="dropless")
  # One micro-batch of two sequences a rank, side by side. Chunks of two layers: beside each the
  # next one's weights come from the other copies, and the gradients of the one before leave.
  config.pipeline.update(micro_batches=1, chunks=8, halves=True, gradient_dtype="bfloat16")
  # The same 128 prompts in one call of prefill, now on 64 ranks.
  config.serve.update(slots=2, prefill_micro_batches=2)
  return config
