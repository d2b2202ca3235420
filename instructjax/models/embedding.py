"""The embedding of tokens and positions, and the gradient of its lookup. Called by transformer.py and what decodes.

Dimension letters as in layers.py.
"""

import jax
import jax.numpy as jnp

from instructjax.models import split_table
from instructjax.parallel import constraints


def embed(
  model,
  params,
  token_BL,
  segment_BL,
  position_BL,
  place=constraints.split_columns,
  *,
  decoding=False,
):
  """Sums the embeddings of tokens and positions.

  Args:
    model, params, token_BL, segment_BL, position_BL: as for `transformer.hidden`.
    place: layout of the residual stream on a mesh.
    decoding: whether params are from `decode_weights`, which has placed the tables already.
  Returns:
    (h_BLD, segment_BL, params). h_BLD is zero at pads, segment_BL is 0 also where an id lies outside the vocabulary,
    and params are as `hidden` returns them.
  """
  is_token_BL = (segment_BL > 0) & (token_BL >= 0) & (token_BL < model.vocab_size)
  # Pads look up row 0, which is in bounds; the select below drops what they get.
  row_BL = jnp.where(is_token_BL, token_BL, 0)
  table_VD, table_TD = params["embedding"]["token_VD"], params["embedding"].get("position_TD")
  if constraints.on_one_device():
    h_BLD, table_VD = _look_up_and_pass(table_VD, row_BL)
  elif decoding:
    h_BLD, table_VD = _look_up(table_VD, row_BL)
  else:
    # Rounded before it is sent. The sum with the positions is rounded once more, as in decoding.
    h_BLD = split_table.look_up(table_VD.astype(model.execution.dtype), row_BL).astype(jnp.float32)
    table_TD = None if table_TD is None else table_TD.astype(model.execution.dtype)
  if model.network.scale_embeddings:
    # In float32: in bfloat16 the factor itself would be rounded, in decoding (whose table is bfloat16) only.
    h_BLD = h_BLD.astype(jnp.float32) * model.network.d_model**0.5
  params = params | {"embedding": params["embedding"] | {"token_VD": table_VD}}
  if model.network.position == "learned":
    row_BL = jnp.where(is_token_BL, position_BL, 0)
    # 'fill' gives NaN past the table, so that a row that is too long shows.
    h_BLD = h_BLD + table_TD.at[row_BL].get(mode="fill")
  # A select, not a product with a mask: NaN * 0 would be NaN.
  h_BLD = jnp.where(is_token_BL[:, :, None], h_BLD, 0.0).astype(model.execution.dtype)
  return place(h_BLD), jnp.where(is_token_BL, segment_BL, 0), params


def _look_up(table_VD, row_BL):
  """(rows, the table)."""
  return table_VD.at[row_BL].get(mode="promise_in_bounds"), table_VD


@jax.custom_vjp
def _look_up_and_pass(table_VD, row_BL):
  """Looks up rows and passes the table on: (rows, the table for its next use, the tied head).

  A tied table has two gradients: one from the lookup and one from the head. JAX would scatter the first into zeros and
  add the second, which takes three arrays of the table's size. Because the head uses the table that this function
  returns, the head's gradient arrives here first, and the lookup's is added into it in place. This is for one device
  only: on a mesh the two gradients are split differently.
  """
  return _look_up(table_VD, row_BL)


def _look_up_gradient(row_BL, gradients):
  dh_BLD, dtable_VD = gradients
  return dtable_VD.at[row_BL].add(dh_BLD, mode="promise_in_bounds"), None


_look_up_and_pass.defvjp(
  lambda table_VD, row_BL: (_look_up(table_VD, row_BL), row_BL), _look_up_gradient
)
