"""The whole train step with each dispatch that drops nothing: loss, logits and gradients are those
of the one-device oracle, whatever is saved.
"""

import pytest

from tests.train import parity
from tests.train.test_step import check

CASES = {
  "dropless-2x2x2-1f1b-residuals": (
    (2, 2, 2), "dropless", {"micro_batches": 4, "save": "residuals"},
  ),
  "dropless-4x1x2-interleaved-everything": (
    (4, 1, 2), "dropless", {"schedule": "interleaved", "chunks": 2, "save": "everything"},
  ),
  "dropless-4x2x1-exchanges": ((4, 2, 1), "dropless", {"save": "exchanges"}),
  "dropless-8x1x1-inputs": ((8, 1, 1), "dropless", {}),
  # No rank shares weights with another: the loop over experts reads them in the stage's stack.
  "dropless-1x2x2-interleaved-inputs": (
    (1, 2, 2), "dropless", {"schedule": "interleaved", "chunks": 2},
  ),
  "dropless-1x1x1-residuals": ((1, 1, 1), "dropless", {"save": "residuals"}),
  "dense-2x2x2-gpipe-residuals": ((2, 2, 2), "dense", {"schedule": "gpipe", "save": "residuals"}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_step_equals_the_oracle(name):
  mesh, dispatch, pipeline = CASES[name]
  # Room for an even load alone: dropless takes further rounds.
  moe = {"dispatch": dispatch, "capacity_factor": 1.0}
  settings = parity.settings_of(mesh, model={"layers": 4}, pipeline=pipeline, moe=moe)
  check(parity.differences(settings))
