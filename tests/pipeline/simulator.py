"""Oracles for schedules: the rules written down once more, and a machine that runs tables on words.

Slow and obvious, and apart from `check`: `is_legal` reads only a table's cells and compares ticks;
`simulate` runs the program of every stage with its slots, on values that name all they come from.
"""

import dataclasses


@dataclasses.dataclass
class Result:
  """What a run leaves: words (a micro-batch and the virtual stages that it went through)."""

  outputs: dict  # micro-batch -> what its head read
  gradients: dict  # virtual stage -> set of (saved layer input, cotangent)
  embed_gradients: dict  # micro-batch -> cotangent
  seconds: float


def is_legal(table) -> bool:
  Z, U, Y = table.num_stages, table.num_micro_batches, table.num_chunks
  tick_of = {"forward": {}, "backward": {}, "head": {}}
  for q in range(table.num_ticks):
    for kind in ("forward", "backward"):
      for z in range(Z):
        u = int(getattr(table, f"{kind}_micro_QZ")[q, z])
        y = int(getattr(table, f"{kind}_chunk_QZ")[q, z])
        if (u, y) == (-1, -1):
          continue
        unit = (u, y * Z + z)
        if not (0 <= u < U and 0 <= y < Y) or unit in tick_of[kind]:
          return False
        tick_of[kind][unit] = q
    u = int(table.head_micro_Q[q])
    if u != -1:
      if not 0 <= u < U or u in tick_of["head"]:
        return False
      tick_of["head"][u] = q
  forward, backward, head = tick_of.values()
  units = {(u, k) for u in range(U) for k in range(Z * Y)}
  last = Z * Y - 1
  if set(forward) != units or set(head) != set(range(U)):
    return False
  if not all(forward[u, k] > forward[u, k - 1] for u, k in units if k > 0):
    return False
  if not all(head[u] > forward[u, last] for u in range(U)):
    return False
  if not backward:
    return True
  return (
    set(backward) == units
    and all(backward[u, last] == head[u] for u in range(U))
    and all(backward[u, k] > backward[u, k + 1] for u, k in units if k < last)
    and all(backward[u, k] > forward[u, k] for u, k in units)
  )


def simulate(table, costs) -> Result:
  Z, Y = table.num_stages, table.num_chunks
  stash = [[None] * table.peak_in_flight for _ in range(Z)]
  inbox = [[None] * table.num_inbox_slots for _ in range(Z)]
  cotangents = [[None] * table.num_cotangent_slots for _ in range(Z)]
  sent_forward, sent_backward = [None] * Z, [None] * Z
  result = Result({}, {k: set() for k in range(Z * Y)}, {}, 0.0)

  for q in range(table.num_ticks):
    for z in range(Z):
      if (slot := table.arrival_slot_QZ[q, z]) >= 0:
        inbox[z][slot] = sent_forward[(z - 1) % Z]
      if (slot := table.cotangent_arrival_slot_QZ[q, z]) >= 0:
        cotangents[z][slot] = sent_backward[(z + 1) % Z]
    sent_forward, sent_backward = [None] * Z, [None] * Z
    ran = set()

    head_cotangent = None
    if (u := int(table.head_micro_Q[q])) >= 0:
      ran.add("head")
      result.outputs[u] = inbox[0][table.head_inbox_slot_Q[q]]
      head_cotangent = ("loss", *result.outputs[u])
    for z in range(Z):
      if (u := int(table.backward_micro_QZ[q, z])) >= 0:
        ran.add("backward")
        k = int(table.layer_order[z * Y + table.backward_chunk_QZ[q, z]])
        slot = table.backward_inbox_slot_QZ[q, z]
        cotangent = cotangents[z][slot] if slot >= 0 else head_cotangent
        saved = stash[z][table.backward_slot_QZ[q, z]]
        assert saved[0] == u, f"tick {q}, stage {z}: wants micro-batch {u}, stash has {saved}"
        result.gradients[k].add((saved, cotangent))
        sent_backward[z] = (*cotangent, k)
    if (u := int(table.embed_gradient_micro_Q[q])) >= 0:
      ran.add("embed_gradient")
      result.embed_gradients[u] = sent_backward[0]
    embedded = None
    if (u := int(table.embed_micro_Q[q])) >= 0:
      ran.add("embed")
      embedded = (u,)
    for z in range(Z):
      if (u := int(table.forward_micro_QZ[q, z])) >= 0:
        ran.add("forward")
        k = int(table.layer_order[z * Y + table.forward_chunk_QZ[q, z]])
        slot = table.forward_inbox_slot_QZ[q, z]
        x = inbox[z][slot] if slot >= 0 else embedded
        assert x[0] == u, f"tick {q}, stage {z}: wants micro-batch {u}, inbox has {x}"
        if (slot := table.forward_slot_QZ[q, z]) >= 0:
          stash[z][slot] = x
        sent_forward[z] = (*x, k)
    result.seconds += sum(costs[kind] for kind in ran)
  return result


def serial(table) -> Result:
  """What a program without a pipeline leaves: every micro-batch through all layers in order."""
  W = table.num_stages * table.num_chunks
  result = Result({}, {k: set() for k in range(W)}, {}, 0.0)
  for u in range(table.num_micro_batches):
    result.outputs[u] = (u, *range(W))
    if not table.is_forward_only:
      cotangent = ("loss", u, *range(W))
      for k in reversed(range(W)):
        result.gradients[k].add(((u, *range(k)), cotangent))
        cotangent = (*cotangent, k)
      result.embed_gradients[u] = cotangent
  return result
