"""The learning-rate schedules and the Adam optimiser that all stages share.

Called by the stages when they build their training step, and by rl/step.py for its own clipping. Imports no model.
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
  """The learning rate as a function of the number of updates done so far.

  Args:
    kind: what follows the warmup. 'cosine' and 'linear' fall to end_fraction of the peak at num_steps and stay there;
      'constant' stays at the peak.
    learning_rate: the peak.
    num_steps: updates in all, warmup included; unused by 'constant'.
    warmup_steps: updates over which the rate rises linearly to the peak; 0 for none.
    warmup_start: rate at update 0 as a fraction of the peak; unused without a warmup.
    end_fraction: last rate as a fraction of the peak; unused by 'constant'.
  Raises:
    ValueError: an argument is out of its range, or the kind is unknown. `require_steps` says it to the user.
  """
  if learning_rate <= 0:
    raise ValueError(f"learning_rate={learning_rate} must be > 0.")
  for name, value in (("warmup_start", warmup_start), ("end_fraction", end_fraction)):
    if not 0 <= value <= 1:
      raise ValueError(f"{name}={value} must be in [0, 1]: it is a fraction of the peak rate.")
  if warmup_steps < 0:
    raise ValueError(f"warmup_steps={warmup_steps} must be >= 0.")
  if kind != "constant" and warmup_steps >= num_steps:
    raise ValueError(
      f"schedule={kind!r}: warmup_steps={warmup_steps} must be below num_steps={num_steps}."
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


def require_steps(cfg: OptimConfig, num_steps: int, where: str, what: str = "the stage"):
  """Checks that the learning rate has updates left to fall in when its warmup is over.

  Args:
    cfg: the optimiser's settings.
    num_steps: updates in all.
    where: dotted name of the settings, as `config.sft.optim`.
    what: what makes these updates, in words.
  Raises:
    UserError: the warmup is as long as the training.
  """
  if cfg.schedule != "constant" and cfg.warmup_steps >= num_steps:
    raise UserError(
      f"{where}.warmup_steps={cfg.warmup_steps} must be below the {num_steps} updates of {what}, since"
      f" schedule={cfg.schedule!r} falls after the warmup; lower it"
    )


def make_optimizer(cfg: OptimConfig, num_steps: int) -> optax.GradientTransformation:
  """Adam with the configured schedule, gradient clipping and decoupled weight decay.

  In this order: clip the gradients by their global norm, apply Adam, add weight_decay * parameter, and multiply by
  minus the learning rate.

  Raises:
    UserError: a setting is out of its range.
    ValueError: the warmup is as long as the training, see `require_steps`.
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
  # eps is added after the bias correction, as in PyTorch and Algorithm 1 of arXiv:1412.6980. TensorFlow's Adam, which
  # lm-human-preferences uses, adds it before the correction. There the first updates of weights with small gradients
  # are smaller (details item 31; tests/train/test_optim.py compares the two).
  parts = [optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps)]
  if cfg.clip_norm is not None:
    clip = lambda grads, _: clip_by_global_norm(grads, cfg.clip_norm)
    parts.insert(0, optax.stateless(clip))
  if cfg.weight_decay:
    parts.append(optax.add_decayed_weights(cfg.weight_decay, mask=is_decayed))
  return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


def clip_by_global_norm(grads: optax.Updates, max_norm: float) -> optax.Updates:
  """Scales gradients to a global norm of at most `max_norm` (Pascanu et al. 2012, arXiv:1211.5063, sec. 3.2).

  It multiplies by a single factor. Optax divides and multiplies each element, and XLA's CPU backend then writes all
  gradients once more.
  """
  norm = optax.tree.norm(grads)
  factor = jnp.where(norm > max_norm, max_norm / norm, 1.0)
  return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)


def is_decayed(params: optax.Params) -> optax.Params:
  """The mask of weight decay: True except for biases (`b_*`, `bias*`) and normalisation scales (`scale*`).

  It goes by name because the rank does not tell: layers are stacked, so a bias may have four dimensions.
  """

  def by_name(path, _):
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return not name.startswith(("b_", "bias", "scale"))

  return jax.tree_util.tree_map_with_path(by_name, params)
