"""Routing recorded from real training: which experts a micro-batch's tokens chose, step by step.

The deployment's model, data and optimizer, on one device and with one micro-batch a step, so that
what a step reports is one micro-batch: which expert serves a token does not depend on the mesh,
but for moe.hosts_per_token, which one device cannot keep. Must not know what balances.
"""

import dataclasses
import json
import pathlib
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from moe_jax import config

# What numpy and zipfile raise at a file that is empty, cut off, or of something else.
_NO_RECORDING = (
  ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


class Recording(NamedTuple):
  """What was recorded.

  Attributes:
    counts_ULE: tokens that chose each expert, by micro-batch and layer, before any drop.
    tokens_UV: how often each token of the vocabulary occurs in the micro-batch.
    settings: as they ran.
  """

  counts_ULE: np.ndarray
  tokens_UV: np.ndarray
  settings: dict


def record(settings: config.Config, report=print) -> Recording:
  """Trains and returns what every step routed.

  Args:
    settings: the deployment; its mesh and pipeline are replaced by one device and one micro-batch,
      and its batch by that of one micro-batch of each expert rank.
    report: takes a line of text now and then.

  Raises:
    ValueError: as `one_micro_batch`.
  """
  # jax takes seconds to import, which a mistyped flag need not wait for.
  import jax

  from moe_jax.interop.tokenizer import TOKENIZERS
  from moe_jax.parallel import mesh as mesh_lib
  from moe_jax.train import batches, optimizer, state, step
  from moe_jax.train.corpus import load_corpus
  from moe_jax.train.data import Dataset

  settings = one_micro_batch(settings)
  train, vocab = settings.train, settings.model.vocab
  corpus = load_corpus(settings.data)
  texts = (document.text for document in corpus.train_documents)
  tokenizer = TOKENIZERS[settings.data.tokenizer].train(texts, vocab)
  dataset = Dataset(
    corpus, tokenizer,
    batch=train.batch, sequence=train.sequence, seed=train.seed, eval_batches=train.eval_batches,
  )  # fmt: skip
  mesh = mesh_lib.make(settings.mesh, jax.devices()[:1])
  optimizer_ = optimizer.make(train)
  order = state.placement(settings, step.table(settings).layer_order)
  now = state.initialiser(settings, mesh, optimizer_, order)(jax.random.key(train.seed))
  take = jax.jit(step.train_step(settings, mesh, optimizer_), donate_argnums=0)
  counts, tokens = [], []
  for step_id in range(train.steps):
    batch = dataset.train_batch(step_id)
    now, metrics = take(now, batches.place(batch, settings, mesh))
    counts.append(np.asarray(metrics.losses.report.assigned_E)[np.argsort(order)])
    tokens.append(np.bincount(batch["tokens"].ravel(), minlength=vocab))
    if (step_id + 1) % max(train.steps // 10, 1) == 0:
      report(f"step {step_id + 1}/{train.steps}  loss {float(metrics.losses.cross_entropy):.4f}")
  return Recording(np.stack(counts), np.stack(tokens), config.as_dict(settings))


def one_micro_batch(settings: config.Config) -> config.Config:
  """Returns the settings on one device with one micro-batch a step, of the size it had.

  Raises:
    ValueError: the router tells hosts apart.
  """
  if settings.router_hosts > 1:
    raise ValueError(
      f"moe.hosts_per_token={settings.moe.hosts_per_token} chooses a token's experts on some of"
      f" {settings.router_hosts} hosts, and routing is recorded on one device; choose"
      " --config.moe.hosts_per_token=0"
    )
  mesh = config.Mesh()
  train = dataclasses.replace(
    settings.train, batch=settings.train.batch // settings.pipeline.micro_batches
  )
  return dataclasses.replace(
    settings,
    mesh=mesh,
    pipeline=dataclasses.replace(
      settings.pipeline, schedule="1f1b", micro_batches=1, chunks=1, prefetch_layers=0
    ),
    moe=settings.moe_on(mesh),
    train=train,
  )


def save(recording: Recording, path: str) -> None:
  """Writes the recording as .npz.

  Raises:
    OSError: the file cannot be written.
  """
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  with open(path, "wb") as file:
    np.savez_compressed(
      file,
      counts_ULE=recording.counts_ULE.astype(np.int32),
      tokens_UV=recording.tokens_UV.astype(np.int32),
      settings=json.dumps(recording.settings),
    )


def load(path: str) -> Recording:
  """Returns a recording that `save` wrote.

  Raises:
    ValueError: the file is no recording.
    OSError: it cannot be read.
  """
  with open(path, "rb") as file:
    try:
      arrays = np.load(file)
      return Recording(
        arrays["counts_ULE"], arrays["tokens_UV"], json.loads(str(arrays["settings"]))
      )
    except _NO_RECORDING as error:
      raise ValueError(
        f"{path} is not a recording ({error}); make one with --record={path}"
      ) from error
