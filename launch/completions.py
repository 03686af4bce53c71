"""The HTTP side of serving: OpenAI's completions, a list of models, health and metrics.

Whatever becomes of a connection, the requests that came by it are cancelled or finished: no slot
outlives its client. Knows HTTP, text and the service; must not know devices or flags.
"""

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterator

import prometheus_client
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from launch import completion_body
from launch.answers import Answers, Piece, Served
from launch.completion_body import Wrong
from launch.serving_metrics import ServiceCollector

MOST_BODY_BYTES = 4 * 2**20
BODY_TIMEOUT_S = 30.0
_RETRY_AFTER_S = 1
_CLIENT_GONE = 499  # as nginx notes it; nobody is there to read it


def app(served: Served) -> Starlette:
  """Returns the ASGI application."""
  registry = prometheus_client.CollectorRegistry()
  registry.register(ServiceCollector(served.service))
  created = int(time.time())
  listed = {"id": served.model, "object": "model", "created": created, "owned_by": "moe_jax"}

  async def models(request: Request):
    return JSONResponse({"object": "list", "data": [listed]})

  async def model(request: Request):
    if request.path_params["name"] != served.model:
      return _error(Wrong(f"only {served.model!r} is served here", "model", 404, "model_not_found"))
    return JSONResponse(listed)

  async def health(request: Request):
    is_open = served.service.is_open
    return JSONResponse({"status": "ok" if is_open else "stopped"}, 200 if is_open else 503)

  async def metrics(request: Request):
    text = prometheus_client.generate_latest(registry)
    return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

  return Starlette(
    routes=[
      Route("/v1/completions", functools.partial(_completions, served), methods=["POST"]),
      Route("/v1/models", models),
      Route("/v1/models/{name:path}", model),
      Route("/health", health),
      Route("/metrics", metrics),
    ],
    exception_handlers={HTTPException: _http_error},
  )


async def _completions(served: Served, request: Request) -> Response:
  try:
    body = await _body(request)
    # On another thread: a long text takes the tokenizer a while, and others wait for their tokens.
    asked = await asyncio.to_thread(
      completion_body.parse,
      body,
      served.tokenizer,
      served.end_tokens,
      served.model,
      served.deadline_s,
      served.service.queue,
    )
    answers = Answers(served, asked)
    answers.submit()
  except ClientDisconnect:
    return Response(status_code=_CLIENT_GONE)
  except Wrong as error:
    return _error(error)
  if asked.stream:
    return _Stream(answers)
  return await _whole(request, answers)


class _Stream(StreamingResponse):
  """Server-sent events: a chunk for each piece of text, then [DONE]."""

  def __init__(self, answers: Answers):
    super().__init__(self._lines(answers), media_type="text/event-stream")
    self.headers["Cache-Control"] = "no-cache"
    self._answers = answers

  async def __call__(self, scope, receive, send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:  # the client may have gone at any moment
      self._answers.cancel()

  @staticmethod
  async def _lines(answers: Answers) -> AsyncIterator[str]:
    try:
      async for piece in answers.pieces():
        yield _line(answers.head | {"choices": [_choice(piece)]})
    except Wrong as error:  # the status has been sent, so that only an event can say it
      yield _line(_described(error))
      return
    if answers.asked.include_usage:
      yield _line(answers.head | {"choices": [], "usage": answers.usage()})
    yield "data: [DONE]\n\n"


async def _whole(request: Request, answers: Answers) -> Response:
  """Returns all text at once; a client that goes away is noticed while it is made."""
  collecting = asyncio.ensure_future(_collect(answers))
  leaving = asyncio.ensure_future(_disconnected(request))
  try:
    await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
    if not collecting.done():
      return Response(status_code=_CLIENT_GONE)
    choices = await collecting
    return JSONResponse(answers.head | {"choices": choices, "usage": answers.usage()})
  except Wrong as error:
    return _error(error)
  finally:
    collecting.cancel()
    leaving.cancel()
    answers.cancel()


async def _collect(answers: Answers) -> list[dict]:
  parts = [[] for _ in answers.asked.requests]
  async for piece in answers.pieces():
    parts[piece.index].append(piece)
  return [
    _choice(Piece(i, "".join(piece.text for piece in pieces), pieces[-1].finish))
    for i, pieces in enumerate(parts)
  ]


async def _disconnected(request: Request) -> None:
  while (await request.receive())["type"] != "http.disconnect":
    pass


async def _body(request: Request) -> bytes:
  """Returns the request's body.

  Raises:
    Wrong: it is too long, or too long in coming.
    ClientDisconnect: the client went away.
  """
  body = bytearray()
  try:
    async with asyncio.timeout(BODY_TIMEOUT_S):
      async for part in request.stream():
        body += part
        if len(body) > MOST_BODY_BYTES:
          raise Wrong(f"the body is over {MOST_BODY_BYTES} bytes; send less", None, 413)
  except TimeoutError as error:
    raise Wrong(f"the body took over {BODY_TIMEOUT_S} s; send it at once", None, 408) from error
  return bytes(body)


def _choice(piece: Piece) -> dict:
  return {
    "index": piece.index,
    "text": piece.text,
    "logprobs": None,
    "finish_reason": piece.finish or None,
  }


def _line(fields: dict) -> str:
  return f"data: {json.dumps(fields)}\n\n"


def _described(error: Wrong) -> dict:
  kind = "invalid_request_error" if error.status < 500 else "server_error"
  described = {"message": str(error), "type": kind, "param": error.field, "code": error.code}
  return {"error": described}


def _error(error: Wrong) -> JSONResponse:
  is_temporary = error.status in (429, 503)
  headers = {"Retry-After": str(_RETRY_AFTER_S)} if is_temporary else None
  return JSONResponse(_described(error), error.status, headers)


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
  said = f"{request.method} {request.url.path}: {error.detail}"
  response = _error(Wrong(said, None, error.status_code))
  response.headers.update(error.headers or {})
  return response
