"""What a collective costs besides its bytes, by the algorithms and protocols of a library.

NCCL's figures are those by which it chooses among them itself. Knows numbers; must not know chips,
groups or models.

Source: NCCL 2.30, src/graph/tuning.cc (ncclTunerConstantsDefaults, ncclTopoTuneModel),
src/enqueue.cc (P2P_LL_THRESHOLD) and, for registered memory, src/sym_kernels.cc (queryModel_lsa).
Left out are the algorithms that need a switch which computes (NVLS, CollNet), for hosts of four
GPUs may have none; and a tree inside one host has LL128's share of its links there that it has
between hosts.
"""

from typing import NamedTuple

_US = 1e-6


class Protocol(NamedTuple):
  """How an algorithm sends.

  Attributes:
    base_s: of a collective, however few take part.
    inside_s: of a step from GPU to GPU inside a host.
    between_s: of a step from host to host.
    alone_s: of a step from host to host where each brings one GPU, so that nothing hides it.
    posting_s: of a message that leaves the host: a ring's steps inside take at least as long while
      others leave, and direct messages are posted one after the other.
    fraction: of the links' bandwidth.
    is_low_latency: whether it sends a flag with each word, which limits its bandwidth further.
    by_size: of its bandwidth, for messages from 64 B on, each twice as large as the one before; 1
      past the end.
  """

  base_s: float
  inside_s: float
  between_s: float
  alone_s: float
  posting_s: float = 0.0
  fraction: float = 1.0
  is_low_latency: bool = False
  by_size: tuple[float, ...] = ()


class Symmetric(NamedTuple):
  """A kernel on memory that the GPUs of a host registered with each other.

  Attributes:
    base_s: of a collective, however little is sent.
    bytes_per_s: that it reaches at most.
    times: what it moves of each byte that is brought to, or comes from, every GPU; 1 where it moves
      what a ring sends.
  """

  base_s: float
  bytes_per_s: float
  times: float


class Protocols(NamedTuple):
  """What a library may choose from.

  Attributes:
    ring: protocols of steps from neighbour to neighbour.
    tree: of an all-reduce up a tree of hosts and down again.
    pat: of gathers and scatters among hosts that bring one GPU each, if there is one.
    direct: of messages from each to each.
    small_direct: of such messages up to `small_bytes`.
    plateau: times the latency of a ring's all-reduce between hosts, by its last protocol.
    symmetric: kernels inside a host, where memory is registered.
  """

  ring: tuple[Protocol, ...]
  tree: tuple[Protocol, ...]
  pat: Protocol | None
  direct: Protocol
  small_direct: Protocol
  small_bytes: float = 16384.0
  plateau: float = 1.0
  symmetric: tuple[Symmetric, ...] = ()


HIDDEN_S = 1e-6
PAT_PER_RANK_S = 2.8 * _US
PAT_STEPS_AT_ONCE = 3.5
# Most bytes/s of a low-latency protocol on two and on more hosts, with CPUs of Intel.
LOW_LATENCY_BETWEEN = (39.0e9, 20.4e9)

_TREE_BY_SIZE = {
  "LL": (1, 1, 1, 1, .9, .8, .7, .7, .7, .7, .6, .5, .4, .4, .5, .6, .7, .8, .9),
  "LL128": (1, 1, 1, 1, 1, .9, .8, .8, .8, .7, .6, .6, .6, .6, .6, .6, .8, .9, .9, .9, .9),
  "Simple": (
    .9, .9, .9, .9, .9, .9, .9, .8, .7, .6, .6, .5, .5, .5, .5, .6, .7, .8, .7, .7, .8, .9, .9,
  ),
}  # fmt: skip
_TREE_FRACTION = 0.92  # of all its protocols

_RING_LL = Protocol(6.6 * _US, 0.6 * _US, 2.7 * _US, 5.0 * _US, 1.0 * _US, 0.5, is_low_latency=True)
_RING_LL128 = Protocol(14.0 * _US, 1.9 * _US, 4.0 * _US, 8.5 * _US, 1.0 * _US, 0.92)
_RING_SIMPLE = Protocol(8.4 * _US, 3.4 * _US, 14.0 * _US, 14.0 * _US, 3.0 * _US)
NCCL = Protocols(
  ring=(_RING_LL, _RING_LL128, _RING_SIMPLE),
  tree=(
    Protocol(
      6.8 * _US, 0.6 * _US, 5.0 * _US, 5.0 * _US, fraction=_TREE_FRACTION / 3.8,
      is_low_latency=True, by_size=_TREE_BY_SIZE["LL"],
    ),
    Protocol(
      14.0 * _US, 1.25 * _US, 8.5 * _US, 8.5 * _US, fraction=_TREE_FRACTION * 120 / 128,
      by_size=_TREE_BY_SIZE["LL128"],
    ),
    Protocol(
      8.4 * _US, 4.0 * _US, 14.0 * _US, 14.0 * _US, fraction=_TREE_FRACTION,
      by_size=_TREE_BY_SIZE["Simple"],
    ),
  ),
  pat=Protocol(8.0 * _US, 4.0 * _US, 14.0 * _US, 14.0 * _US, fraction=0.75),
  direct=_RING_SIMPLE,
  small_direct=_RING_LL,
  plateau=1.4,
  symmetric=(
    Symmetric(4.5 * _US, 320 * 2**30, 9.0),  # with a flag beside each word
    Symmetric(7.8 * _US, 320 * 2**30, 1.0),
  ),
)  # fmt: skip


# Of each of its two kernels the kind of collective that takes longest.
BLACKWELL = NCCL._replace(
  symmetric=(Symmetric(11.0 * _US, 600 * 2**30, 9.0), Symmetric(19.5 * _US, 600 * 2**30, 1.0))
)
