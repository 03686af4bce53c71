"""How evenly the tokens fell on the experts: counts in, figures out.

Takes numpy and jax arrays alike, inside `jit` too. It must not know models, meshes or files.
"""


def load_share(counts_LE):
  """Returns share_LE, the fraction of each layer's tokens that went to each expert.

  Args:
    counts_LE: tokens routed to each expert of each layer.

  Returns:
    Rows that sum to 1; a layer that routed nothing is a row of zeros.
  """
  xp, load_LE, total_L1 = _loads(counts_LE)
  return load_LE / xp.maximum(total_L1, xp.ones_like(total_L1))


def max_over_mean(counts_LE):
  """Returns ratio_L, the busiest expert's tokens over the mean expert's; 1 is perfectly even.

  Args:
    counts_LE: tokens routed to each expert of each layer.

  Returns:
    From 1 to E for each layer; 1 for a layer that routed nothing.
  """
  xp, load_LE, total_L1 = _loads(counts_LE)
  peak_L = load_LE.max(axis=-1) * load_LE.shape[-1]
  total_L = total_L1[..., 0]
  return xp.where(total_L > 0, peak_L / xp.maximum(total_L, xp.ones_like(total_L)), 1.0)


def coefficient_of_variation(counts_LE):
  """Returns cv_L, the standard deviation of an expert's tokens over their mean; 0 is even.

  Args:
    counts_LE: tokens routed to each expert of each layer.

  Returns:
    From 0 to sqrt(E - 1) for each layer, the population's deviation; 0 for a layer that routed
    nothing.
  """
  return load_share(counts_LE).std(axis=-1) * counts_LE.shape[-1]


def dropped_fraction(counts):
  """Returns the fraction of routed tokens that no expert computed; 0 where none was routed.

  Args:
    counts: a mapping with arrays `sent` (token-expert pairs that the router chose) and `dropped`
      (those of them that found no room), of any one shape; further keys are left alone.

  Raises:
    ValueError: `sent` or `dropped` is missing.
  """
  missing = [name for name in ("sent", "dropped") if name not in counts]
  if missing:
    raise ValueError(
      f"counts lack {' and '.join(missing)}, expected sent and dropped, got"
      f" {', '.join(counts) or 'nothing'}; pass the counts that dispatch returns"
    )
  xp = counts["sent"].__array_namespace__()
  sent, dropped = (counts[name].sum().astype(float) for name in ("sent", "dropped"))
  return dropped / xp.maximum(sent, xp.ones_like(sent))


def percentiles(counts_LE, at=(50, 90, 99)):
  """Returns ratio_LN, percentiles of the experts' tokens over the mean expert's.

  Args:
    counts_LE: tokens routed to each expert of each layer; or to each rank, or layers and experts
      swapped, for percentiles across those.
    at: N percentiles, from 0 to 100.

  Returns:
    1 everywhere for an even load; 0 for a layer that routed nothing.
  """
  xp = counts_LE.__array_namespace__()
  ratio_LE = load_share(counts_LE) * counts_LE.shape[-1]
  return xp.stack([xp.percentile(ratio_LE, each, axis=-1) for each in at], axis=-1)


def rank_counts(counts_LE, num_ranks: int):
  """Returns counts_LX, the tokens of each rank where rank x holds experts x * E / X and on."""
  return counts_LE.reshape(*counts_LE.shape[:-1], num_ranks, -1).sum(-1)


def queue(counts_LE, capacity_tokens):
  """Returns queue_LE, the tokens of each expert beyond what it has room for: a number, or one for
  each layer [L, 1].
  """
  xp = counts_LE.__array_namespace__()
  return xp.maximum(counts_LE - capacity_tokens, xp.zeros_like(counts_LE))


def over_windows(counts_ULE, size: int):
  """Returns counts_WLE, the sums over whole windows of `size` micro-batches; a rest is left out."""
  num_windows = len(counts_ULE) // size
  shape = (num_windows, size, *counts_ULE.shape[1:])
  return counts_ULE[: num_windows * size].reshape(shape).sum(1)


def _loads(counts_LE):
  # astype(float) is float64 in numpy and float32 in jax: whole numbers stay whole to 2**24 tokens.
  load_LE = counts_LE.astype(float)
  return counts_LE.__array_namespace__(), load_LE, load_LE.sum(axis=-1, keepdims=True)
