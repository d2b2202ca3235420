"""Scalar heads: a reward model made from a language model, and the zero point of its scores.

Called by stages/rm.py, stages/policies.py and train/weights.py. Works on parameter dicts only; transformer.py declares
and applies the head.
"""

import jax
import jax.numpy as jnp

from instructjax.core.structs import Params


def scalar_params_from_lm(lm_params: Params, scalar_init: Params) -> Params:
  """Parameters of a reward model that starts from a language model: its trunk under a fresh scalar head (sec 3.5).

  Args:
    lm_params: parameters of a head='lm' model. Its own head, if it has one, is dropped.
    scalar_init: `init_params` of the head='scalar' model of the same network.
  Raises:
    ValueError: the two models differ in a parameter's shape.
  """
  trunk = {name: part for name, part in lm_params.items() if name != "head"}
  mine = jax.tree.map(jnp.shape, trunk)
  wanted = jax.tree.map(jnp.shape, {n: part for n, part in scalar_init.items() if n != "head"})
  if mine != wanted:
    raise ValueError(
      "scalar_params_from_lm: the language model's trunk must have the reward model's shapes;"
      f" got {mine}, not {wanted}. Use one model config for both."
    )
  return trunk | {"head": scalar_init["head"]}


def shift_bias(params: Params, amount) -> Params:
  """The same model with every score lowered by `amount`.

  Before PPO, the bias is set so that the labelers' demonstrations score 0 on average (C.2, details item 17). For that,
  pass the mean of their scores.
  """
  head = params["head"] | {"bias": params["head"]["bias"] - jnp.float32(amount)}
  return params | {"head": head}
