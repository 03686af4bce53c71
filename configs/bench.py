"""python -m launch.bench --config=configs/bench.py --json=bench.json

The layers of pod64, four of them, on one device in float32: what launch.bench measures on a CPU and
tests/peers compares with other people's programs. A minute on 2 cores.
"""

from ml_collections import ConfigDict

from configs import pod64


def get_config() -> ConfigDict:
  model = pod64.get_config().model
  model.update(layers=4, vocab=256, dtype="float32")  # bfloat16 is slower on CPUs
  return ConfigDict(
    {
      "model": model,
      "mesh": {"expert": 1, "tensor": 1, "stage": 1},
      # One micro-batch is in flight: there is room for what is dear to compute twice.
      "pipeline": {"schedule": "1f1b", "micro_batches": 1, "save": "residuals"},
      "moe": {"dispatch": "dropless"},
      "train": {"batch": 4, "sequence": 512},
    }
  )
