"""A graph as files that other programs open, and as a picture that a person reads.

JSON holds every node and edge as columns; GraphML and DOT would be too large with them and hold one
node for each unit on each module, and the modules alone. Knows graphs; must not know time.
"""

import html
import itertools
import json
from collections.abc import Iterable

import numpy as np

from moe_jax.config import Config, Mesh, as_dict
from moe_jax.plan import units
from moe_jax.plan.graph import EDGE_KINDS, UNITS, Graph
from moe_jax.plan.links import bytes_sent
from moe_jax.plan.steps import group_size

_OF_UNIT = ("data", "stage", "expert", "tensor", "micro", "virtual")
_COLUMNS = ("unit", "step", *_OF_UNIT, "layer")
_EDGE_COLOURS = {
  "data": "#555555", "transfer": "#4e79a7", "collective": "#f28e2b", "weight prefetch": "#59a14f",
}  # fmt: skip


def to_json(graph: Graph) -> str:
  """Returns every node and edge, as columns; `unit` and `kind` count in the lists given."""
  return json.dumps(
    {
      "config": as_dict(graph.settings),
      "units": UNITS,
      "edge_kinds": EDGE_KINDS,
      "steps": [
        {
          "name": step.name, "phase": step.phase, "kind": step.kind, "part": step.part,
          "axes": step.axes, "operand_bytes": step.operand_bytes, "flops": step.flops,
          "num_bytes": step.num_bytes, "kernels": step.kernels,
        }
        for step in graph.steps
      ],
      "nodes": {name: getattr(graph, name).tolist() for name in _COLUMNS},
      "edges": {name: getattr(graph, name).tolist() for name in ("source", "target", "kind")},
    }
  )  # fmt: skip


def to_graphml(graph: Graph) -> str:
  """Returns one node for each unit on each module, and the typed edges between those.

  Source: GraphML Primer, http://graphml.graphdrawing.org/primer/graphml-primer.html
  """
  node_of, units = _units(graph)
  pairs = _pairs(graph, node_of)
  keys = "".join(
    f'<key id="{name}" for="{of}" attr.name="{name}" attr.type="{kind}"/>\n'
    for name, of, kind in (
      ("unit", "node", "string"),
      *((name, "node", "int") for name in _OF_UNIT),
      ("kind", "edge", "string"),
    )
  )
  nodes = "".join(
    f'<node id="n{i}"><data key="unit">{UNITS[row[0]]}</data>'
    + "".join(
      f'<data key="{name}">{value}</data>' for name, value in zip(_OF_UNIT, row[1:], strict=True)
    )
    + "</node>\n"
    for i, row in enumerate(units.tolist())
  )
  edges = "".join(
    f'<edge source="n{a}" target="n{b}"><data key="kind">{EDGE_KINDS[k]}</data></edge>\n'
    for a, b, k in pairs.tolist()
  )
  return (
    '<?xml version="1.0" encoding="UTF-8"?>\n'
    '<graphml xmlns="http://graphml.graphdrawing.org/xmlns">\n'
    f'{keys}<graph id="step" edgedefault="directed">\n{nodes}{edges}</graph>\n</graphml>\n'
  )


def to_dot(graph: Graph) -> str:
  """Returns the modules, by copy, stage and expert rank, and what passes between them.

  Source: the DOT language, https://graphviz.org/doc/info/lang.html
  """
  mesh = graph.settings.mesh
  lines = ["digraph modules {", "  rankdir=LR; node [shape=box, fontsize=10]; compound=true;"]
  for data, stage in itertools.product(range(mesh.data), range(mesh.stage)):
    name = f"cluster_d{data}s{stage}"
    lines.append(f'  subgraph {name} {{ label="{_of_copy(mesh, data)}stage {stage}";')
    for expert in range(mesh.expert):
      first = ((data * mesh.stage + stage) * mesh.expert + expert) * mesh.tensor
      names = " ".join(f"m{first + tensor};" for tensor in range(mesh.tensor))
      lines.append(f'    subgraph {name}e{expert} {{ label="expert rank {expert}"; {names} }}')
    lines.append("  }")
  crossing = np.stack([graph.module[graph.source], graph.module[graph.target], graph.kind], 1)
  crossing = crossing[crossing[:, 0] != crossing[:, 1]]
  for (a, b, kind), times in zip(*np.unique(crossing, axis=0, return_counts=True), strict=True):
    name = EDGE_KINDS[kind]
    lines.append(
      f'  m{a} -> m{b} [color="{_EDGE_COLOURS[name]}", tooltip="{name}, {times} times"];'
    )
  return "\n".join([*lines, "}", ""])


def picture(settings: Config) -> str:
  """Returns an SVG of the modules: copies, stages, groups of expert ranks, tensor ranks, and what a
  layer sends between them for one micro-batch, and a step between copies.
  """
  mesh, model = settings.mesh, settings.model
  wide, high, left, top = 62, 26, 130, 70
  stage_width = mesh.tensor * wide + 90
  bottom = top + mesh.sequence_shares * (high + 8)
  width, height = left + mesh.stage * stage_width, bottom + 120
  each = model.experts // mesh.expert
  copies = f"{mesh.data} copies of " * (mesh.data > 1)
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    ' font-family="sans-serif" font-size="11">',
    f'<text x="10" y="20" font-size="15">{mesh.num_devices} modules: {copies}{mesh.stage} stages x'
    f" {mesh.expert} expert ranks x {mesh.tensor} tensor ranks</text>",
  ]
  for row, (data, expert) in enumerate(itertools.product(range(mesh.data), range(mesh.expert))):
    y = top + row * (high + 8)
    experts = f"{expert * each}" if each == 1 else f"{expert * each}-{expert * each + each - 1}"
    parts.append(f'<text x="10" y="{y + 17}">{_of_copy(mesh, data)}experts {experts}</text>')
    for stage in range(mesh.stage):
      for tensor in range(mesh.tensor):
        x = left + stage * stage_width + tensor * wide
        parts.append(
          f'<rect x="{x}" y="{y}" width="{wide - 6}" height="{high}" rx="3" fill="#dce6f2"'
          f' stroke="#4e79a7"/><text x="{x + 5}" y="{y + 17}">'
          f"{stage}.{expert}.{tensor}</text>"
        )
  for stage in range(mesh.stage):
    x = left + stage * stage_width
    parts.append(
      f'<text x="{x}" y="{top - 30}">stage {stage}: {model.layers // mesh.stage} layers</text>'
      f'<text x="{x}" y="{top - 12}">tensor ranks 0-{mesh.tensor - 1}:'
      f" {model.heads // mesh.tensor} heads, {model.expert_hidden // mesh.tensor} hidden</text>"
    )
  for place, line in enumerate(_sent(settings)):
    parts.append(f'<text x="10" y="{bottom + 24 + 18 * place}">{html.escape(line)}</text>')
  return "\n".join([*parts, "</svg>", ""])


def _sent(settings: Config) -> Iterable[str]:
  """Yields what one GPU sends along each axis for one layer of one micro-batch, forwards; and to
  its copies.
  """
  by_axis: dict[str, float] = {}
  for step in units.unit(settings, "forward"):
    if step.is_communication:
      size = group_size(settings, step)
      name = "+".join(step.axes)
      by_axis[name] = by_axis.get(name, 0) + bytes_sent(step.kind, step.operand_bytes, size)
  for axis, sent in by_axis.items():
    way = {"expert": "down the columns", "tensor": "along the rows"}.get(axis, "within a stage")
    yield f"{axis}: {sent / 1e6:.2f} MB a layer, {way}"
  if settings.mesh.stage > 1:
    step = units.transfer(settings, "to the next stage")
    yield f"stage: {step.operand_bytes / 1e6:.2f} MB a chunk, from stage to stage in a ring"
  copies = [step for step in units.end(settings) if step.axes == ("data",)]
  if copies:
    sent = sum(bytes_sent(s.kind, s.operand_bytes, settings.mesh.data) for s in copies)
    yield f"data: {sent / 1e6:.2f} MB of gradients a step, from copy to copy"


def _units(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
  """Returns for each node the number of its unit on its module, and those units as rows."""
  columns = [getattr(graph, name) for name in ("unit", *_OF_UNIT)]
  units, node_of = np.unique(np.stack(columns, 1), axis=0, return_inverse=True)
  return node_of.reshape(-1), units


def _pairs(graph: Graph, node_of: np.ndarray) -> np.ndarray:
  pairs = np.stack([node_of[graph.source], node_of[graph.target], graph.kind], 1)
  pairs = pairs[pairs[:, 0] != pairs[:, 1]]
  return np.unique(pairs, axis=0)


def _of_copy(mesh: Mesh, data: int) -> str:
  """Returns which copy a label is of, where there are several."""
  return f"copy {data}, " * (mesh.data > 1)
