"""Even experts by quantiles: the bias under which each expert is chosen by its share of the tokens.

For one batch of scores the most valuable assignment in which every token has K experts and every
expert T K / E tokens is a linear program; its prices are the bias. Two sweeps alternate: what a
token's score must pass to be among its K, and, given those, where an expert's threshold must lie
for it to be chosen T K / E times. The bias serves the next batch, as that of `bias` does. Takes
numpy and jax arrays alike. Knows scores; must not know models or meshes.
"""


def update(bias_E, scores_TE, num_choices: int, *, rounds: int = 1, keep: float = 0.0):
  """Returns bias_E that would have made this batch even; added to scores, it chooses experts.

  With b the bias: a_t is midway between the K-th and the next largest of s_te + b_e; then
  b_e is minus the (1 - K / E) quantile over tokens of s_te - a_t, less the mean over experts.

  Args:
    bias_E: where to begin; zero, or that of the batch before.
    scores_TE: the router's, of all tokens of the batch.
    num_choices: K, below E.
    rounds: of the two sweeps.
    keep: share of `bias_E` in the result, for a moving average; 0 forgets it.

  Source: Jianlin Su, MoE Odyssey 6 (kexue.fm/archives/11619), quantile balancing.
  """
  xp = scores_TE.__array_namespace__()
  num_experts = scores_TE.shape[1]
  found_E = bias_E
  for _ in range(rounds):
    ranked_TE = xp.sort(scores_TE + found_E[None], axis=1)
    last, next_ = ranked_TE[:, -num_choices], ranked_TE[:, -num_choices - 1]
    over_TE = scores_TE - ((last + next_) / 2)[:, None]
    found_E = -xp.quantile(over_TE, 1 - num_choices / num_experts, axis=0)
    found_E = (found_E - found_E.mean()).astype(bias_E.dtype)
  return keep * bias_E + (1 - keep) * found_E
