"""python -m launch.rehearse --config=configs/pod64_10b_serve.py --pod=h100:16x4 --step=prefill

pod64_10b's model served as pod64_serve serves pod64's: 20 GB of weights on every GPU.
"""

from ml_collections import ConfigDict

from configs import pod64_10b, pod64_serve


def get_config() -> ConfigDict:
  config = pod64_serve.get_config()
  config.model.update(pod64_10b.get_config().model)
  return config
