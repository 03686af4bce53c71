"""How tokens are served, by how many there are: few are gathered, more are exchanged without loss.

The server asks here, and so does the plan of it, which has no jax. Knows numbers; must not know
arrays.
"""

from moe_jax import config

# Multiplying by a weight that has been read is free for this many tokens: a chip's FLOP/s over its
# bytes/s, in bfloat16, is 156 on A100, 295 on H100 and 281 on B200.
_FREE_TOKENS = 256
# What a link of 50 GB/s carries in the 10 us that a message takes however short it is.
_FREE_BYTES = 500_000
# Below this many assignments an expert some experts are likely to have none: exp(-4) is 2%. Then
# gathered tokens are multiplied by those alone that somebody chose.
FULL_LOAD = 4


def way(moe: config.Moe, num_tokens: int, width: int, bytes_per_element: int) -> config.Moe:
  """Returns how experts serve so many tokens, whatever `moe.dispatch` of training: none is dropped.

  Args:
    num_tokens, width, bytes_per_element: as in `is_cheaper`.
  """
  if is_cheaper(num_tokens, width, bytes_per_element):
    return config.Moe(dispatch="gathered")  # which has no exchange
  return config.Moe(dispatch="dropless", exchange=moe.exchange)


def is_cheaper(num_tokens: int, width: int, bytes_per_element: int) -> bool:
  """Returns whether gathering costs less than an exchange of rows: as its time is then latency.

  True while multiplying every token by every expert takes no longer than reading the experts'
  weights (256 tokens), and what a device sends takes no longer than a message does in any case
  (500 kB).

  Args:
    num_tokens: of all devices of `expert` and `tensor` together.
    width: of a token, elements.

  >>> is_cheaper(128, 512, 2), is_cheaper(4096, 512, 2)
  (True, False)
  """
  return num_tokens <= _FREE_TOKENS and num_tokens * width * bytes_per_element <= _FREE_BYTES
