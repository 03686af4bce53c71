"""The server as a process, asked by OpenAI's own client and by clients that misbehave."""

import contextlib
import http.client
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import openai
import prometheus_client.parser
import pytest

from moe_jax.serve.generate import Generator
from moe_jax.train import loop
from tests import runs

WINDOW = 128  # in pages one width of programs: most of this file's time is compiling
LAYERS = 32  # a long request takes long enough to be caught in the middle
SLOTS, QUEUE = 2, 3
PROMPT = "def "
FLAGS = (f"--slots={SLOTS}", f"--queue={QUEUE}", "--prefill_chunk=16", "--pages_fraction=0.6")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The folder of a run of one step, and what its model says greedily after PROMPT."""
  folder = tmp_path_factory.mktemp("runs") / "tiny"
  settings = runs.settings(
    model={"layers": LAYERS},
    mesh={"expert": 1, "tensor": 1, "stage": 1},
    pipeline={"micro_batches": 1},
    train={"batch": 1, "sequence": WINDOW, "steps": 1, "warmup_steps": 0, "eval_every": 1},
  )
  with jax.numpy_dtype_promotion("standard"):
    outcome = loop.train(settings, folder, stream=io.StringIO(), devices=jax.devices()[:1])
  generate = Generator(settings, outcome.mesh)
  parameters = generate.programs.parameters(outcome.state.parameters)
  (ids,) = generate(parameters, [list(PROMPT.encode())], new_tokens=40)
  return folder, ids


@contextlib.contextmanager
def server(folder, *flags):
  """Starts a server; yields the process and its port once it answers."""
  command = [sys.executable, "-W", "error", "-m", "launch.serve", f"--workdir={folder}"]
  process = subprocess.Popen(
    [*command, "--port=0", *FLAGS, *flags],
    cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  try:
    first = process.stdout.readline()
    found = re.fullmatch(r"serving tiny at http://127\.0\.0\.1:(\d+)\n", first)
    assert found, first + (process.stderr.read() if process.poll() is not None else "")
    yield process, int(found[1])
  finally:
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def port(trained):
  with server(trained[0]) as (process, port):
    connection = begin_long(port)
    assert b" 200 OK" in connection.recv(1000)
    process.kill()
    process.wait()
    connection.close()
  with server(trained[0], f"--port={port}") as (_, again):
    assert again == port
    yield port


@pytest.fixture
def idle(port):
  """Holds a test to leaving nothing behind."""
  yield
  wait_until(lambda: held(port) == (0, 0))
  found = metrics(port)
  assert found["moe_jax_free_pages"] == found["moe_jax_pages"]
  assert ask(port, {"prompt": PROMPT, "max_tokens": 2})[0] == 200


def text_of(ids) -> str:
  return bytes(ids).decode(errors="replace")


def client(port) -> openai.OpenAI:
  return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def send(port, method, path, body=None) -> tuple[int, bytes, dict]:
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  with contextlib.closing(connection):
    connection.request(method, path, body)
    response = connection.getresponse()
    return response.status, response.read(), dict(response.getheaders())


def ask(port, fields, **more) -> tuple[int, dict]:
  """Returns status and answer of a completions request."""
  body = json.dumps({"model": "tiny", "temperature": 0, **fields, **more})
  status, answer, _ = send(port, "POST", "/v1/completions", body.encode())
  return status, json.loads(answer)


def metrics(port) -> dict[str, float]:
  status, text, _ = send(port, "GET", "/metrics")
  assert status == 200
  families = prometheus_client.parser.text_string_to_metric_families(text.decode())
  return {
    "".join([sample.name, *sample.labels.values()]): sample.value
    for family in families
    for sample in family.samples
  }


def held(port) -> tuple[float, float]:
  found = metrics(port)
  return found["moe_jax_requests_running"], found["moe_jax_requests_waiting"]


def wait_until(holds, timeout_s=60.0):
  end = time.monotonic() + timeout_s
  while not holds():
    assert time.monotonic() < end, "still not so"
    time.sleep(0.02)


def begin_long(port, stream=True) -> socket.socket:
  """Returns a connection on which a completion of over a hundred tokens was asked for."""
  fields = {"model": "tiny", "prompt": PROMPT, "max_tokens": WINDOW - 4, "stream": stream}
  body = json.dumps({**fields, "temperature": 0}).encode()
  found = socket.create_connection(("127.0.0.1", port), timeout=60)
  head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
  found.sendall(head.encode() + body)
  return found


def test_the_openai_client_gets_what_the_model_says(port, trained, idle):
  ids = trained[1]
  asked = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 40}
  found = client(port).completions.create(**asked)
  assert found.choices[0].text == text_of(ids)
  assert found.choices[0].finish_reason == "length"
  assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (4, 40)
  assert [model.id for model in client(port).models.list()] == ["tiny"]
  assert client(port).models.retrieve("tiny").owned_by == "moe_jax"


def test_the_openai_client_gets_it_as_a_stream(port, trained, idle):
  ids = trained[1]
  options = {"stream": True, "stream_options": {"include_usage": True}}
  asked = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 40}
  *pieces, last = client(port).completions.create(**asked, **options)
  assert "".join(piece.choices[0].text for piece in pieces) == text_of(ids)
  assert len(pieces) > 10
  assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [
    "length"
  ]
  assert last.choices == [] and last.usage.completion_tokens == 40


def test_several_prompts_as_text_or_ids(port, trained, idle):
  ids = trained[1]
  for prompt in ([PROMPT, "x = ["], [list(PROMPT.encode()), list(b"x = [")]):
    found = client(port).completions.create(
      model="tiny", prompt=prompt, temperature=0, max_tokens=9
    )
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found.choices[0].text == text_of(ids[:9])
    assert (
      found.choices[1].text
      == ask(port, {"prompt": "x = [", "max_tokens": 9})[1]["choices"][0]["text"]
    )


def test_stops_by_token_and_by_text(port, trained, idle):
  ids = trained[1]
  status, found = ask(port, {"prompt": PROMPT, "max_tokens": 40, "stop_token_ids": [ids[6]]})
  first = ids.index(ids[6])
  assert (status, found["choices"][0]["finish_reason"]) == (200, "stop")
  assert found["choices"][0]["text"] == text_of(ids[:first])
  assert found["usage"]["completion_tokens"] == first + 1
  text = text_of(ids)
  stop = text[8:11]
  status, found = ask(port, {"prompt": PROMPT, "max_tokens": 40, "stop": ["never said", stop]})
  assert found["choices"][0] == {
    "index": 0, "text": text[: text.index(stop)], "logprobs": None, "finish_reason": "stop",
  }  # fmt: skip


@pytest.mark.slow
def test_a_model_that_ends_its_text_stops(trained, tmp_path):
  folder, ids = trained
  ends = shutil.copytree(folder, tmp_path / "tiny")
  (ends / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[6]]}))
  first = ids.index(ids[6])
  other = next(token for token in range(256) if token not in ids)
  with server(ends) as (_, port):
    for more in ({}, {"stop_token_ids": [other]}):
      found = ask(port, {"prompt": PROMPT, "max_tokens": 40}, **more)[1]["choices"][0]
      assert (found["text"], found["finish_reason"]) == (text_of(ids[:first]), "stop")


def test_seeds_decide_draws(port, idle):
  draw = lambda **more: ask(port, {"prompt": PROMPT, "temperature": 1.0, "max_tokens": 12}, **more)
  text = lambda found: found[1]["choices"][0]["text"]
  assert text(draw(seed=1, top_k=40)) == text(draw(seed=1, top_k=40))
  assert len({text(draw()) for _ in range(3)}) == 3
  texts = lambda found: {choice["text"] for choice in found[1]["choices"]}
  assert len(texts(draw(prompt=[PROMPT] * 3))) == 3
  assert len(texts(draw(prompt=[PROMPT] * 3, seed=1))) == 1


def test_a_client_that_hangs_up_frees_its_slot(port, idle):
  cancelled = lambda: metrics(port)["moe_jax_requests_totalcancelled"]
  for stream in (True, False):
    before = cancelled()
    connection = begin_long(port, stream)
    wait_until(lambda: held(port)[0] == 1)
    connection.close()
    wait_until(lambda: held(port) == (0, 0))
    assert cancelled() == before + 1
  connection = begin_long(port)  # in the middle of the answer
  assert connection.recv(1000)
  connection.close()
  with socket.create_connection(("127.0.0.1", port)) as half:  # and in the middle of the question
    half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")


def test_overload_is_refused_and_passes(port, idle):
  refused = lambda: metrics(port)["moe_jax_requests_refused_total"]
  before = refused()
  with contextlib.ExitStack() as connections:

    def is_full():
      if held(port)[1] < QUEUE:
        connections.callback(begin_long(port).close)
        return False
      return True

    # A long request may end between the look at the queue and the next one: then once more.
    def one_is_refused():
      wait_until(is_full)
      try:
        client(port).completions.create(model="tiny", prompt="x")
      except openai.RateLimitError as error:
        assert "3 requests wait already" in str(error)
        return True
      return False

    def two_are_refused():
      wait_until(is_full)
      so_far = refused()
      body = b'{"model": "tiny", "prompt": ["x", "y"]}'
      status, answer, headers = send(port, "POST", "/v1/completions", body)
      if status == 200:
        return False
      assert (status, json.loads(answer)["error"]["code"]) == (429, "overloaded")
      assert int(headers["retry-after"]) > 0
      assert refused() >= so_far + 2  # each prompt is one
      return True

    wait_until(one_is_refused)
    wait_until(two_are_refused)
  assert refused() >= before + 3


def test_a_deadline_ends_a_request(port, idle):
  long = {"prompt": PROMPT, "max_tokens": WINDOW - 4, "deadline_s": 0.01}
  status, found = ask(port, long)
  assert (status, found["error"]["code"]) == (504, "deadline")
  with pytest.raises(openai.APIError, match="the deadline passed"):
    extra = {"deadline_s": 0.05}
    list(
      client(port).completions.create(
        model="tiny", prompt=PROMPT, max_tokens=WINDOW - 4, stream=True, extra_body=extra
      )
    )


@pytest.mark.parametrize(
  ("body", "status", "message"),
  [
    (b"", 400, "the body is not JSON"),
    (b"{", 400, "the body is not JSON"),
    (b"[]", 400, "the body is a JSON list"),
    (b"[" * 100_000, 400, "the body is nested too deeply"),
    (b'{"model": "tiny", "prompt": "\xff"}', 400, "the body is not UTF-8 at byte 29"),
    (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "half a surrogate pair at character 0"),
    (b'{"model": "tiny", "prompt": "x", "\\ud800": 1}', 400, "is not a field"),
    (b'{"prompt": "x"}', 400, "model=null is not a name; send model='tiny'"),
    (b'{"model": "gpt", "prompt": "x"}', 404, "is not served here"),
    (b"x" * (4 * 2**20 + 1), 413, "the body is over 4194304 bytes"),
    ({}, 400, "prompt=null is no prompt"),
    ({"prompt": ""}, 400, "the prompt has 0 tokens"),
    ({"prompt": []}, 400, "prompt=[] is no prompt"),
    ({"prompt": ["x", 1]}, 400, "is no list of token ids"),
    ({"prompt": [True]}, 400, "is no list of token ids"),
    ({"prompt": [256]}, 400, "prompt has token 256; tokens are 0 to 255"),
    ({"prompt": ["x", ""]}, 400, "the prompt has 0 tokens"),
    ({"prompt": ["x"] * 4}, 400, "4 prompts in one request; send at most 3"),
    ({"prompt": "x" * 127}, 400, "the prompt has 127 tokens and 16 are to be made"),
    ({"prompt": "x", "max_tokens": 128}, 400, "the prompt has 1 tokens and 128 are to be made"),
    ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens=0 is not a whole number from 1"),
    ({"prompt": "x", "max_tokens": "9"}, 400, 'max_tokens="9" is not a whole number'),
    ({"prompt": "x", "max_tokens": 10**400}, 400, "are to be made"),
    ({"prompt": "x", "temperature": 3}, 400, "temperature=3 is not a number from 0 to 2"),
    ({"prompt": "x", "temperature": 1e-9}, 400, "temperature=1e-09 is too low"),
    ({"prompt": "x", "temperature": float("nan")}, 400, "temperature=NaN is not a number"),
    ({"prompt": "x", "top_p": 1.5}, 400, "top_p=1.5 is not a number from 0 to 1"),
    ({"prompt": "x", "top_k": 1.5}, 400, "top_k=1.5 is not a whole number"),
    ({"prompt": "x", "seed": 2**32}, 400, "seed=4294967296 is not a whole number from 0"),
    ({"prompt": "x", "stream": "yes"}, 400, 'stream="yes" is not true or false'),
    ({"prompt": "x", "stream_options": {"usage": 1}}, 400, "stream_options="),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, 400, "is only for streams"),
    ({"prompt": "x", "stop": [""]}, 400, 'stop=[""] is not 1 to 4 texts'),
    ({"prompt": "x", "stop": list("abcde")}, 400, "is not 1 to 4 texts"),
    ({"prompt": "x", "stop_token_ids": [999]}, 400, "stop_tokens has token 999"),
    ({"prompt": "x", "stop_token_ids": 0}, 400, "stop_token_ids=0 is no list of token ids"),
    ({"prompt": "x", "stop_token_ids": False}, 400, "stop_token_ids=false is no list of token"),
    ({"prompt": "x", "stop_token_ids": ""}, 400, 'stop_token_ids="" is no list of token ids'),
    ({"prompt": "x", "deadline_s": 0}, 400, "deadline_s=0.0 is not positive"),
    ({"prompt": "x", "max_token": 4}, 400, '"max_token" is not a field; did you mean max_tokens?'),
    ({"prompt": "x", "n": 2}, 400, "n=2 is not supported; leave it out"),
    ({"prompt": "x", "echo": True}, 400, "echo=true is not supported"),
    ({"prompt": "x", "suffix": "y"}, 400, 'suffix="y" is not supported'),
    ({"prompt": "x", "logit_bias": {"9": 1}}, 400, 'logit_bias={"9": 1} is not supported'),
  ],
)
def test_bad_input_gets_a_clear_4xx(port, body, status, message):
  body = body if isinstance(body, bytes) else json.dumps({"model": "tiny", **body}).encode()
  found, answer, _ = send(port, "POST", "/v1/completions", body)
  error = json.loads(answer)["error"]
  assert (found, error["type"]) == (status, "invalid_request_error")
  assert message in error["message"] and "\n" not in error["message"]
  assert sum(held(port)) == 0


def test_what_asks_for_nothing_is_taken(port, idle):
  neutral = {"n": 1, "echo": False, "logprobs": None, "presence_penalty": 0.0, "suffix": None}
  asked = {"prompt": "x", "max_tokens": 1, "stop": None, "stop_token_ids": None, "user": "me"}
  assert ask(port, asked, **neutral)[0] == 200
  assert ask(port, asked, logit_bias={}, suffix="")[0] == 200


def test_other_paths_and_methods_get_an_openai_error(port):
  for method, path, status in (
    ("GET", "/v1/completions", 405),
    ("GET", "/v2", 404),
    ("GET", "/v1/models/other", 404),
  ):
    found, answer, _ = send(port, method, path)
    assert found == status and "message" in json.loads(answer)["error"]
  assert send(port, "GET", "/health")[:2] == (200, b'{"status":"ok"}')


def test_metrics_count_and_time(port, idle):
  before = metrics(port)
  assert ask(port, {"prompt": "four", "max_tokens": 7})[0] == 200
  after = metrics(port)
  grown = lambda name: after[f"moe_jax_{name}"] - before[f"moe_jax_{name}"]
  assert grown("requests_totallength") == 1
  assert grown("new_tokens_total") == 7 and grown("prompt_tokens_total") == 4
  assert after["moe_jax_slots"] == SLOTS
  # The last new token is not fed again; each of the others chooses two of the eight experts, but
  # for the prompt's in the last layer, which works its last token alone.
  for layer in range(LAYERS):
    tokens = [grown(f"expert_tokens_total{expert}{layer}") for expert in range(8)]
    assert sum(tokens) == 2 * ((4 if layer < LAYERS - 1 else 1) + 7 - 1)
    shares = [after[f"moe_jax_expert_share{expert}{layer}"] for expert in range(8)]
    assert sum(shares) == pytest.approx(1)
    ratio = after[f"moe_jax_expert_load_max_over_mean{layer}"]
    assert ratio == pytest.approx(8 * max(shares)) and ratio > 1
  assert after["moe_jax_dropped_assignments_total"] == 0
  for name in ("time_to_first_token_seconds", "time_per_token_seconds"):
    found = [after[f"moe_jax_{name}{share}"] for share in ("0.5", "0.9", "0.99")]
    assert 0 < found[0] <= found[1] <= found[2] < 600


def test_killed_in_the_middle_it_serves_again(port, trained):
  # Every test here asks a server that took the port of one that was killed while it answered.
  assert ask(port, {"prompt": PROMPT, "max_tokens": 5})[1]["choices"][0]["text"] == text_of(
    trained[1][:5]
  )


def test_sigterm_lets_requests_finish(trained):
  folder, ids = trained
  with server(folder) as (process, port):
    answers = []
    fields = {"prompt": PROMPT, "max_tokens": WINDOW - 4}
    thread = threading.Thread(target=lambda: answers.append(ask(port, fields)))
    thread.start()
    wait_until(lambda: held(port)[0] == 1)
    process.send_signal(signal.SIGTERM)
    thread.join()
    assert answers[0][0] == 200
    assert answers[0][1]["choices"][0]["text"].startswith(text_of(ids[:30]))
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


def test_sigterm_before_the_first_request_ends_the_server():
  # An engine that does nothing, for only the time between its end of compiling and the server's
  # beginning counts.
  program = """
import os, signal, types
from absl import flags
from launch import completions, serve

def app(served, make=completions.app):
  os.kill(os.getpid(), signal.SIGTERM)
  return make(served)

completions.app = app
flags.FLAGS(["serve", "--workdir=none", "--port=0"])
engine = types.SimpleNamespace(queue=1, is_idle=lambda: True)
model = types.SimpleNamespace(tokenizer=None, end_tokens=())
raise SystemExit(serve._answer(serve._bind(), engine, model, "none", 1.0))
"""
  command = [sys.executable, "-W", "error", "-c", program]
  found = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=60)
  assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--port=70000",), "--port=70000"),
    (("--max_tokens=129",), "--max_tokens=129 is past the window of 128 tokens"),
    (("--max_tokens=1",), "--max_tokens=1 has no room for a prompt and a token"),
    (("--mesh=2x2",), "--mesh=2x2 is not expert x tensor x stage"),
    (("--queue=0",), "--queue=0"),
    (("--slot=1",), "did you mean --slots?"),
    (("--workdir=",), "--workdir=: it is empty; name a folder"),
    (("--deadline_s=nan",), "--deadline_s=nan is no number of seconds; choose such as 60"),
    (("--deadline_s=inf",), "--deadline_s=inf is no number of seconds"),
    (("--host=nowhere.invalid",), "--host=nowhere.invalid --port=8000"),
    (("--host=a..b",), "--host=a..b is no name of a host"),
    ((f"--host={'x' * 70}",), "between its dots are 1 to 63 letters"),
  ],
)
def test_a_mistyped_flag_takes_one_line(trained, flags, message):
  command = [sys.executable, "-W", "error", "-m", "launch.serve", f"--workdir={trained[0]}"]
  found = subprocess.run([*command, *flags], cwd=runs.ROOT, capture_output=True, text=True)
  assert found.returncode == 2
  assert message in found.stderr and len(found.stderr.splitlines()) == 1


def test_a_port_that_is_taken_is_named(trained, port):
  command = [sys.executable, "-m", "launch.serve", f"--workdir={trained[0]}", f"--port={port}"]
  found = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
  assert found.returncode == 2
  assert f"--port={port}: Address already in use; choose another" in found.stderr
