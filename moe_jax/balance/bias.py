"""Even experts without a loss: a bias on the router's scores that only the choice of experts sees.

An expert with more than the mean of the tokens is made a little less likely to be chosen, one with
less a little more; the weight of a chosen expert is still that of its own score, and no gradient
comes from it. The update stands outside the optimizer, once a step. Takes numpy and jax arrays
alike. Knows scores and counts; must not know models, optimizers or meshes.
"""


def update(bias_LE, counts_LE, speed: float):
  """Returns bias_LE after a step: each entry moved by `speed` towards an even load, around 0.

  b_e <- b_e + speed x sign(mean - c_e), less the mean over experts, which no choice sees and which
  would wander.

  Args:
    bias_LE: of each layer's experts; zero to begin with, float32.
    counts_LE: the step's tokens of each expert, over all devices.
    speed: in units of the scores; 0.001 for scores from 0 to 1.

  Source: Auxiliary-Loss-Free Load Balancing Strategy (arXiv:2408.15664), algorithm 1; DeepSeek-V3
  (arXiv:2412.19437), section 2.1.2.
  """
  xp = counts_LE.__array_namespace__()
  load_LE = counts_LE.astype(bias_LE.dtype)
  moved_LE = bias_LE + speed * xp.sign(load_LE.mean(axis=-1, keepdims=True) - load_LE)
  return moved_LE - moved_LE.mean(axis=-1, keepdims=True)
