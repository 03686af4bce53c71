"""The simulated step: one small plan worked by hand, and what must hold for every plan."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from moe_jax import config
from moe_jax.plan import (
  links,
  load,
  machine,
  memory,
  program,
  simulate,
  skew,
  steps,
  timeline,
  units,
)
from moe_jax.plan.calibration import Calibration
from moe_jax.plan.hardware import CHIPS, Cluster
from tests import runs
from tests.plan import protocols

# 1 TFLOP/s (TensorFloat-32 runs at half of bfloat16's rate), 1 TB/s of memory, links of 1 GB/s
# without latency: a byte takes 1 ns on a link.
ROUND = dataclasses.replace(
  CHIPS["h100"],
  name="round", peak_flops_per_s={"bfloat16": 2e12, "float32": 1e12}, memory_bytes_per_s=1e30,
  inside_bytes_per_s=1e9, between_bytes_per_s=1e9, protocols=protocols.steps(0.0),
)  # fmt: skip


def golden():
  """Two layers on two devices of one host, each an expert rank; one micro-batch, saved whole."""
  return config.from_mapping(
    {
      "model": {
        "layers": 2, "d_model": 8, "heads": 2, "kv_heads": 2, "head_dim": 4, "experts": 2,
        "experts_per_token": 1, "expert_hidden": 16, "vocab": 256, "dtype": "float32",
      },
      "mesh": {"expert": 2, "tensor": 1, "stage": 1},
      "pipeline": {"schedule": "1f1b", "micro_batches": 1, "save": "everything"},
      "moe": {"dispatch": "capacity", "capacity_factor": 1.0},
      "train": {"batch": 2, "sequence": 16},
    }
  )  # fmt: skip


def test_a_small_plan_worked_by_hand():
  settings = golden()
  run = simulate.train(settings, machine.Machine(Cluster(ROUND, 1, 2), Calibration(launch_s=0.0)))
  # A device has 1 sequence of 16 tokens. Each layer, forwards:
  #   projections: 4 matrices 8 x 8, 2 FLOPs each: 16 x 4 x 64 x 2 = 8,192
  #   pairs: the kernels' block of 64 x 64, 2 heads of 16, 2 products of 2 FLOPs: 4,096 x 2 x 64 =
  #   524,288
  #   router: 16 x 8 x 2 x 2 = 512, exact float32, at 1 TFLOP/s like the others
  #   experts: 2 sources send each expert ceil(1.0 x 16 x 1 / 2) = 8 rows: 16 rows x 6 x 8 x 16 =
  #   12,288
  projections, pairs, router, experts = 8_192, 524_288, 512, 12_288
  # The head: 16 x 8 x 256 x 2 = 65,536.
  head = 65_536
  # Backwards twice as much, but of pairs 7 products where there were 2.
  rest = projections + router + experts
  forward, backward = rest + pairs, 2 * rest + 7 * pairs // 2
  compute_s = (2 * (forward + backward) + 3 * head) * 1e-12
  assert run.compute_s == pytest.approx(compute_s)
  # All-to-all: 2 experts x 8 rows x 8 x 4 bytes = 512, half of it leaves: 256 ns, there and back,
  # forwards and backwards, in two layers: 8 x 256 ns.
  # Counts: 2 integers of each layer to the other device, 2 x 8 ns.
  exchange_s, counts_s = 8 * 256e-9, 2 * 8e-9
  # Replicated over expert: a layer's attention 4 x 64, router 16, norms 8 + 8; once the embedding
  # and head 2,048 each and a norm of 8: 2 x 288 + 4,104 = 4,680 elements, of which half is sent:
  # gathered at the begin, gradients scattered at the end, 4 bytes each: 2 x 9,360 ns.
  ends_s = 2 * 9_360e-9
  # Report: 2 layers x (2 x (2 + 7) + 2) x 4 bytes, losses and norm 12 bytes, target weights 4
  # bytes; an all-reduce of two devices sends as much as it has.
  sums_s = (160 + 12 + 4) * 1e-9
  links_s = exchange_s + counts_s + ends_s + sums_s
  assert run.seconds_by_link["inside"] == pytest.approx(links_s)
  assert run.bytes_by_link["inside"] == pytest.approx(links_s * 1e9)
  # With one stage and one micro-batch counts run beside the head, and a layer's gradients of its
  # experts' weights beside the way back of their rows; the optimizer takes no time here.
  beside_s = counts_s + 2 * experts * 1e-12
  assert run.step_s == pytest.approx(compute_s + links_s - beside_s)
  assert run.bubble_fraction == 0
  # Memory: 4,680 / 2 elements and an expert of 3 x 128 a layer, 12 bytes each with moments.
  held = memory.train(settings)
  assert held.parameters == 4 * (4_680 // 2 + 2 * 384)
  assert held.optimizer == 2 * held.parameters
  assert held.gradients == 4 * (4_680 + 2 * 384)
  # Experts' weights are computed with where the optimizer holds them.
  assert held.compute_copies == 4 * 4_680


CHIP = {
  "flops": st.floats(1e12, 1e15), "memory": st.floats(1e11, 1e13), "inside": st.floats(1e9, 1e12),
  "between": st.floats(1e8, 1e11),
}  # fmt: skip
CASES = [
  runs.settings(),
  runs.settings(pipeline={"schedule": "interleaved", "chunks": 2, "save": "residuals"}),
  runs.settings(mesh={"stage": 4, "tensor": 1}, moe={"dispatch": "dropless"}),
  runs.settings(mesh={"tensor": 1, "data": 2}, pipeline={"schedule": "interleaved", "chunks": 2}),
]


def seconds(settings, values, tied):
  chip = dataclasses.replace(
    CHIPS["h100"], name=f"{values}", peak_flops_per_s={"bfloat16": values["flops"]},
    memory_bytes_per_s=values["memory"], inside_bytes_per_s=values["inside"],
    between_bytes_per_s=values["between"],
  )  # fmt: skip
  return simulate.step_seconds(settings, machine.Machine(Cluster(chip, 4, 2)), tied)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
  settings=st.sampled_from(CASES), values=st.fixed_dictionaries(CHIP),
  which=st.sampled_from(list(CHIP)), factor=st.floats(1, 100),
)  # fmt: skip
def test_faster_parts_never_make_a_slower_step(settings, values, which, factor):
  """Step by step; beside each other, what starts first can hold up what matters more."""
  better = values | {which: values[which] * factor}
  before_s, after_s = (seconds(settings, each, tied=False) for each in (values, better))
  assert after_s <= before_s * (1 + 1e-9)


@hypothesis_settings(max_examples=40, deadline=None)
@given(settings=st.sampled_from(CASES), values=st.fixed_dictionaries(CHIP))
def test_a_step_is_no_shorter_than_any_of_its_resources(settings, values):
  chip = dataclasses.replace(
    CHIPS["h100"], name=f"{values}", peak_flops_per_s={"bfloat16": values["flops"]},
    memory_bytes_per_s=values["memory"], inside_bytes_per_s=values["inside"],
    between_bytes_per_s=values["between"],
  )  # fmt: skip
  run = simulate.train(settings, machine.Machine(Cluster(chip, 4, 2)))
  longest = max(run.compute_s, *run.seconds_by_link.values())
  assert longest <= run.step_s * (1 + 1e-9)
  assert run.step_s <= run.compute_s + sum(run.seconds_by_link.values()) * (1 + 1e-9)
  assert 0 <= run.hidden_fraction <= 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", CASES)
def test_on_the_timeline_no_stream_does_two_things_and_nothing_runs_too_early(settings, tied):
  on = machine.Machine(Cluster(CHIPS["h100"], 4, 2))
  for _, blocks in program.train(settings, tied):
    for block in blocks:
      ran = machine.run_block(block, settings, on)
      for place, op in enumerate(block):
        assert all(ran.ends[waited] <= ran.starts[place] + 1e-15 for waited in op.after)
  events = simulate.events(settings, on, tied)
  for stream in machine.STREAMS:
    mine = sorted((e.start_s, e.end_s) for e in events if e.stream == stream)
    assert mine or getattr(settings.mesh, stream.removesuffix(" link")) == 1, stream
    assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(mine))


def test_an_even_load_takes_as_long_as_the_step():
  for settings in CASES:
    on = machine.Machine(Cluster(CHIPS["h100"], 4, 2))
    even = load.zipf(settings, 0.0)
    for tied in (False, True):
      found = skew.end_seconds(settings, on, even, tied)
      assert found.max() == pytest.approx(simulate.train(settings, on, tied).step_s)
      assert found.shape == (settings.mesh.stage, settings.mesh.expert)


def test_the_busiest_rank_holds_up_the_others():
  settings, on = CASES[2], machine.Machine(Cluster(CHIPS["h100"], 4, 2))
  took = [
    skew.end_seconds(settings, on, load.zipf(settings, exponent)).max()
    for exponent in (0.0, 1.0, 2.0)
  ]
  assert took[0] < took[1] < took[2]
  # A capacity dispatch has the same rows whatever the router does.
  fixed = [
    skew.end_seconds(CASES[0], on, load.zipf(CASES[0], exponent)).max() for exponent in (0.0, 2.0)
  ]
  assert fixed[0] == fixed[1]


@pytest.mark.parametrize("save", ["inputs", "residuals"])
def test_a_round_more_by_hand(save):
  """Of one micro-batch on one stage: every step of a round once more; and where the backward pass
  runs nothing again in the first round, in the second it runs it again all the same.
  """
  settings = runs.settings(
    mesh={"expert": 2, "tensor": 1, "stage": 1}, pipeline={"micro_batches": 1, "save": save},
    moe={"dispatch": "dropless"},
  )  # fmt: skip
  on = machine.Machine(Cluster(CHIPS["h100"], 1, 2))
  even = load.zipf(settings, 0.0)
  uneven = even._replace(rounds_L=even.rounds_L + 1, first_LX=even.first_LX / 2)
  found, without = (
    skew.end_seconds(settings, on, each, tied=False).max() for each in (uneven, even)
  )
  seconds = lambda s: machine.seconds(s, settings, on)
  of_layer = [*units.unit(settings, "forward"), *units.unit(settings, "backward")]
  more = sum(seconds(s) for s in of_layer if s.follows == steps.ROUNDS)
  if save == "residuals":
    forward = units.unit(settings, "forward")
    more += sum(seconds(s) for s in forward if s.follows == steps.ROUNDS)
    # Half of the rows travelled in the second round.
    more += sum(seconds(s) / 2 for s in forward if s.follows == steps.ROWS)
  assert found - without == pytest.approx(settings.model.layers * more)


def test_pictures_of_the_timeline(tmp_path):
  on = machine.Machine(Cluster(CHIPS["h100"], 4, 2))
  events = simulate.events(CASES[1], on)
  trace = timeline.trace(events)["traceEvents"]
  named = [event for event in trace if event["ph"] == "M"]
  assert [event["args"]["name"] for event in named] == list(machine.STREAMS)
  drawn = [event for event in trace if event["ph"] == "X"]
  assert len(drawn) == len(events) and all(event["dur"] > 0 for event in drawn)
  steady = timeline.steady(events)
  assert min(event.start_s for event in steady) == 0
  assert {event.unit for event in steady} >= {"forward", "backward"}
  page = timeline.page(steady, "a <tick>")
  assert "a &lt;tick&gt;" in page and page.count("<rect") == len(steady)


def test_copies_with_as_many_sequences_each_add_what_they_send_each_other():
  """What a step of two or four takes more are weights, gradients, counts and sums on the link; what
  ticks multiply is the same, and of the optimizer's state each has less."""
  on = machine.Machine(Cluster(CHIPS["h100"], 4, 8))
  batch = runs.settings().train.batch
  copies = [runs.settings(mesh={"data": n}, train={"batch": batch * n}) for n in (1, 2, 4)]
  ran = [simulate.train(settings, on) for settings in copies]
  assert ran[0].step_s < ran[1].step_s < ran[2].step_s
  assert "data link" not in ran[0].seconds_by_stream
  for phase in ("attention", "experts", "head"):
    assert len({run.compute_s_by_phase[phase] for run in ran}) == 1
  held = [memory.train(settings) for settings in copies]
  assert held[0].parameters > held[1].parameters > held[2].parameters
  assert len({(each.stash, each.inputs, each.gradients) for each in held}) == 1


def test_what_copies_send_by_hand():
  """The golden plan twice: of 4,680 elements alike on two ranks of `expert` a quarter is a rank's,
  gathered from four at once, and an expert's 2 x 384 are halved between two copies.

  Sent at the begin: of the 2 x 2,048 of embedding and head, which the region gathers, a quarter to
  the other copy, then half to the other rank; of the others 3 x 584 / 4; and 384 of the experts'.
  At the end 4,680 / 2 to the other rank, then half of the 2,340 left and of the 768 to the other
  copy.
  """
  settings = golden()
  settings = dataclasses.replace(
    settings,
    mesh=dataclasses.replace(settings.mesh, data=2),
    train=dataclasses.replace(settings.train, batch=4),
  )
  sent = {}
  for block in program.ends(settings):
    for op in block:
      if op.step.is_communication and op.step.kind != "all-reduce":
        size = steps.group_size(settings, op.step)
        sent[op.step.name] = links.bytes_sent(op.step.kind, op.step.operand_bytes, size)
  assert sent == {
    "gather parameters over data+expert": 4 * 3 * 584 // 4,
    "gather parameters over data": 4 * 384,
    "gather the first parameters over data": 4 * 2 * 512,
    "gather the first parameters over expert": 4 * 2 * 1_024,
    "scatter gradients over expert": 4 * 4_680 // 2,
    "scatter gradients over data": 4 * (2_340 + 768) // 2,
  }
  held = memory.train(settings)
  assert held.parameters == 4 * (4_680 + 768 * 2) // 4
  assert held.gradients == 4 * (4_680 + 768)
  # Experts' weights lie in shares now too, and what is gathered of them is turned round.
  assert held.compute_copies == held.gradients + 4 * 768
  turned = [op.step.num_bytes for b in program.ends(settings) for op in b if "turn" in op.step.name]
  assert turned == [2 * 4 * 768] * 2
  assert held.inputs == memory.train(golden()).inputs
