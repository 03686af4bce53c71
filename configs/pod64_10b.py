"""srun -N16 -n64 python -m launch.train --config=configs/pod64_10b.py --workdir=runs/pod64_10b

pod64 with wider layers, about 10 B parameters: same mesh, layers, heads, experts and run.
"""

from ml_collections import ConfigDict

from configs import pod64


def get_config() -> ConfigDict:
  config = pod64.get_config()
  config.model.update(d_model=2048, head_dim=128, expert_hidden=6144)
  return config
