"""python -m launch.rehearse --config=configs/pod64_serve.py --pod=h100:16x4 --step=prefill

pod64's model served: every GPU holds all of it, 0.9 GB, and sends no token anywhere. On a pod, one
server a host: srun -N16 -n16 .venv/bin/python -m launch.serve --workdir=runs/pod64 --mesh=1x1x1x4
"""

from ml_collections import ConfigDict

from configs import pod64


def get_config() -> ConfigDict:
  config = pod64.get_config()
  config.mesh.update(expert=1, tensor=1, stage=1, data=64)
  config.pipeline.update(schedule="1f1b", micro_batches=1, chunks=1)
  # pod64's 128 prompts in one call of prefill, one after the other on each of 64 ranks.
  config.serve.update(slots=2, prefill_micro_batches=2)
  return config
