"""The tables of tokens on a mesh, split by vocabulary over `tensor`: lookups, and the 'lm' head's losses.

Called by transformer.py (lookups) and lm_head.py. A device reads its own rows and its own part of the vocabulary. Of a
token's logits the devices send each other three numbers: the maximum, the sum of the exponentials, and the logit of the
token itself. Logits are computed a block of tokens at a time, and neither they nor their gradients are kept.

The compiler would not find this by itself. No usual mesh divides GPT-3's 50257 rows, and to look up a logit in an array
that is split unevenly it gathers the array; and to look up rows of a table that is split by width, it has each device
read a narrow part of the tokens of all devices. So the table is padded here, and `jax.shard_map` says what each device
does. The gradients are written by hand, so none has to be found through the map. They are summed over devices once for
all blocks: over `tensor` for the hidden states, over the rows' axes for the table, each into the parts that the devices
keep.

Dimension letters beside those of structs.py: a lower-case letter is a device's part of a dimension.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as PS

from instructjax.core.structs import Array
from instructjax.ops import lm
from instructjax.parallel.sharding import ROWS, num_row_shards

_HIDDEN, _TABLE, _TOKENS = PS(ROWS, "tensor"), PS("tensor", "fsdp"), PS(ROWS)


def token_logprob(
  h_BTD: Array, table_VD: Array, token_BT: Array, is_token_BT: Array, temperature: float
) -> Array:
  """`lm_head.token_logprob`; the table in the dtype of h."""
  vocab_size, (rows, columns) = len(table_VD), token_BT.shape
  args = _padded(h_BTD, table_VD, token_BT, is_token_BT)
  return _logprob(vocab_size, temperature, *args)[:rows, :columns]


def loss_sums(
  h_BTD: Array, table_VD: Array, token_BT: Array, weight_BT: Array
) -> tuple[Array, Array]:
  """`lm_head.loss_sums`; the table in the dtype of h."""
  args = _padded(h_BTD, table_VD, token_BT, weight_BT)
  return _sum_nll(len(table_VD), *args), jnp.sum(weight_BT.astype(jnp.float32))


def look_up(table_VD: Array, row_BL: Array) -> Array:
  """Rows of a table, [B, L, D] in its dtype, with columns split over `tensor`.

  Args:
    table_VD: in the compute dtype: what is sent and summed has its size.
    row_BL: int32, in [0, V).
  """
  rows, columns = row_BL.shape
  mesh = jax.sharding.get_abstract_mesh()
  table_VD = _lengthen(table_VD, mesh.shape["tensor"])
  row_BL = _lengthen(row_BL, num_row_shards(mesh), mesh.shape["tensor"])
  return _look_up(table_VD.shape, table_VD.dtype, table_VD, row_BL)[:rows, :columns]


def _lengthen(x: Array, *multiples: int) -> Array:
  """Zeros at the ends of the first dimensions, so that these are multiples."""
  return jnp.pad(x, [(0, -n % m) for n, m in zip(x.shape, (*multiples, *[1] * x.ndim))])


def _padded(h_BTD, table_VD, token_BT, weight_BT):
  """The same arrays with rows, columns and vocabulary that the mesh divides. What is added weighs 0."""
  mesh = jax.sharding.get_abstract_mesh()
  tensor = mesh.shape["tensor"]
  sizes = num_row_shards(mesh), tensor
  weight_BT = weight_BT.astype(jnp.float32)
  return (
    _lengthen(h_BTD, *sizes),
    _lengthen(table_VD, tensor),
    _lengthen(token_BT, *sizes),
    _lengthen(weight_BT, *sizes),
  )


def _on_each_device(run: Callable, in_specs: tuple, out_specs) -> Callable:
  """Maps `run` over the mesh. No gradient is taken through the map."""
  return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


_gather = functools.partial(jax.lax.all_gather, axis=1, tiled=True)
_scatter = functools.partial(jax.lax.psum_scatter, scatter_dimension=1, tiled=True)


def _sum_of_rows(d_table_vD: Array) -> Array:
  """A table's gradient, summed over the rows of all devices: the part that a device keeps.

  It is summed in the dtype of the weights' copy, as all gradients are (see `layers.cast`).
  """
  beside = tuple(axis for axis in ROWS if axis != "fsdp")
  return jax.lax.psum(_scatter(d_table_vD, "fsdp"), beside)


class _Shard:
  """What one device reads: its rows with all of their columns, and its part of the vocabulary.

  Attributes:
    table_vD: its rows of the table.
    id_v: their token ids.
    is_id_v: False where the table was padded.
    blocks: number of blocks of tokens.
    h_NTD: its tokens' hidden states, in blocks; 0 where the weight is 0, which keeps NaN out of the products.
  """

  def __init__(self, vocab_size: int, h_BtD, table_vd, weight_BT):
    self.dtype, self.vocab_size = h_BtD.dtype, vocab_size
    self.shape = (*weight_BT.shape, h_BtD.shape[-1])
    h_BTD = _gather(h_BtD, "tensor")
    self.table_vD = _gather(table_vd, "fsdp")
    size = len(self.table_vD)
    self.id_v = jax.lax.axis_index("tensor") * size + jnp.arange(size, dtype=jnp.int32)
    self.is_id_v = self.id_v < vocab_size
    self.blocks = lm.num_blocks(weight_BT.size, size, h_BTD.shape[-1])
    self.h_NTD = self.split(jnp.where(weight_BT[..., None] != 0, h_BTD, 0))

  def split(self, x_BT: Array) -> Array:
    """An array of the device's tokens in blocks: [blocks, tokens of a block]. Tokens that fill the last one are 0."""
    x = x_BT.reshape(-1, *x_BT.shape[2:])
    fill = -len(x) % self.blocks
    return jnp.pad(x, [(0, fill), *[(0, 0)] * (x.ndim - 1)]).reshape(self.blocks, -1, *x.shape[1:])

  def join(self, x_NT: Array) -> Array:
    """The opposite of `split`."""
    rows, columns, _ = self.shape
    x = x_NT.reshape(-1, *x_NT.shape[2:])
    return x[: rows * columns].reshape(rows, columns, *x.shape[1:])

  def logits(self, h_TD: Array, temperature: float) -> Array:
    """The device's part of a block's logits, float32; -inf where the table was padded."""
    logits_Tv = jnp.einsum("TD,vD->Tv", h_TD, self.table_vD, preferred_element_type=jnp.float32)
    return jnp.where(self.is_id_v[None], logits_Tv / temperature, -jnp.inf)

  def is_token(self, token_T: Array) -> Array:
    """Where a block's logits are those of the given tokens."""
    return token_T[:, None] == self.id_v[None]

  def logprob(self, h_TD: Array, token_T: Array, temperature: float):
    """A block's (logits_Tv, logprob_T of the given tokens, the log_T of the sum of all exponentials)."""
    logits_Tv = self.logits(h_TD, temperature)
    max_T = jax.lax.pmax(jnp.max(logits_Tv, axis=-1), "tensor")
    sum_T = jnp.sum(jnp.exp(logits_Tv - max_T[:, None]), axis=-1)
    picked_T = jnp.sum(jnp.where(self.is_token(token_T), logits_Tv, 0), axis=-1)
    sum_T, picked_T = jax.lax.psum((sum_T, picked_T), "tensor")
    # No device has an id outside the vocabulary. NaN, as on one device; where it weighs 0 the callers drop it.
    picked_T = jnp.where((token_T >= 0) & (token_T < self.vocab_size), picked_T, jnp.nan)
    log_T = jnp.log(sum_T) + max_T
    return logits_Tv, picked_T - log_T, log_T

  def gradients(self, d_logits: Callable, *blocks: Array):
    """Sums what flows back from the logits, block by block.

    Args:
      d_logits: (h_TD, *block) -> (gradient of a block's logits_Tv, other results of the block).
      blocks: arrays of `split`.
    Returns:
      (the gradients of h_BtD and of table_vd, the other results of all blocks)
    """
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def one(d_table_vD, block):
      d_logits_Tv, rest = d_logits(*block)
      d_table_vD += product("Tv,TD->vD", d_logits_Tv, block[0])
      return d_table_vD, (product("Tv,vD->TD", d_logits_Tv, self.table_vD).astype(self.dtype), rest)

    zeros_vD = jnp.zeros(self.table_vD.shape, jnp.float32)
    d_table_vD, (d_h_NTD, rest) = jax.lax.scan(one, zeros_vD, (self.h_NTD, *blocks))
    d_h_BtD = _scatter(self.join(d_h_NTD), "tensor")
    return d_h_BtD, _sum_of_rows(d_table_vD.astype(self.dtype)), rest


# --- lookups ------------------------------------------------------------------------------------------


def _own(row_BL: Array, size: int) -> tuple[Array, Array]:
  """(indices into a device's part of a table, where a row lies in it)."""
  index_BL = row_BL - jax.lax.axis_index("tensor") * size
  return index_BL, (index_BL >= 0) & (index_BL < size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _look_up(shape, dtype, table_VD, row_BL):
  return _look_up_fwd(shape, dtype, table_VD, row_BL)[0]


def _look_up_fwd(shape, dtype, table_VD, row_BL):
  def run(table_vd, row_BL):
    table_vD = _gather(table_vd, "fsdp")
    index_BL, is_own_BL = _own(row_BL, len(table_vD))
    h_BLD = table_vD.at[index_BL].get(mode="clip")
    # One device has the row, and the others add zeros.
    return _scatter(jnp.where(is_own_BL[..., None], h_BLD, 0), "tensor")

  return _on_each_device(run, (_TABLE, _TOKENS), _HIDDEN)(table_VD, row_BL), row_BL


def _look_up_bwd(shape, dtype, row_BL, d_h_BLD):
  size = shape[0] // jax.sharding.get_abstract_mesh().shape["tensor"]

  def run(row_BL, d_h_BtD):
    index_BL, is_own_BL = _own(row_BL, size)
    index_BL = jnp.where(is_own_BL, index_BL, size)  # past the end, which 'drop' leaves out
    d_h_BLD = _gather(d_h_BtD, "tensor").astype(jnp.float32)
    d_table_vD = jnp.zeros((size, shape[1]), jnp.float32).at[index_BL].add(d_h_BLD, mode="drop")
    return _sum_of_rows(d_table_vD.astype(dtype))

  return _on_each_device(run, (_TOKENS, _HIDDEN), _TABLE)(row_BL, d_h_BLD), None


_look_up.defvjp(_look_up_fwd, _look_up_bwd)


# --- log-probabilities --------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _logprob(vocab_size, temperature, h_BTD, table_VD, token_BT, weight_BT):
  return _logprob_fwd(vocab_size, temperature, h_BTD, table_VD, token_BT, weight_BT)[0]


def _logprob_fwd(vocab_size, temperature, h_BTD, table_VD, token_BT, weight_BT):
  def run(h_BtD, table_vd, token_BT, weight_BT):
    shard = _Shard(vocab_size, h_BtD, table_vd, weight_BT)
    one = lambda block: shard.logprob(block[0], block[1], temperature)[1:]
    logprob_NT, log_NT = jax.lax.map(one, (shard.h_NTD, shard.split(token_BT)))
    return jnp.where(weight_BT != 0, shard.join(logprob_NT), 0), shard.join(log_NT)

  in_specs = (_HIDDEN, _TABLE, _TOKENS, _TOKENS)
  mapped = _on_each_device(run, in_specs, (_TOKENS, _TOKENS))
  logprob_BT, log_BT = mapped(h_BTD, table_VD, token_BT, weight_BT)
  return logprob_BT, (h_BTD, table_VD, token_BT, weight_BT, log_BT)


def _logprob_bwd(vocab_size, temperature, residuals, g_BT):
  """The logits are computed again: the cotangents were not known in the forward pass."""

  def run(h_BtD, table_vd, token_BT, weight_BT, log_BT, g_BT):
    shard = _Shard(vocab_size, h_BtD, table_vd, weight_BT)

    def d_logits(h_TD, token_T, log_T, g_T):
      prob_Tv = jnp.exp(shard.logits(h_TD, temperature) - log_T[:, None])
      return g_T[:, None] / temperature * (shard.is_token(token_T) - prob_Tv), None

    g_BT = jnp.where(weight_BT != 0, g_BT, 0)
    return shard.gradients(d_logits, *map(shard.split, (token_BT, log_BT, g_BT)))[:2]

  in_specs = (_HIDDEN, _TABLE, *(_TOKENS,) * 4)
  mapped = _on_each_device(run, in_specs, (_HIDDEN, _TABLE))
  return *mapped(*residuals, g_BT), None, None


_logprob.defvjp(_logprob_fwd, _logprob_bwd)


# --- the loss -----------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_nll(vocab_size, h_BTD, table_VD, token_BT, weight_BT):
  # Used where no gradient is asked for; with one, JAX calls `_sum_nll_fwd` in its place.
  return -jnp.sum(weight_BT * _logprob(vocab_size, 1.0, h_BTD, table_VD, token_BT, weight_BT))


def _sum_nll_fwd(vocab_size, h_BTD, table_VD, token_BT, weight_BT):
  """As in `lm.blocked_lm_loss`, the weights are known, so each block's logits become gradients at once."""

  def run(h_BtD, table_vd, token_BT, weight_BT):
    shard = _Shard(vocab_size, h_BtD, table_vd, weight_BT)

    def d_logits(h_TD, token_T, weight_T):
      logits_Tv, logprob_T, log_T = shard.logprob(h_TD, token_T, 1.0)
      prob_Tv = jnp.exp(logits_Tv - log_T[:, None])
      nll_T = jnp.where(weight_T != 0, -weight_T * logprob_T, 0)
      return weight_T[:, None] * (prob_Tv - shard.is_token(token_T)), nll_T

    *gradients, nll_NT = shard.gradients(d_logits, *map(shard.split, (token_BT, weight_BT)))
    return jax.lax.psum(jnp.sum(nll_NT), ROWS), *gradients

  in_specs = (_HIDDEN, _TABLE, _TOKENS, _TOKENS)
  mapped = _on_each_device(run, in_specs, (PS(), _HIDDEN, _TABLE))
  sum_nll, d_h_BTD, d_table_VD = mapped(h_BTD, table_VD, token_BT, weight_BT)
  return sum_nll, (d_h_BTD, d_table_VD)


def _sum_nll_bwd(vocab_size, residuals, g):
  scale = lambda x: (g * x.astype(jnp.float32)).astype(x.dtype)
  return *map(scale, residuals), None, None


_sum_nll.defvjp(_sum_nll_fwd, _sum_nll_bwd)
