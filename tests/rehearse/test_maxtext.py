"""The table beside MaxText: whose row stands where, and which bars it says are kept."""

import pytest

from moe_jax.rehearse import groups
from moe_jax.rehearse.program import Collective
from tests.peers import maxtext
from tests.peers.maxtext import MAXTEXT, Row

PAIRS = groups.parse("replica_groups={{0,2},{1,3}}", {"expert": 2, "tensor": 2})


@pytest.mark.parametrize(
  ("kind", "num_bytes"),
  [("all-reduce", 80), ("all-gather", 160), ("reduce-scatter", 40), ("all-to-all", 80)],
)
def test_results_have_the_bytes_of_their_kind(kind, num_bytes):
  unit = Collective("c", "dispatch", kind, True, 80, PAIRS, False)
  assert maxtext.result_bytes(unit) == num_bytes


def test_a_row_says_what_share_of_maxtexts_it_takes():
  gpipe, circular, user = MAXTEXT
  good = Row("ours", "gpipe", gpipe.temporaries_mib / 2, gpipe.between_mib / 2, gpipe.xla_s)
  bad = Row("ours", "interleaved", circular.temporaries_mib, 1.0, circular.xla_s + 1)
  lines = [line for line in maxtext.to_text([good, bad]).splitlines() if line]
  assert [line.split(",")[0].split("  ")[0] for line in lines[2:]] == [
    "MaxText 0.2.5", "ours", "MaxText 0.2.5", "ours", "MaxText 0.2.5",
  ]  # fmt: skip
  assert lines[3].endswith("of MaxText's: 0.50 ok, 0.50 ok, 1.00 ok")
  assert lines[5].endswith("of MaxText's: 1.00 MISSED, 0.00 ok, 1.06 MISSED")
  assert f"{user.between_mib:,} MiB" in lines[6]
