"""The body of a completions request, checked: what is wrong gets one line that says what would do.

Fields are those of OpenAI's API; of those that are not implemented only the value that asks for
nothing is taken, and of `user`, which asks for nothing, any. Knows JSON and tokenizers; must not
know the engine's state or HTTP.
"""

import difflib
import json
import math
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.interop.tokenizer import Tokenizer
from moe_jax.serve.packing import Wish
from moe_jax.serve.requests import Request

MOST_STOPS = 4  # as OpenAI

_NEUTRAL = {
  "n": 1, "best_of": 1, "echo": False, "logprobs": None, "suffix": "", "presence_penalty": 0,
  "frequency_penalty": 0, "logit_bias": {},
}  # fmt: skip
_FIELDS = (
  "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop",
  "stop_token_ids", "stream", "stream_options", "user", "deadline_s", *_NEUTRAL,
)  # fmt: skip


class Wrong(Exception):
  """A request that cannot be answered.

  Attributes:
    status: of HTTP.
    field: of the body that is wrong; None where it is not one field.
    code: short name of the mistake; None where there is none.
  """

  def __init__(
    self, message: str, field: str | None = None, status: int = 400, code: str | None = None
  ):
    super().__init__(message)
    self.status, self.field, self.code = status, field, code


class Asked(NamedTuple):
  """A completions request.

  Attributes:
    requests: one for each prompt.
    stops: strings before which each text ends.
    stream: whether text is sent as it comes.
    include_usage: whether the stream's last piece counts tokens.
  """

  requests: list[Request]
  stops: list[str]
  stream: bool
  include_usage: bool


def parse(
  body: bytes,
  tokenizer: Tokenizer,
  end_tokens: Sequence[int],
  model: str,
  deadline_s: float,
  most_prompts: int,
) -> Asked:
  """Returns what a body asks for; lengths, ids and too low a temperature are the engine's to check.

  Args:
    body: JSON in UTF-8.
    tokenizer: of prompts that are text.
    end_tokens: stop tokens beside those of the body.
    model: name of the one that is served.
    deadline_s: where the body names none.
    most_prompts: that are taken at once.

  Raises:
    Wrong: says which field, what it has, and what it may have.
  """
  fields = _object(body)
  _check_names(fields)
  _check_model(fields, model)
  stream = _boolean(fields, "stream")
  include_usage = _include_usage(fields, stream)
  new_tokens = _number(fields, "max_tokens", 16, int, 1)
  stop_tokens = list(dict.fromkeys([*end_tokens, *_stop_tokens(fields)]))
  deadline_s = _number(fields, "deadline_s", deadline_s, float, 0)
  requests = [
    Request(prompt, new_tokens, _wish(fields), stop_tokens, deadline_s)
    for prompt in _prompts(fields, tokenizer, most_prompts)
  ]
  return Asked(requests, _stops(fields), stream, include_usage)


def _object(body: bytes) -> dict:
  try:
    fields = json.loads(body.decode())
  except UnicodeDecodeError as error:
    raise Wrong(f"the body is not UTF-8 at byte {error.start}; send JSON in UTF-8") from error
  except RecursionError as error:
    raise Wrong("the body is nested too deeply; send one object of fields") from error
  except ValueError as error:
    raise Wrong(f"the body is not JSON: {error}") from error
  if not isinstance(fields, dict):
    raise Wrong(f"the body is a JSON {type(fields).__name__}; send an object of fields")
  return fields


def _check_names(fields: dict) -> None:
  for name, value in fields.items():
    if name not in _FIELDS:
      near = difflib.get_close_matches(name, _FIELDS, 1)
      hint = f"did you mean {near[0]}?" if near else f"fields are {', '.join(_FIELDS)}"
      raise Wrong(f"{_shown(name)} is not a field; {hint}", _printable(name), code="unknown_field")
    neutral = _NEUTRAL.get(name)
    is_number = not isinstance(value, bool) and isinstance(value, int | float)
    is_neutral = value is None or (value == neutral and is_number == (type(neutral) is int))
    if name in _NEUTRAL and not is_neutral:
      raise Wrong(
        f"{name}={_shown(value)} is not supported; leave it out", name, code="unsupported"
      )


def _check_model(fields: dict, served: str) -> None:
  model = fields.get("model")
  if not isinstance(model, str):
    raise Wrong(f"model={_shown(model)} is not a name; send model={served!r}", "model")
  if model != served:
    raise Wrong(
      f"model={_shown(model)} is not served here; send model={served!r}",
      "model", 404, "model_not_found",
    )  # fmt: skip


def _wish(fields: dict) -> Wish:
  """Returns how a prompt's tokens are chosen; without a seed by another one at each call."""
  return Wish(
    _number(fields, "temperature", 1.0, float, 0, 2),
    _number(fields, "top_k", 0, int, 0, 2**31 - 1),
    _number(fields, "top_p", 1.0, float, 0, 1),
    _number(fields, "seed", secrets.randbits(32), int, 0, 2**32 - 1),
  )


def _prompts(fields: dict, tokenizer: Tokenizer, most: int) -> list[list[int]]:
  """Returns the token ids of each prompt: a text, texts, ids, or lists of ids."""
  prompt = fields.get("prompt")
  if isinstance(prompt, str):
    return [_encode(prompt, tokenizer)]
  if isinstance(prompt, list) and prompt:
    are_texts = all(isinstance(each, str) for each in prompt)
    if not are_texts and not all(isinstance(each, list) for each in prompt):
      return [_tokens(prompt, "prompt")]
    if len(prompt) > most:
      raise Wrong(f"{len(prompt)} prompts in one request; send at most {most}", "prompt")
    return [_encode(each, tokenizer) if are_texts else _tokens(each, "prompt") for each in prompt]
  raise Wrong(
    f"prompt={_shown(prompt)} is no prompt; send a text, a list of texts, a list of token ids or a"
    " list of those",
    "prompt",
  )


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
  _check_utf8(text, "prompt")
  return tokenizer.encode(text).tolist()


def _check_utf8(text: str, field: str) -> None:
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise Wrong(
      f"{field} has half a surrogate pair at character {error.start}, which UTF-8 cannot hold;"
      " send whole characters",
      field,
    ) from error


def _tokens(value, field: str) -> list[int]:
  if isinstance(value, list) and all(type(each) is int for each in value):
    return value
  raise Wrong(f"{field}={_shown(value)} is no list of token ids", field)


def _stop_tokens(fields: dict) -> list[int]:
  value = fields.get("stop_token_ids")
  return [] if value is None else _tokens(value, "stop_token_ids")


def _stops(fields: dict) -> list[str]:
  value = fields.get("stop")
  stops = [] if value is None else [value] if isinstance(value, str) else value
  is_list = isinstance(stops, list) and all(isinstance(each, str) and each for each in stops)
  if not is_list or len(stops) > MOST_STOPS:
    raise Wrong(
      f"stop={_shown(value)} is not 1 to {MOST_STOPS} texts that are not empty; send those", "stop"
    )
  for stop in stops:
    _check_utf8(stop, "stop")
  return stops


def _include_usage(fields: dict, stream: bool) -> bool:
  options = fields.get("stream_options")
  if options is None:
    return False
  if not isinstance(options, dict) or set(options) - {"include_usage"}:
    raise Wrong(
      f'stream_options={_shown(options)} is not {{"include_usage": true or false}}; send that',
      "stream_options",
    )
  if not stream:
    raise Wrong(
      f'stream_options={_shown(options)} is only for streams; send "stream": true, or leave it out',
      "stream_options",
    )
  return _boolean(options, "include_usage")


def _boolean(fields: dict, name: str) -> bool:
  value = fields.get(name)
  if value is None or isinstance(value, bool):
    return bool(value)
  raise Wrong(f"{name}={_shown(value)} is not true or false", name)


def _number(fields: dict, name: str, default, kind: type, least, most=math.inf):
  """Returns a field's number; absent or null is the default."""
  value = fields.get(name)
  if value is None:
    return default
  kinds = (int,) if kind is int else (int, float)
  if type(value) not in kinds or not least <= value <= most:
    noun = "a whole number" if kind is int else "a number"
    upper = f" to {most}" if most < math.inf else " up"
    raise Wrong(f"{name}={_shown(value)} is not {noun} from {least}{upper}", name)
  # A whole number may be too large for a float; one without an upper limit is then infinite.
  return value if kind is int else float(min(value, 1e300))


def _shown(value) -> str:
  """Returns the beginning of a value as JSON, fit for one line."""
  try:
    text = json.dumps(value)
  except RecursionError:
    return "a value nested too deeply"
  return text if len(text) <= 40 else f"{text[:37]}..."


def _printable(name: str) -> str:
  return json.dumps(name)[1:-1][:40]
