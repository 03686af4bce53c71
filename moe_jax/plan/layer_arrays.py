"""What the layers of a tick hold, array by array, from the first moment to the last.

A backward layer, the forward layer beside it, and what is ready early of the layer that comes next.
Which arrays are there together is read off XLA's buffer assignment of compiled steps; their sizes
follow from shapes. Knows sizes of a layer; must not know head, embedding or schedules.
"""

import enum

from moe_jax.config import Config
from moe_jax.plan import cost, phases, saving, splits, units
from moe_jax.plan.leaves import FLOAT32_BYTES
from moe_jax.plan.packing import Array
from moe_jax.plan.steps import Sizes, activation_bytes

_QUERY_KEY_VALUE = 3
# Arrays of rows as they arrived, and of hidden units in blocks, that the loop over further rounds
# of a dropless dispatch holds; and of rows, where shadows of a stealing one are multiplied. Fitted
# to compiled programs since the kernels lay no rows in blocks.
_FURTHER_ROUND, _OF_SHADOWS = (7, 5), 4
# Activations that wait in a layer's backward: norms, sums, cotangents.
_ACTIVATIONS = 6
_WEIGHTS = 3  # gate, up, down


class Moment(enum.IntEnum):
  """Moments of a tick, in order."""

  HEAD = 0
  HIDDEN = 1  # the backward layer multiplies for the hidden units' cotangent
  ROWS = 2  # for the rows'
  AHEAD = 3  # the forward layer multiplies by gate and up
  GATE_AND_UP = 4  # gradients of the weights
  DOWN = 5
  ATTENTION = 6
  BETWEEN = 7  # two loops of ticks


class LayerArrays:
  """The arrays of one deployment's layers."""

  def __init__(self, settings: Config, at: Sizes):
    model, mesh = settings.model, settings.mesh
    self._settings, self._at, self._save = settings, at, settings.pipeline.save
    self._is_remade = settings.pipeline.multiplies_again
    self._of_chunk = units.layers_per_unit(settings)
    # A loop of one turn XLA takes apart. In straight code, what is ready early is made early.
    self._is_straight = self._of_chunk <= 2
    self._has_rounds = settings.moe.dispatch in cost.EVERY_ASSIGNMENT
    self._arrived, self._hidden = saving.row_bytes(settings, at)
    self._sent = self._arrived // mesh.tensor
    self._activation = activation_bytes(settings, at)
    self._gathered = self._activation * mesh.tensor
    self._saved = saving.saved_bytes(settings, at)
    self._experts = model.experts // mesh.expert
    self._width = model.expert_hidden // mesh.tensor
    self._rows_per_expert = mesh.tensor * at.rows // self._experts
    self._weight_elements = self._experts * model.d_model * self._width

  def beside(self) -> list[Array]:
    """Returns those of a tick with a forward unit: the two tied, slot by slot."""
    return [
      *self._kept(),
      *(self._rounds() if self._has_rounds else self._rows()),
      *self._gradients(),
      *self._slices(),
      *self._forward(),
      *self._padded(is_beside=True),
    ]

  def alone(self) -> list[Array]:
    """Returns those of a tick without a forward unit."""
    if self._has_rounds:
      return [*self._kept(), *self._rounds(), *self._slices()]
    return [*self._kept(), *self._rows(), *self._gradients(), *self._padded(is_beside=False)]

  def on_one_device(self, has_forward: bool) -> list[Array]:
    """Returns those of a tick where nothing is sent: XLA schedules for little memory, and reads the
    stash when it must.
    """
    rows = self._arrived + self._hidden
    # Cotangents in the experts; where all was kept, what is used up makes room for them.
    found = rows if self._save == "everything" else int(1.6 * rows)
    if has_forward:
      found += rows if self._is_remade else self._saved
    if self._settings.model.layers > 1:
      found += _WEIGHTS * self._weight_elements * FLOAT32_BYTES
    if self._has_rounds:
      hidden = saving.placed_hidden_bytes(self._settings, self._at)
      num_rows, num_hidden = _FURTHER_ROUND
      found += num_rows * self._arrived + num_hidden * hidden
    kernel = self._padded(is_beside=False)
    return [Array(found, Moment.HIDDEN, Moment.ATTENTION), *kernel]

  def _kept(self) -> list[Array]:
    """What the backward layer kept or makes again of attention and norms, and the next one's."""
    early = Moment.HEAD if self._is_straight else Moment.HIDDEN
    if self._is_remade:
      found = [Array(self._again_bytes(), early, Moment.ATTENTION)]
      if self._save == "exchanges":
        # Taken out of the stash, of this layer and of the next.
        found += [Array(self._saved, Moment.HIDDEN, Moment.ATTENTION)] * min(2, self._of_chunk)
      if self._is_straight:
        # Attention's output before it is scattered: of the layer computed again, and of the
        # forward layer.
        found += [Array(self._gathered, Moment.HEAD, Moment.HEAD)] * 2
      return found
    # What `_rows` lists as well.
    rows = 0
    if self._save == "residuals" and not self._has_rounds:
      rows = self._arrived + 2 * self._hidden + self._sent
    found = [Array(self._saved - rows, early, Moment.ATTENTION)]
    if self._is_straight:
      found.append(Array(rows, Moment.HEAD, Moment.HEAD))
    if self._save == "residuals":
      found.append(
        Array(_ACTIVATIONS * self._activation, Moment.HIDDEN, Moment.ATTENTION),
      )
    if self._of_chunk > 1 and not self._has_rounds:
      # Read one layer ahead; a loop of rounds is waited for.
      found.append(Array(self._saved, Moment.HIDDEN, Moment.ATTENTION))
    return found

  def _again_bytes(self) -> int:
    """Attention's input, queries, keys, values, output and turns, and norms."""
    kept = self._gathered + self._heads_bytes() + saving.turns_bytes(self._settings, self._at)
    return kept + _ACTIVATIONS * self._activation

  def _heads_bytes(self) -> int:
    model, tensor, at = self._settings.model, self._settings.mesh.tensor, self._at
    heads = 2 * (model.heads + model.kv_heads) // tensor
    return at.sequences * at.positions * heads * model.head_dim * at.dtype_bytes

  def _rows(self) -> list[Array]:
    """Rows, hidden units and their cotangents, up to the gradients that are made of them."""
    arrived, hidden = self._arrived, self._hidden
    found = [
      Array(arrived, Moment.HIDDEN, Moment.DOWN),  # cotangent
      Array(self._partial_hidden(), Moment.HIDDEN, Moment.HIDDEN),  # of the product of gate and up
      Array(2 * hidden, Moment.ROWS, Moment.GATE_AND_UP),  # of gate and up
      *[Array(each, Moment.ROWS, Moment.ROWS) for each in self._partial_rows()],
    ]
    if self._save == "everything":
      return found
    return [
      *found,
      Array(arrived, Moment.HIDDEN, Moment.GATE_AND_UP),
      Array(2 * hidden, Moment.HIDDEN, Moment.HIDDEN),  # gate and up
      Array(hidden, Moment.HIDDEN, Moment.DOWN),  # gate x up
      *[Array(self._sent, Moment.AHEAD, Moment.DOWN)] * 2,
      Array(self._sent, Moment.ATTENTION, Moment.ATTENTION),
    ]

  def _partial_hidden(self) -> int:
    """Hidden units' cotangent, perhaps in parts."""
    d_model = self._settings.model.d_model
    number = splits.parts(self._experts, self._rows_per_expert, self._width, d_model)
    return self._hidden if number == 1 else self._parts_bytes(self._hidden, number)

  def _parts_bytes(self, num_bytes: int, number: int) -> int:
    return number * num_bytes // self._at.dtype_bytes * FLOAT32_BYTES

  def _partial_rows(self) -> list[int]:
    """The rows' cotangent by gate and up, perhaps in parts."""
    number = splits.parts(
      self._experts, self._rows_per_expert, self._settings.model.d_model, 2 * self._width
    )
    return [self._arrived if number == 1 else self._parts_bytes(self._arrived, number)]

  def _rounds(self) -> list[Array]:
    """Of a dispatch in rounds: rows, hidden units in blocks, sums of weights' gradients, and what
    of gate and up comes out of the choice whether there are further rounds.
    """
    hidden = saving.placed_hidden_bytes(self._settings, self._at)
    num_rows, num_hidden = _FURTHER_ROUND
    sums = self._weight_elements * FLOAT32_BYTES
    return [
      *[Array(self._arrived, Moment.HIDDEN, Moment.DOWN)] * num_rows,
      *[Array(hidden, Moment.HIDDEN, Moment.DOWN)] * num_hidden,
      *[Array(self._sent, Moment.HIDDEN, Moment.ATTENTION)] * 3,
      *[Array(sums, Moment.HIDDEN, Moment.ATTENTION)] * _WEIGHTS,
      Array(2 * self._weight_elements * self._at.dtype_bytes, Moment.HIDDEN, Moment.ATTENTION),
      *self._shadows(),
    ]

  def _shadows(self) -> list[Array]:
    """What the branch of a stealing dispatch with shadows holds: rows and their cotangents, and
    those of the other branch; gradients of the shadows; of one shadow what is sent, and its sum.
    """
    if self._settings.moe.dispatch != "stealing":
      return []
    one = _WEIGHTS * self._weight_elements // self._experts
    gradients = self._settings.moe.shadows * one * FLOAT32_BYTES
    return [
      *[Array(self._arrived, Moment.HIDDEN, Moment.DOWN)] * _OF_SHADOWS,
      *[Array(one * self._at.dtype_bytes, Moment.HIDDEN, Moment.DOWN)] * 2,
      Array(gradients, Moment.GATE_AND_UP, Moment.ATTENTION),
    ]

  def _gradients(self) -> list[Array]:
    """Gradients of the experts' weights; gate's and up's are one product."""
    if self._has_rounds:
      return []
    found, d_model = [], self._settings.model.d_model
    if self._of_chunk == 2 and not self._is_remade:
      # Those of the layer before wait: XLA adds both layers' at once.
      waiting = self._weight_elements * FLOAT32_BYTES
      found += [Array(waiting, Moment.HIDDEN, Moment.ROWS)] * _WEIGHTS
    for weights, made in ((2, Moment.GATE_AND_UP), (1, Moment.DOWN)):
      number = splits.parts(self._experts, weights * self._width, d_model, self._rows_per_expert)
      whole = weights * self._weight_elements * FLOAT32_BYTES
      if number > 1:
        found.append(Array(number * whole, made, Moment.DOWN))
      added_from = Moment.ATTENTION if number > 1 else made
      found.append(Array(whole, added_from, Moment.ATTENTION))
    return found

  def _slices(self) -> list[Array]:
    """The two layers' weights of the experts, cut out of those of all layers."""
    model, mesh = self._settings.model, self._settings.mesh
    if model.layers == mesh.stage:
      return []
    each = self._weight_elements * self._at.dtype_bytes
    return [
      *[Array(each, Moment.HIDDEN, Moment.HIDDEN)] * 2,
      *[Array(each, Moment.HIDDEN, Moment.GATE_AND_UP)] * _WEIGHTS,  # of the forward layer
    ]

  def _forward(self) -> list[Array]:
    """A forward layer: tokens on their way while the backward layer multiplies, then its rows."""
    arrived, hidden = self._arrived, self._hidden
    found = [Array(self._sent, Moment.HIDDEN, Moment.ROWS)] * 2
    early = Moment.HEAD if self._is_straight else Moment.HIDDEN
    found.append(Array(self._gathered, early, Moment.DOWN))
    if self._save == "everything" or self._has_rounds:
      return found
    if self._is_remade:
      return [
        *found,
        Array(arrived, Moment.AHEAD, Moment.AHEAD),
        Array(2 * hidden, Moment.AHEAD, Moment.AHEAD),
        Array(arrived, Moment.DOWN, Moment.DOWN),
      ]
    found.append(Array(self._heads_bytes(), Moment.HIDDEN, Moment.ATTENTION))
    found.append(Array(self._partial_heads(), Moment.HIDDEN, Moment.AHEAD))
    if self._of_chunk > 1:
      found += [
        Array(arrived, Moment.AHEAD, Moment.ATTENTION),
        Array(2 * hidden, Moment.AHEAD, Moment.ATTENTION),
        Array(arrived, Moment.GATE_AND_UP, Moment.DOWN),
      ]
    return found

  def _partial_heads(self) -> int:
    """Queries, keys and values as one product, where it is split."""
    model, at = self._settings.model, self._at
    columns = (model.heads + 2 * model.kv_heads) // self._settings.mesh.tensor * model.head_dim
    whole = at.sequences * at.positions
    number = splits.parts(1, whole, columns, model.d_model)
    return number * whole * columns * FLOAT32_BYTES if number > 1 else 0

  def _padded(self, is_beside: bool) -> list[Array]:
    """Arrays of queries' size that attention's kernels pad."""
    each = self._padded_bytes()
    found = [Array(each, Moment.ATTENTION, Moment.ATTENTION)] * (1 + _QUERY_KEY_VALUE)
    if not self._is_remade:
      return found + [Array(each, Moment.ATTENTION, Moment.ATTENTION)] * _QUERY_KEY_VALUE
    # Computed again, they are padded from then on.
    found += [Array(each, Moment.HIDDEN, Moment.ATTENTION)] * _QUERY_KEY_VALUE
    if is_beside:
      # The forward layer's go into its kernel when the kernel that ran again has returned.
      found += [Array(each, Moment.HIDDEN, Moment.HIDDEN)] * _QUERY_KEY_VALUE
    return found

  def _padded_bytes(self) -> int:
    model, at = self._settings.model, self._at
    positions, width = phases.flash_shape(at.positions, model.head_dim)
    if (positions, width) == (at.positions, model.head_dim):
      return 0
    heads = model.heads // self._settings.mesh.tensor
    return at.sequences * positions * heads * width * at.dtype_bytes
