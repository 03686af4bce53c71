"""Serves the model of a run's folder over HTTP, as OpenAI's completions.

  python -m launch.serve --workdir=runs/laptop --port=8000
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "laptop", "prompt": "def ", "max_tokens": 60}'

POST /v1/completions (with "stream": true as server-sent events), GET /v1/models, /health and
/metrics (Prometheus). Fields beyond OpenAI's: top_k, stop_token_ids (beside those with which an
imported model ends its text), deadline_s. The port answers once everything is compiled. A full
queue answers 429. Exit codes: 0 after SIGTERM, which lets running requests finish; 2 bad input; 130
Ctrl-C.
"""

import dataclasses
import importlib.util
import math
import pathlib
import signal
import socket
import sys
import threading

from absl import flags, logging

from launch import trained
from launch.flags import run
from launch.paths import define_workdir
from moe_jax import config

_PACKAGES = ("starlette", "uvicorn", "prometheus_client")  # setup.cfg's serve extra

_WORKDIR = define_workdir()
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to answer at; 0.0.0.0 is every one")
_PORT = flags.DEFINE_integer(
  "port", 8000, "to answer at; 0 takes a free one", lower_bound=0, upper_bound=65535
)
_NAME = flags.DEFINE_string("name", "", "of the model; default the folder's")
_MESH = flags.DEFINE_string("mesh", "1x1x1", "devices, expert x tensor x stage, or x data")
_SLOTS = flags.DEFINE_integer(
  "slots", 4, "sequences of each decode micro-batch on each rank of data and expert", lower_bound=1
)
_QUEUE = flags.DEFINE_integer(
  "queue", 64, "requests that may wait; past it they are refused", lower_bound=1
)
_MAX_TOKENS = flags.DEFINE_integer(
  "max_tokens", 0, "of a prompt and its continuation; 0: the window of training", lower_bound=0
)
_DEADLINE_S = flags.DEFINE_float(
  "deadline_s", 0, "seconds after which a request that names no deadline ends; 0: never",
  lower_bound=0,
)  # fmt: skip
_PAGES_FRACTION = flags.DEFINE_float(
  "pages_fraction", 1.0, "of the memory that all slots would take at --max_tokens",
  lower_bound=0, upper_bound=1,
)  # fmt: skip
_PREFILL_CHUNK = flags.DEFINE_integer(
  "prefill_chunk", 128, "tokens of a prompt that are read at once", lower_bound=1
)
_DECODE_TOKENS = flags.DEFINE_integer(
  "decode_tokens", 1, "tokens of each sequence between two looks at the queue", lower_bound=1
)
_KV_DTYPE = flags.DEFINE_string(
  "kv_dtype", "float32", "of the key-value cache: float32, bfloat16, int8 or float8"
)
_GRACE_S = flags.DEFINE_integer(
  "grace_s", 30, "seconds that running requests have to finish after SIGTERM", lower_bound=0
)


def main() -> int:
  # orbax logs the traceback of every error that it raises; the error's one line is enough.
  logging.set_verbosity(logging.FATAL)
  _check_installed()
  workdir = pathlib.Path(_WORKDIR.value)
  settings, deadline_s = _settings(workdir), _deadline_s()
  listening = _bind()  # a port that is taken is known before the model is loaded
  # Here and not above: a mistyped flag is answered before jax is imported.
  from moe_jax.serve.engine import Engine
  from moe_jax.serve.programs import Programs

  model = trained.load(workdir, settings)
  programs = Programs(settings, model.mesh)
  engine = Engine(settings, programs, programs.parameters(model.parameters), queue=_QUEUE.value)
  name = _NAME.value or workdir.resolve().name
  return _answer(listening, engine, model, name, deadline_s)


def _check_installed() -> None:
  missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
  if missing:
    raise ValueError(
      f"{', '.join(missing)} not installed; type: {sys.executable} -m pip install -e '.[serve]'"
    )


def _settings(workdir: pathlib.Path) -> config.Config:
  serve = config.Serve(
    slots=_SLOTS.value,
    max_tokens=_MAX_TOKENS.value or 1,
    pages_fraction=_PAGES_FRACTION.value,
    kv_dtype=_KV_DTYPE.value,
    prefill_chunk=_PREFILL_CHUNK.value,
    decode_tokens=_DECODE_TOKENS.value,
  )
  settings, window = trained.settings_of(workdir, trained.mesh_sizes(_MESH.value), serve)
  if _MAX_TOKENS.value > window:
    raise ValueError(
      f"--max_tokens={_MAX_TOKENS.value} is past the window of {window} tokens that the model was"
      f" trained on; choose at most {window}"
    )
  tokens = _MAX_TOKENS.value or window
  if tokens < 2:
    raise ValueError(
      f"--max_tokens={tokens} has no room for a prompt and a token; choose 2 or more"
    )
  return dataclasses.replace(settings, serve=dataclasses.replace(serve, max_tokens=tokens))


def _deadline_s() -> float:
  """Returns the deadline of requests that name none."""
  if not math.isfinite(_DEADLINE_S.value):
    raise ValueError(
      f"--deadline_s={_DEADLINE_S.value} is no number of seconds; choose such as 60, or 0 for never"
    )
  return _DEADLINE_S.value or math.inf


def _bind() -> socket.socket:
  """Returns a socket that has its port and does not listen yet."""
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(
      _HOST.value, _PORT.value, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind(address)
  except UnicodeError:  # of names that no name server takes: an empty part, or one too long
    raise ValueError(
      f"--host={_HOST.value} is no name of a host: between its dots are 1 to 63 letters; choose"
      " an address such as 127.0.0.1"
    ) from None
  except OSError as error:
    raise ValueError(
      f"--host={_HOST.value} --port={_PORT.value}: {error.strerror}; choose another, or --port=0"
    ) from error
  return found


def _answer(
  listening: socket.socket, engine, model: trained.Trained, name: str, deadline_s: float
) -> int:
  """Answers until a signal comes or the engine fails; returns the exit code."""
  import asyncio

  import uvicorn

  from launch import answers, completions
  from moe_jax.serve.service import Service

  host, port = listening.getsockname()[:2]
  is_terminated = threading.Event()

  class Server(uvicorn.Server):
    async def startup(self, sockets=None) -> None:
      await super().startup(sockets)
      self.should_exit |= is_terminated.is_set()
      shown = f"[{host}]" if ":" in host else host
      print(f"serving {name} at http://{shown}:{port}", flush=True)

  async def answer() -> None:
    loop = asyncio.get_running_loop()
    stop = lambda: setattr(server, "should_exit", True)
    with Service(engine, on_failure=lambda: loop.call_soon_threadsafe(stop)) as service:
      served = answers.Served(service, model.tokenizer, model.end_tokens, name, deadline_s)
      server = Server(
        uvicorn.Config(
          completions.app(served), http="h11", ws="none", lifespan="off", log_level="warning",
          access_log=False, timeout_graceful_shutdown=_GRACE_S.value,
        )
      )  # fmt: skip
      await server.serve([listening])
    if service.failure is not None:
      raise service.failure

  # uvicorn hears signals while it serves, and passes them on when it has ended.
  signal.signal(signal.SIGTERM, lambda *_: is_terminated.set())
  asyncio.run(answer())
  return 0


if __name__ == "__main__":
  run(main, config=False, devices=True)
