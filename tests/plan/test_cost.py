"""The cost formulas against counts made another way: parameter trees, traced programs, the design's
facts.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from launch import config_file, stopwatch
from moe_jax import config as config_lib
from moe_jax.model import blockwise, transformer
from moe_jax.moe import capacity
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.plan import cost
from moe_jax.train import step
from tests import reference
from tests.plan import executed

SMALL = config_lib.Model(
  layers=2, d_model=24, heads=6, kv_heads=2, head_dim=8, experts=4, experts_per_token=2,
  expert_hidden=40, vocab=56, dtype="float32",
)  # fmt: skip


def shipped(name, **sections):
  values = config_lib.as_dict(config_lib.from_mapping(config_file.load(f"configs/{name}.py")))
  for section, fields in sections.items():
    values[section].update(fields)
  return config_lib.from_mapping(values)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch, request):
  monkeypatch.chdir(request.config.rootpath)


@pytest.mark.parametrize(
  "model",
  [
    SMALL,
    dataclasses.replace(SMALL, tied_embeddings=True),
    *(dataclasses.replace(SMALL, qk_norm=kind) for kind in ("head", "projection")),
  ],
)
def test_parameters_are_those_that_the_model_declares(model):
  tree = jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))
  declared = {
    jax.tree_util.keystr(path): leaf.size for path, leaf in jax.tree.leaves_with_path(tree)
  }
  found = cost.num_parameters(model)
  of = lambda *parts: sum(n for name, n in declared.items() if any(part in name for part in parts))
  assert found.attention == of("['attention']", "['attention_norm']")
  assert found.dispatch == of("['router']", "['expert_norm']")
  assert found.experts == of("['experts']")
  assert found.embed == of("['embedding']")
  assert found.head == of("['head']", "['final_norm']")
  assert found.total == sum(declared.values())


def test_the_reference_deployment_is_what_the_design_says():
  pod64, pod64_10b = shipped("pod64").model, shipped("pod64_10b").model
  assert cost.num_parameters(pod64).total == pytest.approx(0.45e9, rel=0.01)
  assert cost.num_parameters(pod64_10b).total == pytest.approx(10e9, rel=0.01)
  per_token = lambda length: cost.forward_flops(pod64, [length]).total / length
  assert per_token(128) == pytest.approx(0.17e9, rel=0.02)
  assert round(per_token(10_240) / per_token(128), 1) == 2.0
  # 240 TFLOP/s allow 1,400 tokens/ms in prefill of short sequences and 480 in training.
  assert 240e12 / per_token(128) / 1e3 == pytest.approx(1400, rel=0.03)
  assert 240e12 / (3 * per_token(128)) / 1e3 == pytest.approx(480, rel=0.03)


def test_the_forward_pass_is_what_the_reference_multiplies():
  """The slow, obvious model takes every pair of positions and sends every token to every expert."""
  B, S = 2, 12
  tokens = jax.ShapeDtypeStruct((B, S), jnp.int32)
  params = reference.init_params(jax.random.key(0), SMALL)
  logits = lambda params, *text: reference.logits(params, SMALL, *text)
  found = matmul_flops(jax.make_jaxpr(logits)(params, tokens, tokens, tokens).jaxpr)
  ours = cost.forward_flops(SMALL, [S] * B)
  one_pair = SMALL.layers * 4 * SMALL.heads * SMALL.head_dim
  missing_pairs = B * (S * S - cost.causal_pairs([S]))
  missing_rows = ours.experts * (SMALL.experts / SMALL.experts_per_token - 1)
  assert found == ours.total + one_pair * missing_pairs + missing_rows


@pytest.mark.parametrize("save", config_lib.SAVE)
def test_a_train_step_multiplies_what_is_said_to_be_executed(save):
  """With the sums of rows, which the formulas leave out, the program has a little more."""
  settings = wide(pipeline={"save": save, "micro_batches": 2})
  block_tokens = blockwise.block_size(settings.train.sequence)
  said = executed.train_flops(settings, block_tokens).total
  assert program_flops(settings, step.loss_and_gradients) == pytest.approx(said, rel=0.01)


def test_an_evaluation_multiplies_what_is_said_to_be_executed():
  settings = wide(moe={"capacity_factor": 1.5})
  block_tokens = blockwise.block_size(settings.train.sequence)
  said = executed.forward_flops(settings, block_tokens).total
  assert program_flops(settings, step.evaluate) == pytest.approx(said, rel=0.01)


def test_executed_exceeds_model_by_what_is_padded_and_recomputed():
  settings = wide(moe={"capacity_factor": 2.0})
  model, documents = settings.model, [settings.train.sequence] * settings.train.batch
  forward, said = (
    cost.forward_flops(model, documents),
    executed.forward_flops(settings, settings.train.sequence // 2),
  )
  assert said.experts == 2 * forward.experts
  assert said.head == forward.head and said.dispatch == forward.dispatch
  one_pair = model.layers * 4 * model.heads * model.head_dim
  half = settings.train.sequence // 2
  assert said.attention - forward.attention == one_pair * settings.train.batch * (
    3 * half**2 - cost.causal_pairs([2 * half])
  )


@pytest.mark.parametrize("factor", [0.01, 1.0, 1.25, 3.7, 100.0])
@pytest.mark.parametrize("mesh", [{}, {"expert": 2, "tensor": 2, "stage": 2}])
def test_expert_rows_are_those_that_the_dispatch_makes(factor, mesh):
  settings = wide(moe={"capacity_factor": factor}, mesh=mesh, pipeline={"micro_batches": 2})
  model, train, mesh = settings.model, settings.train, settings.mesh
  sources = 2 * mesh.expert * mesh.tensor
  tokens = train.batch * train.sequence // sources
  rows = capacity.rows_per_expert(tokens, model.experts_per_token, model.experts, factor)
  assert executed.expert_rows(settings) == rows * model.experts * sources


def test_expert_rows_of_the_other_dispatches():
  tokens = wide().train.batch * wide().train.sequence
  assert executed.expert_rows(wide(moe={"dispatch": "dense"})) == tokens * wide().model.experts
  assert executed.expert_rows(wide(moe={"dispatch": "dropless"})) == tokens * 2


def test_documents_attend_only_within_themselves():
  whole, split = cost.forward_flops(SMALL, [12]), cost.forward_flops(SMALL, [5, 7])
  one_pair = SMALL.layers * 4 * SMALL.heads * SMALL.head_dim
  assert whole.attention - split.attention == one_pair * 5 * 7
  assert dataclasses.replace(whole, attention=0) == dataclasses.replace(split, attention=0)


def test_a_train_step_is_three_forward_passes():
  forward, step_ = cost.forward_flops(SMALL, [9, 3]), cost.train_flops(SMALL, [9, 3])
  assert (step_.total, step_.experts) == (3 * forward.total, 3 * forward.experts)


def test_phases_are_those_of_by_phase():
  assert tuple(field.name for field in dataclasses.fields(cost.ByPhase)) == cost.PHASES


def wide(**sections):
  """A one-device deployment wide enough for sums of rows to be small beside its products."""
  model = {
    "layers": 4, "d_model": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "experts": 8,
    "experts_per_token": 2, "expert_hidden": 512, "vocab": 256, "dtype": "float32",
  }  # fmt: skip
  train = {"batch": 4, "sequence": 256}
  return config_lib.from_mapping({"model": model, "train": train} | sections)


def program_flops(settings, function):
  mesh = mesh_lib.make(settings.mesh, jax.devices()[:1])
  parameters = jax.eval_shape(lambda: transformer.init(jax.random.key(0), settings.model))
  inputs = jax.tree.map(jnp.asarray, stopwatch.random_inputs(settings))
  jaxpr = jax.make_jaxpr(function(settings, mesh))(parameters, inputs)
  return matmul_flops(jaxpr.jaxpr)


def matmul_flops(jaxpr):
  """Counts the matrix products of a jaxpr, those in loops as often as they run."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracting, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      products = math.prod(left[axis] for axis in contracting)
      total += 2 * equation.outvars[0].aval.size * products
    inside = [matmul_flops(inner) for inner in inner_jaxprs(equation)]
    if equation.primitive.name == "cond":
      total += max(inside)
    else:
      total += equation.params.get("length", 1) * sum(inside)
  return total


def inner_jaxprs(equation):
  for value in equation.params.values():
    for inner in value if isinstance(value, (tuple, list)) else (value,):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield inner


def test_a_prefill_asks_of_the_last_layer_keys_values_and_each_prompts_last_token():
  prompts = [9, 1, 4]
  tokens, D, model = sum(prompts), SMALL.d_model, SMALL
  whole, asked = cost.forward_flops(model, prompts), cost.prefill_flops(model, prompts)
  rest = tokens - len(prompts)  # that bring keys and values only
  queries_and_output = 2 * rest * D * 2 * model.heads * model.head_dim
  pairs = 4 * (cost.causal_pairs(prompts) - tokens) * model.heads * model.head_dim
  assert whole.attention - asked.attention == queries_and_output + pairs
  assert whole.dispatch - asked.dispatch == 2 * rest * D * model.experts
  assert (whole.experts - asked.experts) * model.layers * tokens == whole.experts * rest
  assert asked.head == whole.head * len(prompts) / tokens
  assert cost.prefill_flops(model, [1, 1]) == cost.forward_flops(model, [1, 1])
