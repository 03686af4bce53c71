"""Text from a trained model, the simple way: a full forward pass over the window for every token.

No key-value cache: each token costs a whole window, which is right for a sample at the end of a
run and wrong for serving. Knows parameters and token ids; must not know text, training or files.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.model import transformer
from moe_jax.model.transformer import Inputs, Parameters
from moe_jax.parallel import collectives, sharding
from moe_jax.parallel.axes import EXPERT, STAGE, TENSOR
from moe_jax.pipeline import executor
from moe_jax.pipeline.schedules import SCHEDULES, forward_only


class Generator:
  """Continues prompts; compiles at the first call, and never again.

  A batch is one micro-batch of one sequence for each rank of `expert`: the smallest that the mesh
  takes.
  """

  def __init__(self, settings: config.Config, mesh: Mesh):
    """Compiles nothing yet.

    Args:
      settings: of the model as it was trained; its window is `train.sequence` tokens.
      mesh: where the parameters lie.
    """
    self._settings = _one_micro_batch(settings)
    self._mesh = mesh
    self._region = _next_logits(self._settings, mesh)
    self._jitted = jax.jit(self._fill, out_shardings=NamedSharding(mesh, P()))

  def __call__(
    self, parameters: Parameters, prompt: Sequence[int], *, temperature: float, seed: int
  ) -> np.ndarray:
    """Returns [expert, S] token ids: the prompt, and in each row another continuation of it.

    Args:
      parameters: master weights, layers as the schedule of `settings` places them.
      prompt: token ids, 1 to S - 1 of them.
      temperature: divides the logits; 0 takes the most likely token, the same in each row.
      seed: of the draws.

    Raises:
      ValueError: the prompt is empty or fills the window, or the temperature is negative.

    Communication: as a forward pass of one micro-batch, for each token.
    """
    num_positions = self._settings.train.sequence
    if not 0 < len(prompt) < num_positions:
      raise ValueError(
        f"the prompt has {len(prompt)} tokens; give 1 to {num_positions - 1}, for the window is"
        f" train.sequence={num_positions}"
      )
    if not 0 <= temperature < float("inf"):
      raise ValueError(f"temperature={temperature} is not a number from 0 up; choose such as 0.8")
    tokens_S = np.zeros(num_positions, np.int32)
    tokens_S[: len(prompt)] = prompt
    arguments = (tokens_S, np.int32(len(prompt)), np.float32(temperature), np.uint32(seed))
    everywhere = NamedSharding(self._mesh, P())
    put = lambda a: jax.make_array_from_callback(
      np.shape(a), everywhere, lambda i: np.asarray(a)[i]
    )
    return np.asarray(self._jitted(parameters, *map(put, arguments)))

  def _fill(self, parameters: Parameters, tokens_S, prompt_tokens, temperature, seed):
    num_rows, num_positions = self._settings.train.batch, self._settings.train.sequence
    parameters = self._to_compute(parameters)
    key = jax.random.key(seed)
    shape = (1, num_rows, num_positions)
    positions = jnp.broadcast_to(jnp.arange(num_positions, dtype=jnp.int32)[None, None], shape)
    unused = jnp.zeros(shape, jnp.int32)

    def write(position, tokens_BS):
      inputs = Inputs(tokens_BS[None], unused, positions, unused, unused.astype(jnp.float32))
      logits_BV = self._region(parameters, inputs, position - 1)
      drawn_B = jax.random.categorical(
        jax.random.fold_in(key, position), logits_BV / jnp.maximum(temperature, 1e-6)
      )
      token_B = jnp.where(temperature > 0, drawn_B, logits_BV.argmax(-1)).astype(jnp.int32)
      return tokens_BS.at[:, position].set(token_B)

    tokens_BS = jnp.broadcast_to(tokens_S[None], shape[1:])
    return jax.lax.fori_loop(prompt_tokens, num_positions, write, tokens_BS)

  def _to_compute(self, parameters: Parameters) -> Parameters:
    model = self._settings.model
    place = lambda leaf, spec: jax.lax.with_sharding_constraint(
      leaf, NamedSharding(self._mesh, spec)
    )
    parameters = transformer.cast(parameters, jnp.dtype(model.dtype))
    return jax.tree.map(place, parameters, transformer.specs(model))


def _next_logits(settings: config.Config, mesh: Mesh) -> Callable:
  """Returns (parameters, inputs, position) -> `logits_BV` at that position, float32."""
  pipeline = settings.pipeline
  functions = transformer.logits_functions(settings)
  schedule = forward_only(
    SCHEDULES[pipeline.schedule](mesh.shape[STAGE], pipeline.micro_batches, pipeline.chunks)
  )

  def region(parameters: Parameters, inputs: Inputs, position: jax.Array) -> jax.Array:
    layers, shared = collectives.varying(parameters)
    logits_UbSv = executor.run(functions, schedule, layers, shared, inputs).outputs
    return logits_UbSv[0, :, position]

  batch = sharding.spec(("micro_batches", "sequences", "positions"))
  return jax.shard_map(
    region,
    mesh=mesh,
    in_specs=(transformer.specs(settings.model), Inputs(*[batch] * len(Inputs._fields)), P()),
    out_specs=P(EXPERT, (STAGE, TENSOR)),
  )


def _one_micro_batch(settings: config.Config) -> config.Config:
  """Returns `settings` for the smallest batch, with room for every token.

  The unwritten rest of the window is routed too; no token of the text may be dropped for it.
  """
  model = settings.model
  return dataclasses.replace(
    settings,
    pipeline=dataclasses.replace(settings.pipeline, micro_batches=1),
    train=dataclasses.replace(settings.train, batch=settings.mesh.expert),
    moe=dataclasses.replace(settings.moe, capacity_factor=model.experts / model.experts_per_token),
  )
