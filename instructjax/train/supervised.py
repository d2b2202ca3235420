"""The training state, and the language-model step: shared by pretrain, sft and ppo_init; rm takes the state only."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from instructjax.core.structs import PackedBatch, Params, TrainState, tree_of
from instructjax.models import adapters, lm_head, transformer
from instructjax.parallel import sharding
from instructjax.train import accumulation


def init_params(mesh: Mesh, model: transformer.Model, key: jax.Array) -> Params:
  """What is trained, fresh and random. Each device makes its own shards, so that the whole need not fit on one."""
  shardings, _ = adapters.trained_shardings(mesh, model)
  return jax.jit(lambda k: adapters.init(model, k), out_shardings=shardings)(key)


def state_shardings(
  mesh: Mesh, model: transformer.Model, tx: optax.GradientTransformation
) -> TrainState:
  """The sharding of a TrainState, in which optimiser state is sharded like the weights that it belongs to."""
  shardings, shapes = adapters.trained_shardings(mesh, model)
  return tree_of(
    TrainState,
    step=sharding.replicated(mesh),
    params=shardings,
    opt_state=sharding.opt_state_shardings(tx, shapes, shardings, mesh),
    key=sharding.replicated(mesh),
  )


def create_state(
  mesh: Mesh,
  model: transformer.Model,
  tx: optax.GradientTransformation,
  params: Params,
  key: jax.Array,
) -> tuple[TrainState, TrainState]:
  """Makes the TrainState before the first step; returns (state, its shardings)."""
  shardings = state_shardings(mesh, model, tx)
  state = TrainState(
    step=jax.device_put(jnp.zeros((), jnp.int32), shardings.step),
    params=params,
    opt_state=jax.jit(tx.init, out_shardings=shardings.opt_state)(params),
    key=jax.device_put(key, shardings.key),
  )
  return state, shardings


def _hidden(
  model: transformer.Model,
  params: Params,
  batch: PackedBatch,
  dropout_key_B: jax.Array | None = None,
  dropout_rate: float = 0.0,
):
  """Hidden states that predict every token except each row's first: (h_BTD, parameters for the head).

  Column t of h_BTD predicts the token in column t + 1; the last column has nothing to predict and is not computed.
  """
  return transformer.hidden(
    model,
    params,
    batch.token_BL,
    segment_BL=batch.segment_BL,
    position_BL=batch.position_BL,
    dropout_rate=dropout_rate,
    dropout_key_B=dropout_key_B,
    window=(0, batch.token_BL.shape[1] - 1),
  )


def lm_loss_sums(
  model: transformer.Model,
  params: Params,
  batch: PackedBatch,
  dropout_key_B: jax.Array | None = None,
  dropout_rate: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """The loss of a packed batch as (sum of weighted negative log-likelihoods in nats, sum of weights).

  Sums rather than a mean, so that batches with different numbers of weighted tokens can be added up exactly.
  """
  h_BTD, params = _hidden(model, params, batch, dropout_key_B, dropout_rate)
  return lm_head.loss_sums(model, params, h_BTD, batch.token_BL[:, 1:], batch.weight_BL[:, 1:])


def lm_row_sums(
  model: transformer.Model, params: Params, batch: PackedBatch
) -> tuple[jax.Array, jax.Array]:
  """The sums of `lm_loss_sums` for each row, (nll_B, weight_B), from which intervals are bootstrapped over rows."""
  weight_BT = batch.weight_BL[:, 1:]
  h_BTD, params = _hidden(model, params, batch)
  logprob_BT = lm_head.token_logprob(model, params, h_BTD, batch.token_BL[:, 1:], weight_BT > 0)
  return -jnp.sum(weight_BT * logprob_BT, axis=1), jnp.sum(weight_BT, axis=1)


def make_lm_train_step(
  model: transformer.Model,
  tx: optax.GradientTransformation,
  *,
  dropout_rate: float,
  state_shardings: TrainState,
  microbatches: int = 1,
) -> Callable:
  """Makes the jitted step (TrainState, PackedBatch) -> (TrainState, metrics).

  The loss is a mean per weighted token of the whole batch, of which `microbatches` parts are computed one after the
  other. With adapters the step takes their base as well: (TrainState, base, PackedBatch).
  """

  def step(state: TrainState, *inputs):
    base, batch = adapters.base_and(model, inputs)
    key_B = None
    if dropout_rate or adapters.drops(model):
      # A function of the step's number: a resumed run draws the same masks.
      dropout_key = jax.random.fold_in(state.key, state.step)
      key_B = jax.random.split(dropout_key, batch.token_BL.shape[0])
    # Of the whole batch, so that the losses of microbatches add up. 0, not NaN, without any weighted token.
    denominator = jnp.maximum(jnp.sum(batch.weight_BL[:, 1:]), 1.0)

    def share(params, rows):
      params = adapters.join(model, base, params, rows[1])
      sum_nll, _ = lm_loss_sums(model, params, *rows, dropout_rate=dropout_rate)
      return sum_nll / denominator, {}

    with jax.named_scope("gradient"):
      (loss, _), grads = accumulation.gradient(share, state.params, (batch, key_B), microbatches)
    tokens = jnp.sum(batch.segment_BL > 0).astype(jnp.float32)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "tokens": tokens}
    return apply_gradients(state, tx, grads), metrics

  return jit_step(step, state_shardings, model)


def jit_step(step: Callable, state_shardings: TrainState, model: transformer.Model) -> Callable:
  """Jits a step (TrainState, batch) -> (TrainState, metrics) with its shardings; the state is donated.

  With adapters the step takes their base between the two.
  """
  mesh = sharding.mesh_of(state_shardings)
  base = adapters.base_shardings(mesh, model)
  return jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(state_shardings, *base, sharding.batch_sharding(mesh)),
    out_shardings=(state_shardings, sharding.replicated(mesh)),
    compiler_options=sharding.step_options(mesh, transformer.param_shapes(model)),
  )


def apply_gradients(
  state: TrainState, tx: optax.GradientTransformation, grads: Params
) -> TrainState:
  """The state after one optimiser step."""
  with jax.named_scope("optimizer"):
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
  return TrainState(step=state.step + 1, params=params, opt_state=opt_state, key=state.key)


def make_lm_evaluation(model: transformer.Model, mesh: Mesh, microbatches: int = 1) -> Callable:
  """Makes (params, numpy PackedBatches) -> mean negative log-likelihood per weighted token of all batches, in nats.

  Of each batch, `microbatches` parts are computed one after the other.
  """

  def chunk_sums(params, rows):
    return jax.tree.map(lambda x: x[None], lm_loss_sums(model, params, rows))

  def batch_sums(params, batch):
    if microbatches == 1:
      return lm_loss_sums(model, params, batch)
    chunks = accumulation.map_rows(functools.partial(chunk_sums, params), batch, microbatches)
    return jax.tree.map(jnp.sum, chunks)

  sums = jit_sums(batch_sums, mesh, model)

  def evaluate(params, batches) -> float:
    # All batches are dispatched before the first result is fetched, so that the device does not wait for the host.
    totals = [sums(params, sharding.place_batch(mesh, batch)) for batch in batches]
    return float(sum(nll for nll, _ in totals)) / float(sum(weight for _, weight in totals))

  return evaluate


def jit_sums(sums: Callable, mesh: Mesh, model: transformer.Model) -> Callable:
  """Jits (params, PackedBatch) -> arrays, which every device gets whole; the parameters may be joined ones."""
  params_shardings = transformer.param_shardings(mesh, model)[0] if model.adapter is None else None
  return jax.jit(
    sums,
    in_shardings=(params_shardings, sharding.batch_sharding(mesh)),
    out_shardings=sharding.replicated(mesh),
  )
