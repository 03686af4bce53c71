"""What is asked of the engine and what it answers: token ids, never text.

Knows limits of a deployment; must not know slots, pages or how requests arrive.
"""

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax import config
from moe_jax.serve.packing import Wish

LENGTH, STOP, CANCELLED, DEADLINE, FAILED = "length", "stop", "cancelled", "deadline", "failed"
ENDS = (LENGTH, STOP, CANCELLED, DEADLINE, FAILED)


class Overloaded(Exception):
  """The queue is full: nothing was taken in, and the same request may be given again later."""


class Request(NamedTuple):
  """A prompt to continue.

  Attributes:
    prompt: token ids.
    new_tokens: to make, at most.
    wish: how to choose them.
    stop_tokens: each ends the request, and is then its last token.
    deadline_s: after the request arrived; what is not finished by then ends.
  """

  prompt: Sequence[int]
  new_tokens: int
  wish: Wish = Wish()
  stop_tokens: Sequence[int] = ()
  deadline_s: float = math.inf


class Timing(NamedTuple):
  """When what happened to a request, in seconds of the engine's clock.

  Attributes:
    arrived_s: when it was given to the engine.
    first_s: when its first token was known; NaN before.
    last_s: when its newest token was known; NaN before the first.
    num_tokens: made.
  """

  arrived_s: float
  first_s: float = math.nan
  last_s: float = math.nan
  num_tokens: int = 0

  @property
  def time_to_first_token_s(self) -> float:
    """From arrival, the wait in the queue included; NaN without a token."""
    return self.first_s - self.arrived_s

  @property
  def time_per_token_s(self) -> float:
    """Mean over the tokens after the first; NaN with fewer than two."""
    if self.num_tokens < 2:
      return math.nan
    return (self.last_s - self.first_s) / (self.num_tokens - 1)


class Event(NamedTuple):
  """News of a request.

  Attributes:
    request_id: as `submit` returned it.
    tokens: new ones, in order.
    ended: one of ENDS with the request's last event, empty before.
    timing: so far.
  """

  request_id: int
  tokens: tuple[int, ...]
  ended: str
  timing: Timing


def check(settings: config.Config, request: Request) -> None:
  """Refuses what could never be served.

  Raises:
    ValueError: an empty prompt, one too long for what is to be made, tokens that are not of the
      vocabulary, a deadline that is not positive, or a wish that cannot be met.
  """
  most, vocab = settings.serve.max_tokens, settings.model.vocab
  if operator.index(request.new_tokens) < 1:
    raise ValueError(f"new_tokens={request.new_tokens} is not positive; choose at least 1")
  if not 0 < len(request.prompt) <= most - request.new_tokens:
    raise ValueError(
      f"the prompt has {len(request.prompt)} tokens and {request.new_tokens} are to be made; give"
      f" at least 1 and at most {most} together (serve.max_tokens)"
    )
  for name, tokens in (("prompt", request.prompt), ("stop_tokens", request.stop_tokens)):
    wrong = [token for token in tokens if not 0 <= operator.index(token) < vocab]
    if wrong:
      raise ValueError(f"{name} has token {wrong[0]}; tokens are 0 to {vocab - 1}")
  if not request.deadline_s > 0:
    raise ValueError(f"deadline_s={request.deadline_s} is not positive; choose seconds above 0")
  request.wish.check()
