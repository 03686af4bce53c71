"""What a body asks for, and how little is done for one that is refused."""

import json
import sys

import pytest

from launch import completion_body
from launch.completion_body import Wrong
from moe_jax.interop.tokenizer import Bytes

MOST_PROMPTS = 3


def parse(fields: dict | str, tokenizer=None, end_tokens=()) -> completion_body.Asked:
  body = fields if isinstance(fields, str) else json.dumps({"model": "tiny", **fields})
  return completion_body.parse(
    body.encode(), tokenizer or Bytes(), end_tokens, "tiny", 60.0, MOST_PROMPTS
  )


@pytest.mark.parametrize("prompt", ["x", [120]])
def test_prompts_are_counted_before_any_is_read(prompt, monkeypatch):
  tokenizer, read = Bytes(), []
  encode = tokenizer.encode
  monkeypatch.setattr(tokenizer, "encode", lambda text: read.append(text) or encode(text))
  assert len(parse({"prompt": [prompt] * MOST_PROMPTS}, tokenizer).requests) == MOST_PROMPTS
  read.clear()
  with pytest.raises(Wrong, match="4 prompts in one request; send at most 3") as caught:
    parse({"prompt": [prompt] * 4}, tokenizer)
  assert caught.value.field == "prompt" and read == []
  assert len(parse({"prompt": [120] * 4}).requests) == 1  # token ids of one prompt


def test_a_stop_token_is_kept_once():
  asked = parse({"prompt": ["x", "y"], "stop_token_ids": [7, 2, 7, 9, 2] * 1000}, end_tokens=(2, 1))
  assert [request.stop_tokens for request in asked.requests] == [[2, 1, 7, 9]] * 2


@pytest.mark.parametrize("field", ["prompt", "stop", "stop_token_ids", "stream_options", "suffix"])
def test_what_is_nested_too_deeply_is_refused(field):
  limit = sys.getrecursionlimit()
  # At some depth JSON can be read and not be written again.
  for depth in range(limit - 150, limit + 10):
    value = "[" * depth + "]" * depth
    with pytest.raises(Wrong):
      parse(f'{{"model": "tiny", "prompt": "x", "{field}": {value}}}')


def test_stream_options_are_for_streams():
  options = {"include_usage": True}
  asked = parse({"prompt": "x", "stream": True, "stream_options": options})
  assert asked.stream and asked.include_usage
  assert not parse({"prompt": "x", "stream_options": None}).include_usage
  for fields in ({}, {"stream": False}):
    with pytest.raises(Wrong, match='is only for streams; send "stream": true, or leave') as caught:
      parse({"prompt": "x", "stream_options": options, **fields})
    assert caught.value.field == "stream_options"
