"""Small runs for tests: their config, their text, a port to meet at, and what is in their folders.

Knows configs/tiny.py; it must not know which runs are tested.
"""

import argparse
import hashlib
import json
import socket
from pathlib import Path

from launch import config_file
from moe_jax import config

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.py")
# 100 kB of text that every machine has, which loads at once.
TEXT = argparse.__file__


def settings(**fields_by_section) -> config.Config:
  """Returns configs/tiny.py on TEXT, with fields of some sections replaced."""
  values = config_file.load(TINY).to_dict()
  values["data"]["paths"] = TEXT
  for section, fields in fields_by_section.items():
    values[section].update(fields)
  return config.from_mapping(values)


def rows(workdir: Path) -> list[dict]:
  """Returns the lines of a run's metrics file, without one that is half written."""
  path = workdir / "metrics.jsonl"
  text = path.read_text() if path.exists() else ""
  return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def free_port() -> int:
  """Returns a port of this machine that nobody listens on."""
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    return listener.getsockname()[1]


def digests(folder: Path) -> dict[str, str]:
  """Returns the digest of every file under `folder`."""
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def flip_a_bit(checkpoint: Path) -> None:
  """Damages the largest file of a checkpoint by one bit."""
  path = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
