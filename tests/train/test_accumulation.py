"""Parts of a batch add up to the batch: by hand, on arrays without a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.train import accumulation

# Six rows, of which 0, 3, 1, 0, 2 and 2 of four columns count: the means of parts are no means of equally many.
X_BT = np.arange(24, dtype=np.float32).reshape(6, 4)
COUNTS = np.array([0, 3, 1, 0, 2, 2])
BATCH = {"x": X_BT, "mask": np.arange(4)[None] < COUNTS[:, None]}
PICKED = X_BT[BATCH["mask"]]


def mean_loss(scale, rows):
  """(mean of scale * x^2 over the mask, its mean absolute value and its greatest)."""
  x, mask = rows["x"], rows["mask"]
  mean = lambda y: jnp.sum(jnp.where(mask, y, 0)) / jnp.maximum(jnp.sum(mask), 1)
  greatest = jnp.max(jnp.where(mask, x, 0))
  # Rows, of which there are equally many in every part, as an example of another mean.
  return scale * mean(x**2), {"x": mean(x), "x_max": greatest, "row": jnp.mean(x[:, 0])}


def count(rows):
  return {"loss": jnp.sum(rows["mask"]), "row": rows["x"].shape[0]}


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 6])
def test_a_mean_is_over_what_counts_in_the_whole_batch(num_chunks):
  (loss, metrics), grad = accumulation.mean_gradient(
    mean_loss, jnp.float32(0.5), BATCH, num_chunks, count
  )
  np.testing.assert_allclose(loss, 0.5 * np.mean(PICKED**2), rtol=1e-6)
  np.testing.assert_allclose(grad, np.mean(PICKED**2), rtol=1e-6)
  np.testing.assert_allclose(metrics["x"], PICKED.mean(), rtol=1e-6)
  np.testing.assert_allclose(metrics["row"], X_BT[:, 0].mean(), rtol=1e-6)
  assert metrics["x_max"] == PICKED.max()  # in the last part, and not a sum


def test_a_batch_in_which_nothing_counts_gives_zeros():
  empty = BATCH | {"mask": np.zeros((6, 4), bool)}
  (loss, metrics), grad = accumulation.mean_gradient(mean_loss, jnp.float32(1), empty, 3, count)
  assert (loss, grad, metrics["x"], metrics["x_max"]) == (0, 0, 0, 0)


def test_shares_add_up_and_each_part_is_read_once_in_order():
  seen = []

  def share(scale, rows):
    jax.debug.callback(lambda x: seen.append(x.tolist()), rows["x"][:, 0], ordered=True)
    return scale * jnp.sum(rows["x"]), {}

  (loss, metrics), grad = accumulation.gradient(share, jnp.float32(2), BATCH, 3)
  jax.effects_barrier()
  assert (loss, metrics, grad) == (2 * X_BT.sum(), {}, X_BT.sum())
  assert seen == [[0, 4], [8, 12], [16, 20]]


def test_one_part_needs_no_loop():
  text = lambda n: str(
    jax.make_jaxpr(lambda s: accumulation.mean_gradient(mean_loss, s, BATCH, n, count))(1.0)
  )
  assert "scan" not in text(1) and "scan" in text(2)


@pytest.mark.parametrize("num_chunks", [1, 2, 6])
def test_rows_are_mapped_in_order(num_chunks):
  shapes = []

  def double(rows):
    shapes.append(rows["x"].shape)
    return {"twice": 2 * rows["x"], "any": jnp.any(rows["mask"], axis=1)}

  found = accumulation.map_rows(double, BATCH, num_chunks)
  np.testing.assert_array_equal(found["twice"], 2 * X_BT)
  np.testing.assert_array_equal(found["any"], COUNTS > 0)
  assert set(shapes) == {(6 // num_chunks, 4)}
