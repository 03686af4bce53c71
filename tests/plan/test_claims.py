"""Every figure of the reference plan has its row, by the names that the rehearsal uses."""

import dataclasses

import jax
import pytest
from jax.sharding import AbstractMesh

from launch import config_file
from moe_jax import config as config_lib
from moe_jax.model import transformer
from moe_jax.parallel import axes
from moe_jax.plan import claim_rows, claims, graph, load, machine, memory, serve, simulate, units
from moe_jax.plan.hardware import CHIPS, cluster
from moe_jax.rehearse import claims as rehearsed
from moe_jax.train import streaming


def figures(pytestconfig, name):
  path = str(pytestconfig.rootpath / f"configs/{name}.py")
  settings = config_lib.from_mapping(config_file.load(path))
  h100 = cluster("h100:16x4")
  machines = {
    "on the chip": machine.Machine(h100),
    "planned": machine.Machine(dataclasses.replace(h100, chip=CHIPS["planned"])),
  }
  prompts = serve.Workload(128, 10_240, 256)
  built = graph.build(settings)
  return claims.Figures(
    settings,
    machines,
    {name: simulate.train(settings, on) for name, on in machines.items()},
    memory.train(settings),
    {name: serve.run(settings, on, prompts) for name, on in machines.items()},
    load.zipf(settings, 0.0),
    (built.num_nodes, built.num_edges),
  )


@pytest.fixture(scope="module")
def pod64(pytestconfig):
  return figures(pytestconfig, "pod64")


def collectives(found):
  """Those of a layer's forward pass, one row for each."""
  on = found.machines["on the chip"]
  return [
    {
      "kind": step.kind, "phase": step.phase, "bytes_per_gpu": step.operand_bytes,
      "link": machine.wires(step, found.settings, on).link,
      "largest_operand_bytes": step.operand_bytes,
      "longest_seconds": machine.seconds(step, found.settings, on),
    }
    for step in units.unit(found.settings, "forward")
    if step.is_communication
  ]  # fmt: skip


def of_both_tables(found, claim):
  """The row of that name in the plan's table and in the rehearsal's."""
  tables = (claims.rows(found), rehearsed.rows(found.settings, as_report(found)))
  return [next(row for row in rows if row.claim == claim) for rows in tables]


def with_mesh(found, **sizes):
  mesh = dataclasses.replace(found.settings.mesh, **sizes)
  return found._replace(settings=dataclasses.replace(found.settings, mesh=mesh))


def as_report(found):
  """The plan's figures in the form of the rehearsal's report."""
  parts = {}
  for name, run in found.runs.items():
    exposure = {
      "hidden_fraction": 0.5,
      "hidden_of_hideable": 0.5,
      "hidden_fraction_by_axis": {"tensor": 0.5},
      "hidden_of_hideable_by_axis": {"tensor": 0.5},
    }
    prediction = {
      "bubble_fraction": run.bubble_fraction, "tokens_per_ms_per_gpu": 1.0, "step_s": run.step_s,
      "chip": name, "compute_s_by_phase": run.compute_s_by_phase, "ttft_s": None,
    }  # fmt: skip
    parts[name] = {"exposure": exposure, "prediction": prediction}
  names = ("parameters", "optimizer", "compute_copies", "activations_and_buffers", "total")
  memory_bytes = {name: getattr(found.memory, name) for name in names}
  train = found.settings.train
  workload = {
    "step": "train", "sequences": train.batch, "tokens_each": train.sequence, "cached_tokens": 0,
    "micro_batches": found.settings.pipeline.micro_batches,
  }  # fmt: skip
  return {
    "workload": workload, "memory_bytes": memory_bytes, "collectives": collectives(found),
    "planned": parts["planned"],
    **parts["on the chip"],
  }  # fmt: skip


def test_no_row_of_the_rehearsal_is_missing(pod64):
  names = {row.claim for row in claims.rows(pod64)}
  theirs = {row.claim for row in rehearsed.rows(pod64.settings, as_report(pod64))}
  assert theirs - names == set()


def test_rows_are_unique_and_whole(pod64):
  rows = claims.rows(pod64)
  assert len({row.claim for row in rows}) == len(rows)
  assert all(row.asked and row.found and row.how for row in rows)


def test_what_is_known_of_the_reference_plan(pod64):
  by_name = {row.claim: row for row in claims.rows(pod64)}
  assert by_name["modules: 8 x 4 x 2 GPUs"].holds
  assert by_name["bubble"].holds
  assert by_name["memory per GPU"].holds
  assert by_name["time to first token at 10,240 tokens"].holds
  assert by_name["DAG"].holds
  assert not by_name["model size"].holds and by_name["model size"].found == "0.45 B"
  assert not by_name["traffic: 280 GB/ms in all = 19.4% of 1,440"].holds
  saved = by_name["all-to-all traffic between hosts, hierarchical against flat"]
  assert saved.found == "-75%" and saved.holds


@pytest.mark.parametrize(
  "exchange, found", [("flat", "-0%"), ("hierarchical", "-75%"), ("hierarchical_float8", "-87%")]
)
def test_an_exchange_saves_what_it_does_not_send_between_hosts(pod64, exchange, found):
  """Of rows of 512 bfloat16 and 4 tensor ranks; float8 sends 516 bytes of 4,096."""
  moe = dataclasses.replace(pod64.settings.moe, exchange=exchange)
  changed = pod64._replace(settings=dataclasses.replace(pod64.settings, moe=moe))
  for rows in (claims.rows(changed), rehearsed.rows(changed.settings, as_report(changed))):
    (row,) = (row for row in rows if row.claim.endswith("hierarchical against flat"))
    assert (row.found, row.holds) == (found, exchange != "flat")


def test_gpus_for_6_400_tokens_do_not_depend_on_those_there_are(pod64):
  mesh = dataclasses.replace(pod64.settings.mesh, expert=4)
  half = pod64._replace(settings=dataclasses.replace(pod64.settings, mesh=mesh))
  for of in (claims.rows, lambda found: rehearsed.rows(found.settings, as_report(found))):
    rows = [row for row in of(pod64) + of(half) if row.claim.startswith("64 GPUs are needed")]
    assert rows[0] == rows[1] and "asks for 5.4 planned GPUs" in rows[0].found


def test_the_all_to_all_is_that_of_tokens_and_not_of_counts(pod64):
  (row,) = (r for r in claims.rows(pod64) if r.claim == "all-to-all, between hosts")
  on = pod64.machines["on the chip"]
  rows = next(s for s in units.unit(pod64.settings, "forward") if s.name == "to experts")
  assert row.found == f"{machine.seconds(rows, pod64.settings, on) * 1e3:.3f} ms each"


def test_inside_hosts_rows_travel_by_all_gather_and_reduce_scatter(pod64):
  """Along `tensor` counts alone are sent all-to-all: what they take is no exchange's time."""
  on = pod64.machines["on the chip"]
  inside = [
    machine.seconds(step, pod64.settings, on)
    for step in units.unit(pod64.settings, "forward")
    if step.name in ("spread rows", "sum rows")
  ]
  words = "there is none: rows travel there by all-gather and reduce-scatter"
  for row in of_both_tables(pod64, "all-to-all, inside hosts"):
    assert (row.found, row.holds) == (f"{words}, {max(inside) * 1e3:.3f} ms each", None)
  one_host = with_mesh(pod64, expert=2, tensor=2, stage=1)
  for row in of_both_tables(one_host, "all-to-all, inside hosts"):
    assert row.found[0] == "0" and row.holds


@pytest.mark.parametrize("mesh", [{"expert": 1}, {"expert": 2, "tensor": 2, "stage": 1}])
def test_without_an_exchange_between_hosts_nothing_is_claimed_of_it(pod64, mesh):
  found = with_mesh(pod64, **mesh)
  for link in ("all-to-all, between hosts", "all-to-all traffic between hosts, hierarchical"):
    names = {row.claim for row in claims.rows(found) if row.claim.startswith(link)}
    for row in of_both_tables(found, *names):
      assert (row.found, row.holds) == ("there is none", None)


def test_bubbles_are_those_of_the_stages_and_micro_batches_there_are(pod64):
  wide = with_mesh(pod64, stage=4)
  plain = dataclasses.replace(pod64.settings.pipeline, schedule="1f1b", chunks=1)
  unchunked = pod64._replace(settings=dataclasses.replace(pod64.settings, pipeline=plain))
  for found, words in (
    (pod64, "a bubble of 5.9% here, with 4 chunks one of 1.5%"),  # 1 / 17 and 1 / 65
    (wide, "a bubble of 15.8% here, with 4 chunks one of 4.5%"),  # 3 / 19 and 3 / 67
    (unchunked, "a bubble of 5.9% here"),
  ):
    for row in of_both_tables(found, "pipeline: schedule"):
      assert row.how == f"the config; plain 1F1B has {words}"


@pytest.mark.parametrize(
  "mesh, pipeline, words",
  [
    ({}, {}, "attention's weights of 3 of 4 chunks while the pipeline fills"),
    ({}, {"prefetch_layers": 2}, "attention's weights 2 layers ahead"),
    (
      {"expert": 4, "data": 2},
      {"prefetch_layers": 1},
      "attention's and experts' weights 1 layers ahead",
    ),
    (
      {"expert": 1, "tensor": 1, "stage": 1, "data": 64},
      {"chunks": 8, "micro_batches": 1},
      "attention's and experts' weights of 7 of 8 chunks, each beside the one before",
    ),
    ({"data": 2, "expert": 4}, {"schedule": "1f1b", "chunks": 1}, "all weights are there"),
    ({"expert": 1}, {}, "all weights are there"),
  ],
)
def test_weights_that_come_ahead_are_those_that_lie_in_shares(pod64, mesh, pipeline, words):
  settings = pod64.settings
  found = pod64._replace(
    settings=dataclasses.replace(
      settings,
      mesh=dataclasses.replace(settings.mesh, **mesh),
      pipeline=dataclasses.replace(settings.pipeline, **pipeline),
    )
  )
  _, row = of_both_tables(found, "expert prefetch")
  assert row.found == words
  sizes = tuple(getattr(found.settings.mesh, axis) for axis in axes.ALL)
  laid = streaming.specs(found.settings, AbstractMesh(sizes, axes.ALL)).layers
  specs = [
    jax.tree_util.tree_leaves_with_path(each, is_leaf=lambda node: isinstance(node, jax.P))
    for each in (laid, transformer.specs(settings.model).layers)
  ]
  in_shares = " ".join(
    jax.tree_util.keystr(path)
    for (path, spec), (_, whole) in zip(*specs, strict=True)
    if spec != whole
  )
  for name in ("attention", "experts"):
    assert (f"['{name}']" in in_shares) == (name in words)


def test_with_wider_layers_it_is_the_10_b_that_were_meant(pytestconfig):
  by_name = {row.claim: row for row in claims.rows(figures(pytestconfig, "pod64_10b"))}
  assert by_name["model size"].holds and by_name["model size in FP16"].holds
  assert not by_name["memory per GPU: parameters"].holds


def test_what_binds_is_the_longest(pod64):
  run = pod64.runs["on the chip"]
  link_s = run.seconds_by_link["between"]
  found = claim_rows.binding(0.9 * link_s, run.seconds_by_link, run.step_s)
  assert found.startswith(f"link between hosts binds: {link_s * 1e3:.1f} ms")
  found = claim_rows.binding(9.0, run.seconds_by_link, 10.0, " on h100")
  assert found.startswith("computation binds on h100: 9000.0 ms of a step of 10000.0, beside link")
