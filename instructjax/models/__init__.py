"""The model family as pure functions; the only package that imports flax.linen."""

from instructjax.models.heads import scalar_params_from_lm
from instructjax.models.heads import shift_bias
from instructjax.models.heads import value_params_from_reward
from instructjax.models.transformer import apply
from instructjax.models.transformer import decode_step
from instructjax.models.transformer import decode_weights
from instructjax.models.transformer import init_cache
from instructjax.models.transformer import init_params
from instructjax.models.transformer import make_model
from instructjax.models.transformer import Model
from instructjax.models.transformer import param_axes
from instructjax.models.transformer import param_shapes
from instructjax.models.transformer import positions_from_mask
from instructjax.models.transformer import prefill

__all__ = [
  "Model",
  "apply",
  "decode_step",
  "decode_weights",
  "init_cache",
  "init_params",
  "make_model",
  "param_axes",
  "param_shapes",
  "positions_from_mask",
  "prefill",
  "scalar_params_from_lm",
  "shift_bias",
  "value_params_from_reward",
]
