"""Learning-rate schedules and the Adam optimiser of every stage.

Called by the stages when they build their train step. Imports no model and no ops.
"""

import jax
import jax.numpy as jnp
import optax

from instructjax.core.config import OptimConfig
from instructjax.core.errors import UserError


def make_schedule(
  kind: str,
  *,
  learning_rate: float,
  num_steps: int,
  warmup_steps: int,
  warmup_start: float,
  end_fraction: float,
) -> optax.Schedule:
  """Learning rate as a function of the number of updates done so far.

  Args:
    kind: after the warmup, 'cosine' or 'linear' falls to end_fraction of the peak at num_steps and
      stays there; 'constant' stays at the peak.
    learning_rate: the peak.
    num_steps: updates in all, warmup included; unused by 'constant'.
    warmup_steps: updates over which the rate rises linearly to the peak; 0 for none.
    warmup_start: rate at update 0 as a fraction of the peak; unused without a warmup.
    end_fraction: last rate as a fraction of the peak; unused by 'constant'.
  """
  if learning_rate <= 0:
    raise ValueError(f"learning_rate={learning_rate} must be > 0.")
  for name, value in (("warmup_start", warmup_start), ("end_fraction", end_fraction)):
    if not 0 <= value <= 1:
      raise ValueError(f"{name}={value} must be in [0, 1]: it is a fraction of the peak rate.")
  if warmup_steps < 0:
    raise ValueError(f"warmup_steps={warmup_steps} must be >= 0.")
  if kind != "constant" and warmup_steps >= num_steps:
    raise UserError(
      f"schedule={kind!r} must have steps left after its warmup: warmup_steps={warmup_steps},"
      f" got num_steps={num_steps}. Lower warmup_steps."
    )

  decay_steps = num_steps - warmup_steps
  if kind == "cosine":
    decay = optax.cosine_decay_schedule(learning_rate, decay_steps, alpha=end_fraction)
  elif kind == "linear":
    decay = optax.linear_schedule(learning_rate, end_fraction * learning_rate, decay_steps)
  elif kind == "constant":
    decay = optax.constant_schedule(learning_rate)
  else:
    raise ValueError(f"schedule={kind!r} must be 'cosine', 'constant' or 'linear'.")
  if not warmup_steps:
    return decay
  warmup = optax.linear_schedule(warmup_start * learning_rate, learning_rate, warmup_steps)
  return optax.join_schedules([warmup, decay], [warmup_steps])


def make_optimizer(cfg: OptimConfig, num_steps: int) -> optax.GradientTransformation:
  """Adam with the configured schedule, clipping and decoupled weight decay.

  Order: clip by global norm, Adam, add weight_decay * parameter, times minus the learning rate.
  """
  cfg.validate("optim")
  schedule = make_schedule(
    cfg.schedule,
    learning_rate=cfg.learning_rate,
    num_steps=num_steps,
    warmup_steps=cfg.warmup_steps,
    warmup_start=cfg.warmup_start,
    end_fraction=cfg.end_fraction,
  )
  # eps is added after the bias correction, as in PyTorch and Algorithm 1 of arXiv:1412.6980.
  # lm-human-preferences has TensorFlow's Adam, which adds it before: smaller first updates of weights
  # with small gradients (tests/train/test_optim.py has both).
  parts = [optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps)]
  if cfg.clip_norm is not None:
    clip = lambda grads, _: clip_by_global_norm(grads, cfg.clip_norm)
    parts.insert(0, optax.stateless(clip))
  if cfg.weight_decay:
    parts.append(optax.add_decayed_weights(cfg.weight_decay, mask=is_decayed))
  return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


def clip_by_global_norm(grads: optax.Updates, max_norm: float) -> optax.Updates:
  """Gradients scaled to a global norm of at most `max_norm` (Pascanu et al. 2012, arXiv:1211.5063, sec. 3.2).

  By one factor: optax divides and multiplies each element, for which XLA's CPU backend writes all gradients once more.
  """
  norm = optax.tree.norm(grads)
  factor = jnp.where(norm > max_norm, max_norm / norm, 1.0)
  return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)


def is_decayed(params: optax.Params) -> optax.Params:
  """All parameters but biases (`b_*`, `bias*`) and normalisation scales (`scale*`).

  Told by name, because rank does not tell: layers are stacked, so a bias may have four dimensions.
  """

  def by_name(path, _):
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return not name.startswith(("b_", "bias", "scale"))

  return jax.tree_util.tree_map_with_path(by_name, params)
