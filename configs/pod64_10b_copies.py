"""python -m launch.rehearse --config=configs/pod64_10b_copies.py --pod=h100:16x4 --step=prefill

pod64_10b on the mesh of pod64_copies, to serve: there every rank holds a quarter of the experts,
5.6 GB. Training waits for its weights, which copies send each other in every step.
"""

from ml_collections import ConfigDict

from configs import pod64_10b, pod64_copies


def get_config() -> ConfigDict:
  config = pod64_copies.get_config()
  config.model.update(pod64_10b.get_config().model)
  return config
