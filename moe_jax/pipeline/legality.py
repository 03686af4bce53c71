"""Which tables are legal, proved by running through one tick by tick; `table.check` calls this.

The text of a refusal names the first tick, stage, unit and rule. This module reads the arrays of a
table; it must not know how a schedule is made, nor where values wait (slots.py).
"""

import numpy as np


def check_form(table) -> None:
  """Refuses a table whose arrays have a wrong type, shape or range, or half a unit.

  Raises:
    ValueError: names the array, and the first tick and stage where there is one.
  """
  for name in ("num_stages", "num_micro_batches", "num_chunks"):
    number = getattr(table, name)
    if type(number) is not int or number < 1:
      raise ValueError(f"{table.name}: {name}={number!r} is not a positive int")
  if not isinstance(table.head_micro_Q, np.ndarray) or table.head_micro_Q.ndim != 1:
    raise ValueError(f"{table.name}: head_micro_Q is not an array of one dimension, the ticks")
  shape_QZ = (table.num_ticks, table.num_stages)
  _check_array(table, "head_micro_Q", shape_QZ[:1], table.num_micro_batches)
  for kind in ("forward", "backward"):
    micro_QZ = _check_array(table, f"{kind}_micro_QZ", shape_QZ, table.num_micro_batches)
    chunk_QZ = _check_array(table, f"{kind}_chunk_QZ", shape_QZ, table.num_chunks)
    torn = np.argwhere((micro_QZ < 0) != (chunk_QZ < 0))
    if len(torn):
      tick, stage = torn[0]
      raise ValueError(
        f"{table.name}: {_place(tick, stage)}: {kind} has micro-batch {micro_QZ[tick, stage]} but"
        f" chunk {chunk_QZ[tick, stage]}; set both, or both to -1 (idle)"
      )


def check_order(table) -> None:
  """Refuses a table with a unit that runs too early, twice or never.

  Raises:
    ValueError: names the first tick, stage, unit and rule that fail.
  """
  trains, last = not table.is_forward_only, table.num_virtual_stages - 1
  ran = {}  # (kind, micro-batch, virtual stage) -> tick

  def run(tick, stage, unit, after):
    if unit in ran:
      raise _refusal(table, tick, stage, unit, f"ran in tick {ran[unit]} already; run it once")
    for before in after:
      if not ran.get(before, tick) < tick:
        when = f"runs in tick {ran[before]}" if before in ran else "has not run"
        rule = f"needs {_text(table, before)}, which {when}; run it in a later tick than that"
        raise _refusal(table, tick, stage, unit, rule)
    ran[unit] = tick

  for tick in range(table.num_ticks):
    head = int(table.head_micro_Q[tick])
    if head >= 0:
      run(tick, None, ("head", head, last), [("forward", head, last)])
    for stage, micro, virtual in _units(table, tick, "backward"):
      unit, after = ("backward", micro, virtual), [("forward", micro, virtual)]
      if virtual < last:
        after.append(("backward", micro, virtual + 1))
      elif micro != head:
        rule = f"needs its head in the same tick; set head_micro_Q[{tick}]={micro}, not {head}"
        raise _refusal(table, tick, stage, unit, rule)
      run(tick, stage, unit, after)
    if head >= 0 and trains and ran.get(("backward", head, last)) != tick:
      rule = f"needs {_text(table, ('backward', head, last))} in the same tick; move one of them"
      raise _refusal(table, tick, last % table.num_stages, ("head", head, last), rule)
    for stage, micro, virtual in _units(table, tick, "forward"):
      after = [("forward", micro, virtual - 1)] if virtual else []
      run(tick, stage, ("forward", micro, virtual), after)
  for unit in _expected(table):
    if unit not in ran:
      stage = unit[2] % table.num_stages
      raise _refusal(table, table.num_ticks, stage, unit, "has not run at the end; give it a tick")


def _check_array(table, name, shape, below):
  array = getattr(table, name)
  if not isinstance(array, np.ndarray) or array.dtype != np.int32 or array.shape != shape:
    got = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else repr(array)
    raise ValueError(f"{table.name}: {name} is {got}; expected int32{list(shape)}")
  outside = np.argwhere((array < -1) | (array >= below))
  if len(outside):
    cell = tuple(outside[0])
    raise ValueError(
      f"{table.name}: {_place(*cell)}: {name} is {array[cell]}; expected -1 (idle) to {below - 1}"
    )
  return array


def _units(table, tick, kind):
  micro_Z, chunk_Z = (getattr(table, f"{kind}_{what}_QZ")[tick] for what in ("micro", "chunk"))
  for stage in np.flatnonzero(micro_Z >= 0):
    yield int(stage), int(micro_Z[stage]), int(chunk_Z[stage] * table.num_stages + stage)


def _expected(table):
  for micro in range(table.num_micro_batches):
    for virtual in range(table.num_virtual_stages):
      yield "forward", micro, virtual
      if not table.is_forward_only:
        yield "backward", micro, virtual
    yield "head", micro, table.num_virtual_stages - 1


def _refusal(table, tick, stage, unit, rule):
  return ValueError(f"{table.name}: {_place(tick, stage)}: {_text(table, unit)} {rule}")


def _place(tick, stage=None):
  return f"tick {tick}, every stage" if stage is None else f"tick {tick}, stage {stage}"


def _text(table, unit):
  kind, micro, virtual = unit
  if kind == "head":
    return f"head of micro-batch {micro}"
  chunk, stage = divmod(virtual, table.num_stages)
  return f"{kind} of micro-batch {micro}, chunk {chunk} of stage {stage}"
