"""The model family as pure functions; the only package that imports flax.linen."""

from instructjax.models.decoding import (
  decode_step,
  decode_weights,
  init_cache,
  prefill,
)
from instructjax.models.execution import (
  for_inference,
  model_on,
  resolve_execution,
)
from instructjax.models.heads import scalar_params_from_lm, shift_bias
from instructjax.models.positions import from_mask as positions_from_mask
from instructjax.models.positions import from_segments as positions_from_segments
from instructjax.models.transformer import (
  Model,
  apply,
  arrange,
  frozen_weights,
  init_params,
  make_model,
  param_axes,
  param_shapes,
  param_shardings,
)

__all__ = [
  "Model",
  "apply",
  "arrange",
  "decode_step",
  "decode_weights",
  "for_inference",
  "frozen_weights",
  "init_cache",
  "init_params",
  "make_model",
  "model_on",
  "param_axes",
  "param_shapes",
  "param_shardings",
  "positions_from_mask",
  "positions_from_segments",
  "prefill",
  "resolve_execution",
  "scalar_params_from_lm",
  "shift_bias",
]
