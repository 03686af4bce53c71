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


def _loads(counts_LE):
  # astype(float) is float64 in numpy and float32 in jax: whole numbers stay whole to 2**24 tokens.
  load_LE = counts_LE.astype(float)
  return counts_LE.__array_namespace__(), load_LE, load_LE.sum(axis=-1, keepdims=True)
