"""The layers of a chunk, run forwards, backwards, or both at once with their steps tied.

Where a tick has a forward and a backward unit, they belong to different micro-batches and need
nothing of each other. Layer by layer, the steps of the one run beside those of the other, the
backward's from the last to the first: so while one exchanges tokens the other multiplies matrices.
A barrier after each slot of steps says so to XLA, whose scheduler does not find it by itself; it
holds the chain of activations and the chain of cotangents. What is saved may come a slot later than
what it is made from, and weights' gradients some slots later; they fill what room is left there:
first of all beside gathers and sums inside the host, which their own stream waits for while the
other one sends. A backward unit alone in its tick has them beside its own exchanges. Beside a unit
alone weights come, or gradients leave (`ends`): a layer with each layer, where the link between
hosts is quiet, or, where the unit sends nothing there, a chunk in one message.

Knows layers as steps; must not know ticks, stages or the model.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.parallel import collectives
from moe_jax.pipeline import buffers, tie
from moe_jax.pipeline.steps import Step
from moe_jax.pipeline.units import (
  Backward,
  BackwardLayer,
  Forward,
  ForwardLayer,
  Layers,
  Moves,
  Totals,
  both,
  place_of,
  with_part,
)

Tree = Any


class Chunk(NamedTuple):
  """What every chunk of this stage shares.

  Attributes:
    layers: of the stage.
    slots: how many steps of a forward and of a backward unit run side by side, slot by slot.
    due: of how many steps of a backward unit the weights' gradients must be there at the end of
      each slot.
    due_alone: likewise of a backward unit without a forward one, each of whose steps is a slot.
    quiet: first and last of the slots beside which weights to come are gathered.
    quiet_alone: likewise of a forward and of a backward unit alone, each of whose steps is a slot;
      beside the latter gradients leave too.
    reads: the slot beside which is read what the backward unit's next layer saved; of a backward
      unit alone it is the first.
    inside_s: of each step of a layer, about how long it sends inside the host.
  """

  layers: Layers
  slots: tuple[tuple[int, int], ...]
  due: tuple[int, ...]
  due_alone: tuple[int, ...]
  quiet: tuple[int, int]
  quiet_alone: tuple[tuple[int, int], tuple[int, int]]
  reads: int
  inside_s: tuple[float, ...]

  @classmethod
  def of(cls, layers: Layers, steps: Sequence[Step]) -> "Chunk":
    """Returns that of layers cut into such steps, tied as `tie` finds it."""
    forward, turned = ([tie.cost(step, is_back) for step in steps] for is_back in (False, True))
    backward = turned[::-1]
    slots = tie.side_by_side(forward, backward)
    bytes_of = lambda leaves: [leaf.size * leaf.dtype.itemsize for leaf in leaves]
    copying_s = [tie.copy_s(bytes_of(of_step)) for of_step in layers.steps.saved]
    quiet_forward = tie.quiet(((1, 0),) * len(steps), forward, ())
    quiet_backward = tie.quiet(((0, 1),) * len(steps), (), backward)
    return cls(
      layers,
      slots,
      tie.due(slots, forward, backward),
      tie.due_alone(backward, is_followed=layers.num_layers > 1),
      tie.quiet(slots, forward, backward),
      (quiet_forward, quiet_backward),
      tie.reads(slots, forward, backward, copying_s),
      tuple(each.inside_s for each in forward),
    )

  def run(
    self, totals: Totals, forward: Forward | None, backward: Backward | None, saved: Tree
  ) -> tuple[Totals, Tree, Tree]:
    """Returns the totals, `y` of the forward unit and `gx` of the backward unit, None for one that
    is not there.

    Args:
      saved: by the backward unit's first layer to run, as `read` found it.

    Communication: that of the layer, and of what the weights gather for each.
    """
    moves = self._moves(forward, backward)
    if moves:
      brought, totals = moves.begin(totals)
      forward, backward = moves.others(brought, totals)
    layer = functools.partial(self._layer, forward, backward)
    last = self.layers.num_layers - 1
    body = lambda carry, l: (layer(l, False, *carry), None)
    carry = (totals, forward and forward.x, backward and backward.gy, saved)
    if last:
      carry, _ = jax.lax.scan(body, carry, jnp.arange(last))
    totals, x, gy, saved = carry
    own = moves and moves.beside_last_layer()

    def change(back: BackwardLayer, totals: Totals) -> Totals:
      nonlocal brought
      back.gradients, totals = moves.end_before(back.gradients, brought, totals)
      brought, totals = own.begin(totals)
      back.gradients = collectives.after(brought, back.gradients)
      return totals

    # Out of the loop the last layer has beside it what comes before and after, transfers too.
    totals, y, gx, _ = layer(last, True, totals, x, gy, saved, change if own else None)
    if own:
      gx, totals = own.end_before(gx, brought, totals)
    elif moves:
      totals = moves.end(totals, brought)
    return totals, y, gx

  def sends_nothing(self, is_backward: bool) -> bool:
    """Says whether a unit alone sends nothing between hosts."""
    return self.quiet_alone[is_backward] == (0, len(self.inside_s) - 1)

  def _moves(self, forward: Forward | None, backward: Backward | None) -> Moves | None:
    """Returns what comes or leaves in one message beside a unit alone: where its layers send
    nothing between hosts themselves, so that no part of them is to be kept clear of it.
    """
    if (forward and backward) or not self.sends_nothing(is_backward=backward is not None):
      return None
    return Moves.beside(self.layers, forward, backward)

  def _layer(self, forward, backward, l, is_last, totals: Totals, x, gy, saved, change=None):
    """Returns totals, `y` and `gx` of one layer of each unit, the steps of the two tied; and what
    the backward unit's next layer saved, None behind the last.

    Args:
      saved: by the backward unit's layer.
      change: one message for another, half-way: (the backward unit's layer, totals) -> totals.
    """
    # Of two layers no loop stands between, for XLA unrolls one turn: the first one's sums of
    # gradients may be missing yet.
    sums_pending = is_last and self.layers.num_layers == 2
    rings = totals.rings
    leaving, totals = self._leaving(backward, l, totals)
    ahead = forward and ForwardLayer(self.layers, forward, l, x, rings[0])
    back = backward and BackwardLayer(self.layers, backward, l, gy, saved, rings[1], leaving)
    units = [each for each in (ahead, back) if each]
    coming = [each.coming for each in units]
    slots, due, quiet, reads = self._slots_of(ahead, back)
    alone, saved = ahead is None, None
    for number, (num_ahead, num_back) in enumerate(slots):
      num_done = due[number - 1] if number else 0
      if back and number == reads and not is_last:
        earlier = self.layers.num_layers - 2 - l
        saved, totals = self.read(backward.slot, backward.is_reversed, earlier, totals)
      if change and number == len(slots) // 2:
        totals = change(back, totals)
      if number == quiet[0]:
        coming = [each.send(given) for each, given in zip(units, coming, strict=True)]
      if ahead:
        totals = totals._replace(stash=ahead.write(totals.stash))
        totals = self._run_ahead(
          ahead,
          back,
          num_ahead,
          totals,
          sums_pending=sums_pending,
          due=slice(num_done, due[number]),
        )
      if back:
        totals = self._run_back(
          back, num_back, totals, alone=alone, sums_pending=sums_pending, num_done=num_done
        )
      is_tied = number in (quiet[0] - 1, quiet[1]) and bool(jax.tree.leaves(coming))
      there = coming if is_tied else []
      if ahead and back:
        x, *others = ahead.carry if ahead.is_done else (ahead.carry,)
        num_due = due[number]
        tied = (x, totals.stash, back.gradients, back.of_parameters[:num_due])
        tied, there = both(tied, there)
        x, stash, back.gradients, back.of_parameters[:num_due] = tied
        ahead.carry = (x, *others) if ahead.is_done else x
        totals = totals._replace(stash=stash)
      elif back and (there or due[number] > num_done or not back.is_of_parts):
        # Where nothing is due, parts need not wait for each other.
        num_due = due[number]
        tied = (back.gradients, back.of_parameters[:num_due])
        (back.gradients, back.of_parameters[:num_due]), there = both(tied, there)
      elif is_tied:
        ahead.carry, there = both(ahead.carry, there)
      coming = there if is_tied else coming
    for each, brought in zip(units, coming, strict=True):
      totals = each.receive(totals, brought)
    if back:
      totals, gy = back.finish(totals)
    if ahead:
      totals, x = ahead.finish(totals)
    if back is None and not is_last:
      # Beside the layer's last exchange, of halves the second one's, or XLA would put all layers'
      # beside that of the last.
      x, stash = with_part(x, -1, totals.stash)
      totals = totals._replace(stash=stash)
    return totals, x, gy, saved

  def _slots_of(self, ahead, back) -> tuple[tuple, tuple, tuple, int]:
    """Returns `slots`, `due`, `quiet` and `reads` of the units that there are."""
    if ahead and back:
      return self.slots, self.due, self.quiet, self.reads
    num_steps = len(self.inside_s)
    of_forward, of_backward = self.quiet_alone
    if back:
      return ((0, 1),) * num_steps, self.due_alone, of_backward, 0
    return ((1, 0),) * num_steps, (0,) * num_steps, of_forward, 0

  def _run_ahead(
    self, ahead, back, num_steps: int, totals: Totals, *, sums_pending: bool, due: slice
  ) -> Totals:
    """Runs the next forward steps, and lays beside those that send inside the host what nothing
    waits for, where a backward unit has some.

    Beside the layer's first two: the sums of gradients, if they may be missing. Beside the first of
    several steps in a slot: the weights' gradients that are due in it; then beside a later one what
    forward steps saved, but for the last one's, which may come in the next slot.
    """
    has_begun = False  # with gradients beside the first
    sums_wait = sums_pending and any(self.inside_s)
    pending = self._sums_beside_first(totals.g_layers) if sums_wait else ()
    for number in range(num_steps):
      place = len(ahead.kept)
      ahead.run()
      if back is None or not self.inside_s[place]:
        continue
      before = sum(each > 0 for each in self.inside_s[:place])
      if before < len(pending):
        leaves, tree = jax.tree.flatten(totals.g_layers)
        ahead.carry, there = both(ahead.carry, [leaves[i] for i in pending[before]])
        for i, leaf in zip(pending[before], there, strict=True):
          leaves[i] = leaf
        totals = totals._replace(g_layers=jax.tree.unflatten(tree, leaves))
      if number == 0 and num_steps > 1 and due.start < due.stop:
        ahead.carry, back.of_parameters[due] = both(ahead.carry, back.of_parameters[due])
        has_begun = True
      elif has_begun and not self.layers.steps.runs_again:
        ahead.carry, stash = both(ahead.carry, ahead.write(totals.stash, place - 1))
        totals = totals._replace(stash=stash)
    return totals

  def _sums_beside_first(self, g_layers: Tree) -> tuple[list[int], list[int]]:
    """Returns which leaves' sums stand beside a layer's first step that sends inside the host, as
    many as it lasts, and which beside the next such step.
    """
    bytes_of = [leaf[0].size * leaf.dtype.itemsize for leaf in jax.tree.leaves(g_layers)]
    return tie.parted(bytes_of, next(filter(None, self.inside_s)))

  def _run_back(
    self, back, num_steps: int, totals: Totals, *, alone: bool, sums_pending: bool, num_done: int
  ) -> Totals:
    """Runs the next backward steps, and lays beside those that send what nothing waits for.

    Beside the layer's first gather inside the host: its large weights, which the next step
    multiplies by. Alone: beside the layer's first step the sums of gradients, if they may be
    missing. With a forward unit: beside the first of several steps in a slot, where it sends inside
    the host, what forward steps saved, unless steps that run again stand there already; beside the
    layer's last the weights' gradients that are left.
    """
    for number in range(num_steps):
      place = len(back.of_parameters)
      back.run()
      if alone and sums_pending and place == 0:
        back.gradients, g_layers = both(back.gradients, totals.g_layers)
        totals = totals._replace(g_layers=g_layers)
      if not self.inside_s[-1 - place]:
        continue
      leads = number == 0 and num_steps > 1
      if (alone or leads) and not any(self.inside_s[-1 - before] for before in range(place)):
        back.cut_weights()
      if alone:
        continue
      if leads and not self.layers.steps.runs_again:
        back.gradients, stash = both(back.gradients, totals.stash)
        totals = totals._replace(stash=stash)
      if back.is_done:
        left = slice(num_done, place)
        back.gradients, back.of_parameters[left] = both(back.gradients, back.of_parameters[left])
    return totals

  def _leaving(self, backward, l, totals: Totals) -> tuple[list[jax.Array], Totals]:
    """Returns the gradients that leave beside a layer, and the totals, to which is to be added only
    now.
    """
    if backward is None or backward.leaving is None:
      return [], totals
    leaving = self.layers.reduction.of_layers(totals.g_layers, backward.leaving + l)
    leaving, g_layers = both(leaving, totals.g_layers)
    return leaving, totals._replace(g_layers=g_layers)

  def read(
    self, slot: jax.Array, is_reversed: jax.Array, l: jax.Array | int, totals: Totals
  ) -> tuple[Tree, Totals]:
    """Returns what layer `l` of a chunk saved in a slot, and the totals, whose stash is to be
    written only now.
    """
    place = (slot, place_of(l, is_reversed, self.layers.num_layers))
    saved = buffers.at(totals.stash, place)
    # XLA does not order a read before a write that does not need it, and would copy the stash.
    saved, stash = both(saved, totals.stash)
    return saved, totals._replace(stash=stash)
