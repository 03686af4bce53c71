"""Compares the ways to keep experts even, on workloads made and recorded, by a stated cost model.

  python -m launch.bench_balance --json=balance.json --out=balance.png
  python -m launch.bench_balance --record=routing.npz --config=configs/laptop.py

Sizes, mesh and prices are those of the deployment. A token costs its FLOPs at an expert by the
chip's peak and its four journeys between ranks; weights that balancing sends cost their bytes; all
ranks wait for the busiest, and nothing is hidden. The ideal is every rank serving as many tokens as
any other.

The last column has the flags with which launch.train carries a policy out; the price of a shadow
among them is that of this deployment. The others are modelled here only.

Made workloads are router scores; recorded ones are counts of a real training run, so the policies
that change the routing (aux, bias, quantile) have no row there. Those three show what they do to
the load, not to the loss. `--record` trains the deployment and writes such a recording; the one in
configs/ was made with --config.model.experts=16 --config.train.batch=256 --config.train.steps=240.
"""

import pathlib

import numpy as np
from absl import flags

from launch import paths
from launch import recording as recording_lib
from launch.flags import run
from moe_jax import config as config_lib
from moe_jax.balance import price, workloads
from moe_jax.plan import hardware

_JSON = paths.define_json("Also write the rows here.")
_OUT = paths.define_png("out", "Also draw them here, .png.")
_RECORD = paths.define_file("record", "Train the deployment, write its routing here, end.")
_RECORDINGS = flags.DEFINE_list(
  "recordings", ["configs/laptop_routing.npz"], "Recorded routing to balance; empty for none."
)
_WORKLOADS = flags.DEFINE_list("workloads", [], "Made workloads; by default all.")
_CHIP = flags.DEFINE_enum("chip", "h100", list(hardware.CHIPS), "Whose time it is.")
_LAYERS = flags.DEFINE_integer("layers", 4, "Layers to look at.", lower_bound=1)
_TOKENS = flags.DEFINE_integer(
  "tokens", None, "Of a made micro-batch; by default the deployment's.", lower_bound=1
)
_MICRO_BATCHES = flags.DEFINE_integer("micro_batches", 64, "Of a workload.", lower_bound=24)
_SLOTS = flags.DEFINE_integer(
  "slots", 0, "Expert slots; 0: one a rank more than experts.", lower_bound=0
)
_SHADOWS = flags.DEFINE_integer("shadows", 4, "Of stealing, at most.", lower_bound=1)
_WINDOW = flags.DEFINE_integer("window", 8, "Micro-batches between placements.", lower_bound=1)
_HORIZON = flags.DEFINE_integer("horizon", 64, "For which a placement has to pay.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the made workloads.", lower_bound=0)


def main(settings: config_lib.Config) -> None:
  if _RECORD.value:
    recording = recording_lib.record(settings)
    recording_lib.save(recording, _RECORD.value)
    print(f"{_RECORD.value}: {len(recording.counts_ULE)} micro-batches")
    return
  # jax takes seconds to import, which a mistyped flag need not wait for.
  from launch import balance

  rows = []
  for name, stream, num_experts in _streams(settings):
    found = balance.measure(name, stream, _setting(settings, num_experts))
    rows += found
    print(balance.to_text(found))
  if _JSON.value:
    paths.write_json(_JSON.value, rows)
  if _OUT.value:
    # matplotlib takes a second to import, which the text need not wait for.
    from launch.balance_picture import picture

    picture(rows, pathlib.Path(_OUT.value))


def _streams(settings: config_lib.Config):
  """Yields (name, stream, experts) of every workload asked for."""
  from launch import balance
  from moe_jax.balance import policies

  train = settings.train
  tokens = _TOKENS.value or train.batch // settings.pipeline.micro_batches * train.sequence
  sizes = workloads.Sizes(
    _LAYERS.value, settings.model.experts, settings.model.experts_per_token, tokens,
    _MICRO_BATCHES.value,
  )  # fmt: skip
  for name in _WORKLOADS.value or workloads.WORKLOADS:
    made = list(workloads.stream(name, sizes, _SEED.value))
    ahead = balance.ahead([each.tokens_V for each in made], _WINDOW.value)
    yield (
      name,
      [
        policies.Seen(
          workloads.choose(each.scores_LTE, sizes.choices), each.tokens_V, ahead[u], each.scores_LTE
        )
        for u, each in enumerate(made)
      ],
      sizes.experts,
    )
  for index, path in enumerate(_RECORDINGS.value):
    recording = recording_lib.load(path)
    counts_ULE = recording.counts_ULE.astype(np.int64)
    ahead = balance.ahead(recording.tokens_UV, _WINDOW.value)
    name = "recorded" if not index else f"recorded {pathlib.Path(path).stem}"
    print(balance.forecast_text(name, recording, _WINDOW.value))
    yield (
      name,
      [
        policies.Seen(counts_LE, tokens_V, ahead[u], None)
        for u, (counts_LE, tokens_V) in enumerate(zip(counts_ULE, recording.tokens_UV, strict=True))
      ],
      counts_ULE.shape[2],
    )


def _setting(settings: config_lib.Config, num_experts: int):
  from moe_jax.balance import policies

  model, mesh, chip = settings.model, settings.mesh, hardware.CHIPS[_CHIP.value]
  weights = price.weights(settings)
  if num_experts % mesh.expert:
    raise ValueError(
      f"a workload of {num_experts} experts is not divisible by mesh.expert={mesh.expert}; choose"
      " --config.mesh.expert from its divisors"
    )
  num_slots = _SLOTS.value or num_experts + mesh.expert
  if num_slots < num_experts or num_slots % mesh.expert:
    raise ValueError(
      f"--slots={num_slots} does not hold {num_experts} experts on mesh.expert={mesh.expert} ranks"
      f" with as many slots each; choose a multiple of {mesh.expert} from {num_experts} up, or 0"
    )
  return policies.Setting(
    num_experts=num_experts,
    num_ranks=mesh.expert,
    num_choices=model.experts_per_token,
    capacity_factor=settings.moe.capacity_factor,
    num_slots=num_slots,
    num_shadows=_SHADOWS.value,
    window=_WINDOW.value,
    horizon=_HORIZON.value,
    token_s=price.token_seconds(settings, chip),
    # As moe.stolen sends them: an all-reduce there, and one of their gradients home.
    shadow_bytes=4 * (mesh.expert - 1) / mesh.expert * weights * price.ITEM_BYTES[model.dtype],
    slot_bytes=weights * 12,  # master weights and two moments, float32
    link_bytes_per_s=price.link_bytes_per_s(settings, chip),
  )


if __name__ == "__main__":
  run(main, default_config="configs/pod64.py", devices=True)
