"""Which steps share a slot: hand-made streams whose best arrangement is plain to see."""

import hypothesis
import hypothesis.strategies as st
import pytest

from moe_jax.pipeline import tie
from moe_jax.pipeline.steps import Step
from moe_jax.pipeline.tie import Cost

COMPUTE = Cost(30e-6, 0.0, 0.0)
INSIDE = Cost(0.0, 10e-6, 0.0)
EXCHANGE = Cost(0.0, 0.0, 40e-6)
COSTS = st.builds(
  lambda kind, us: Cost(*[us * 1e-6 if i == kind else 0.0 for i in range(3)]),
  st.integers(0, 2),
  st.integers(1, 100),
)
STREAM = st.lists(COSTS, min_size=1, max_size=7)


def seconds(slots, forward, backward):
  """Returns the seconds of an arrangement, None where a slot must not be."""
  total, f, b = 0.0, 0, 0
  for more_f, more_b in slots:
    slot_s = tie._slot_s(forward[f : f + more_f], backward[b : b + more_b])
    if slot_s is None:
      return None
    total, f, b = total + slot_s, f + more_f, b + more_b
  assert (f, b) == (len(forward), len(backward))
  return total


def test_an_exchange_has_the_other_stream_s_products_beside_it():
  assert tie.side_by_side([COMPUTE, EXCHANGE], [EXCHANGE, COMPUTE]) == ((1, 1), (1, 1))


def test_a_long_exchange_gets_several_products_and_a_gather():
  assert tie.side_by_side([EXCHANGE], [COMPUTE, INSIDE, COMPUTE]) == ((1, 3),)


def test_products_are_laid_beside_each_of_two_collectives_not_behind_the_last():
  gather = Cost(0.0, 30e-6, 0.0)
  assert tie.side_by_side([COMPUTE, COMPUTE], [gather, EXCHANGE]) == ((1, 1), (1, 1))


def test_two_exchanges_do_not_share_a_slot():
  assert tie.side_by_side([EXCHANGE], [EXCHANGE]) in (((0, 1), (1, 0)), ((1, 0), (0, 1)))


@hypothesis.given(STREAM, STREAM)
@hypothesis.settings(deadline=None, max_examples=50)
def test_every_step_has_its_slot_and_none_is_longer_than_one_after_another(forward, backward):
  found = tie.side_by_side(forward, backward)
  total = seconds(found, forward, backward)
  assert total is not None
  alone = [(1, 0)] * len(forward) + [(0, 1)] * len(backward)
  assert total <= seconds(alone, forward, backward) + 1e-12
  either = max(sum(c.total_s for c in forward), sum(c.total_s for c in backward))
  assert total >= either


def test_gradients_of_weights_are_due_a_slot_later_where_that_has_room():
  product = Cost(20e-6, 0.0, 0.0, free_s=10e-6)
  # Beside each product the other stream sends; behind it there is room for its gradient.
  forward, backward = [EXCHANGE, EXCHANGE], [product, product]
  assert tie.due([(1, 1), (1, 1)], forward, backward) == (0, 2)
  assert tie.due([(1, 1), (1, 0), (0, 1)], forward, backward) == (0, 1, 2)


def test_gradients_of_weights_wait_for_a_slot_that_has_room():
  product = Cost(60e-6, 0.0, 0.0, free_s=30e-6)
  # The second slot computes as long as it takes; in the third an exchange has nothing beside it.
  forward, backward = [EXCHANGE, COMPUTE, EXCHANGE], [product]
  assert tie.due([(1, 1), (1, 0), (1, 0)], forward, backward) == (0, 0, 1)


def test_a_gradient_makes_way_for_a_larger_one_behind_it():
  small, large = (Cost(2 * us * 1e-6, 0.0, 0.0, free_s=us * 1e-6) for us in (10, 40))
  # The first of the two would fit beside the last exchange, which the second fills alone.
  forward = [COMPUTE, COMPUTE, Cost(0.0, 4e-6, 0.0), EXCHANGE]
  slots = [(1, 1), (1, 1), (1, 0), (1, 0)]
  assert tie.due(slots, forward, [small, large]) == (0, 0, 1, 2)
  assert tie.due(slots, forward, [small, small]) == (0, 0, 0, 2)


def test_gradients_of_weights_are_due_in_their_slot_where_its_stream_sends_inside_the_host_later():
  product = Cost(20e-6, 0.0, 0.0, free_s=10e-6)
  due = lambda *backward: tie.due([(1, 2), (0, 1)], [EXCHANGE], [*backward, COMPUTE])
  assert due(product, Cost(0.0, 20e-6, 0.0)) == (1, 3)
  # Not where that is before, or no longer than a gradient's kernels take.
  assert due(Cost(0.0, 20e-6, 0.0), product) == (0, 3)
  assert due(product, Cost(0.0, 15e-6, 0.0)) == (0, 3)


def test_what_was_saved_is_read_beside_the_first_exchange_that_has_room_else_in_the_emptiest_slot():
  slots, forward = [(1, 1), (1, 1), (1, 1)], [COMPUTE, EXCHANGE, INSIDE]
  backward = [EXCHANGE, COMPUTE, EXCHANGE]
  # Of 40 us each: the first two compute for 30 of them, the last does not compute.
  assert tie.reads(slots, forward, backward, [20e-6, 0.0, 0.0]) == 0
  assert tie.reads(slots, forward, backward, [30e-6, 0.0, 0.0]) == 2
  # What the step before keeps is written there.
  assert tie.reads(slots, forward, backward, [0.0, 35e-6, 0.0]) == 0


def test_alone_gradients_of_weights_go_beside_the_next_exchange_and_the_last_ones_are_not_due():
  product = Cost(60e-6, 0.0, 0.0, free_s=30e-6)
  stream = [product, INSIDE, EXCHANGE, product, COMPUTE]
  assert tie.due_alone(stream, is_followed=True) == (0, 0, 2, 3, 3)
  assert tie.due_alone([product], is_followed=True) == (0,)
  # Behind the last layer there is nothing that they could stand beside.
  assert tie.due_alone(stream, is_followed=False) == (0, 0, 2, 3, 5)
  assert tie.due_alone([product], is_followed=False) == (1,)


@hypothesis.given(STREAM, STREAM)
@hypothesis.settings(deadline=None, max_examples=50)
def test_no_gradient_of_weights_is_due_before_it_is_made_and_all_are_at_the_end(forward, backward):
  backward = [each._replace(free_s=each.compute_s / 2) for each in backward]
  slots = tie.side_by_side(forward, backward)
  due, made = tie.due(slots, forward, backward), 0
  for number, (_, more_b) in enumerate(slots):
    made += more_b
    assert due[number] <= made
  assert list(due) == sorted(due)
  assert due[-1] == len(backward)


@pytest.mark.parametrize("is_backward", [False, True])
def test_cost_counts_every_part(is_backward):
  nothing = Step(None, (), 0.0, 0.0, 0, 0.0, 0.0)
  assert tie.cost(nothing, is_backward) == Cost(0.0, 0.0, 0.0)
  product = tie.cost(nothing._replace(flops=1e9), is_backward)
  at_half_of_peak_s = 1e9 / (0.5 * 989e12)
  assert product.compute_s == pytest.approx((1 + is_backward) * at_half_of_peak_s, rel=0.1)
  assert product.free_s == 0.0
  of_weights = tie.cost(nothing._replace(flops=1e9, uses=(0,)), is_backward)
  assert of_weights.free_s == pytest.approx(is_backward * at_half_of_peak_s, rel=0.1)
  assert tie.cost(nothing._replace(inside_bytes=1e6), is_backward).inside_s > 0
  assert tie.cost(nothing._replace(between_bytes=1e6), is_backward).between_s > 0


def test_weights_travel_beside_the_longest_row_of_slots_that_leave_the_hosts_link_alone():
  work, inside, between = Cost(5.0, 0, 0), Cost(0.0, 1.0, 0), Cost(0.0, 0, 2.0)
  long = Cost(9.0, 0, 0)
  # Slots: an exchange; work and work; a gather and work; an exchange; the longest, alone.
  ahead, back = [between, work, inside, work, long], [work, work, between]
  slots = [(1, 0), (1, 1), (1, 1), (1, 1), (1, 0)]
  assert tie.quiet(slots, ahead, back) == (1, 2)
  assert tie.quiet(slots, [*ahead[:4], Cost(16.0, 0, 0)], back) == (4, 4)


def test_weights_travel_beside_all_slots_where_each_has_an_exchange():
  between = Cost(1.0, 0, 2.0)
  assert tie.quiet([(1, 0), (0, 1), (1, 0)], [between, between], [between]) == (0, 2)
