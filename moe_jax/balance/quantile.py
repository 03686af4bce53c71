"""Even experts by quantiles: the bias under which each expert is chosen by its share of the tokens.

For one batch of scores the most valuable assignment in which every token has K experts and every
expert T K / E tokens is a linear program; its prices are the bias. Two sweeps alternate: what a
token's score must pass to be among its K, and, given those, where an expert's threshold must lie
for it to be chosen T K / E times. The bias serves the next batch, as that of `bias` does. Takes
numpy and jax arrays alike. Knows scores; must not know models or meshes.

`update` has a whole batch at hand. Where it is spread over devices and micro-batches, each counts
(`passing`) how many of its tokens pass each of a few edges; the counts add up, whole numbers in any
order, and from their sum `from_counts` reads the thresholds: the same on every mesh.
"""

import numpy as np

# Where thresholds are looked for, around the present one: close together where a bias that is
# nearly right finds its next, and out to a distance that no score between tokens keeps.
_FARTHEST, _NUM_EDGES, _BEND = 8.0, 65, 5.0
EDGES = _FARTHEST * np.sinh(np.linspace(-_BEND, _BEND, _NUM_EDGES)) / np.sinh(_BEND)


def update(bias_E, scores_TE, num_choices: int, *, rounds: int = 1, keep: float = 0.0):
  """Returns bias_E that would have made this batch even; added to scores, it chooses experts.

  With b the bias: a_t is midway between the K-th and the next largest of s_te + b_e; then
  b_e is minus the (1 - K / E) quantile over tokens of s_te - a_t, less the mean over experts.

  Args:
    bias_E: where to begin; zero, or that of the batch before.
    scores_TE: the router's, of all tokens of the batch.
    num_choices: K; where that is E, nothing can be evened, and `bias_E` stays.
    rounds: of the two sweeps.
    keep: share of `bias_E` in the result, for a moving average; 0 forgets it.

  Source: Jianlin Su, MoE Odyssey 6 (kexue.fm/archives/11619), quantile balancing.
  """
  xp = scores_TE.__array_namespace__()
  num_experts = scores_TE.shape[1]
  if num_choices == num_experts:
    return bias_E
  found_E = bias_E
  for _ in range(rounds):
    over_TE = scores_TE - _must_pass(scores_TE + found_E[None], num_choices)
    found_E = -xp.quantile(over_TE, 1 - num_choices / num_experts, axis=0)
    found_E = (found_E - found_E.mean()).astype(bias_E.dtype)
  return keep * bias_E + (1 - keep) * found_E


def passing(bias_E, scores_TE, num_choices: int):
  """Returns above_EB, how many tokens would choose each expert were its bias lower by each edge.

  Args:
    bias_E: that the batch was routed with.
    scores_TE: the router's, of some tokens of the batch.
    num_choices: K, below E.

  Returns:
    int32, falling along the `EDGES`; to be summed over all tokens of the batch.
  """
  biased_TE = scores_TE + bias_E[None]
  over_TE1 = (biased_TE - _must_pass(biased_TE, num_choices))[..., None]
  edges_11B = EDGES[None, None].astype(biased_TE.dtype)
  return (over_TE1 > edges_11B).sum(axis=0, dtype=np.int32)


def from_counts(bias_LE, above_LEB, share_L1):
  """Returns bias_LE that would have made the batch even: what one round of `update` finds from
  `bias_LE`, read between the two edges around it.

  Args:
    bias_LE: that the batch was routed with.
    above_LEB: sums of `passing`.
    share_L1: tokens of an expert if all had the same number, T K / E.
  """
  xp, edges_B = above_LEB.__array_namespace__(), EDGES.astype(np.float32)
  above_LEB = above_LEB.astype(np.float32)
  next_LE1 = (above_LEB > share_L1[..., None]).sum(axis=-1, keepdims=True).clip(1, len(EDGES) - 1)
  more, fewer = (xp.take_along_axis(above_LEB, next_LE1 - i, axis=-1)[..., 0] for i in (1, 0))
  left, right = (xp.asarray(edges_B)[next_LE1[..., 0] - i] for i in (1, 0))
  part_LE = ((more - share_L1) / xp.maximum(more - fewer, xp.ones_like(more))).clip(0, 1)
  found_LE = bias_LE - (left + part_LE * (right - left))
  return found_LE - found_LE.mean(axis=-1, keepdims=True)


def _must_pass(biased_TE, num_choices: int):
  """Returns what each token's biased score must pass for an expert to be chosen, [T, 1]."""
  ranked_TE = biased_TE.__array_namespace__().sort(biased_TE, axis=1)
  return ((ranked_TE[:, -num_choices] + ranked_TE[:, -num_choices - 1]) / 2)[:, None]
