"""Episodes that share rows: where they lie, nothing lost, and no more rows done than are in use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.core.config import MeshConfig
from instructjax.core.structs import Array, pytree
from instructjax.parallel import sharding
from instructjax.rl import shared_rows

WIDTH = 10


@pytree
class Pair:
  x_BL: Array
  is_token_BL: Array


@pytest.fixture(autouse=True)
def not_joined(monkeypatch):
  """Rows as wide as an episode may be, short as they are here; see `joined` below."""
  monkeypatch.setattr(shared_rows, "JOINED", 0)


def sizes():
  return shared_rows.NARROWEST, shared_rows.NARROWING, shared_rows.JOINED


@functools.cache
def compiled_first_fit(rows, read):
  """One program for all batches of a shape. The widths are read from the module while it is traced."""
  assert read == sizes()
  return jax.jit(functools.partial(shared_rows.first_fit, rows=rows))


def first_fit(is_token_BL, rows=1):
  return compiled_first_fit(rows, sizes())(is_token_BL)


def as_placed(placement, rows):
  """Rows of a chunk, and the widths of rows that `first_fit` has."""
  return dict(rows=rows, widths=shared_rows.row_widths(placement.cell_BL.shape[1], rows))


def left_padded(length_B, width=WIDTH, prompt=4):
  """is_token_BL as rollouts have it: each episode's prompt ends at the same column."""
  is_token_BL = np.zeros((len(length_B), width), bool)
  for row, length in zip(is_token_BL, length_B):
    start = max(0, prompt - length + 1)
    row[start : start + length] = True
  return is_token_BL


def expected_rows(length_B, width=WIDTH):
  """First-fit decreasing, an episode at a time: (row, first column) of each."""
  used, place = [], {}
  for episode in sorted(range(len(length_B)), key=lambda b: -length_B[b]):
    row = next((r for r, n in enumerate(used) if n + length_B[episode] <= width), len(used))
    used += [0] * (row == len(used))
    place[episode] = row, used[row]
    used[row] += length_B[episode]
  return place, len(used)


@pytest.mark.parametrize(
  "length_B",
  [
    # 7 and 3 fill a row, 6 and 4 another, 5 and 2 and 2 the third: by hand.
    [3, 7, 5, 2, 6, 4, 2],
    [10, 10, 10],
    [1] * 12,
    list(np.random.default_rng(0).integers(1, WIDTH + 1, 40)),
  ],
)
def test_the_longest_first_each_into_the_first_row_with_room(length_B):
  is_token_BL = left_padded(length_B)
  placement = first_fit(is_token_BL)
  place, num_rows = expected_rows(length_B)
  assert placement.end_K == num_rows
  for b, length in enumerate(length_B):
    row, start = place[b]
    cells = np.asarray(placement.cell_BL[b])[is_token_BL[b]]
    np.testing.assert_array_equal(cells, row * WIDTH + start + np.arange(length))
  assert np.all(np.asarray(placement.cell_BL)[~is_token_BL] == is_token_BL.size)


def test_hand_worked_rows():
  length_B = [3, 7, 5, 2, 6, 4, 2]
  placement = first_fit(left_padded(length_B))
  assert placement.end_K == 3
  np.testing.assert_array_equal(
    shared_rows.segments(placement)[:4],
    [[2] * 7 + [1] * 3, [5] * 6 + [6] * 4, [3] * 5 + [4] * 2 + [7] * 2 + [0], [0] * 10],
  )


def test_packing_loses_nothing():
  rng = np.random.default_rng(1)
  is_token_BL = left_padded(rng.integers(1, WIDTH + 1, 9))
  x_BL = rng.normal(size=is_token_BL.shape).astype(np.float32)
  x_BL[~is_token_BL] = np.nan
  placement = first_fit(is_token_BL)
  rows_BL = shared_rows.to_shared(placement, x_BL, 0.0)
  assert np.isfinite(rows_BL).all()
  np.testing.assert_array_equal(np.sort(rows_BL[rows_BL != 0]), np.sort(x_BL[is_token_BL]))
  np.testing.assert_array_equal(
    shared_rows.to_padded(placement, rows_BL), np.where(is_token_BL, x_BL, 0.0)
  )
  assert np.all(
    np.asarray(shared_rows.to_shared(placement, x_BL, -1.0))[shared_rows.segments(placement) == 0]
    == -1
  )


@pytest.fixture
def three_widths(monkeypatch):
  """Rows of 12, 6 and 3 columns."""
  monkeypatch.setattr(shared_rows, "NARROWEST", 3)
  monkeypatch.setattr(shared_rows, "NARROWING", 2)
  assert shared_rows.row_widths(12, 1) == [12, 6, 3] and shared_rows.row_widths(9, 1) == [9]


def test_an_episode_gets_a_row_hardly_wider_than_itself(three_widths):
  """By hand: 9 and 3 fill a row of 12, 7 and 5 another; 4 and 2, 4 and 2, 4, then 3 in what is left of the chunk."""
  length_B = [4, 9, 2, 7, 5, 4, 2, 4, 3, 3]
  placement = first_fit(left_padded(length_B, width=12))
  np.testing.assert_array_equal(placement.end_K, [2, 4, 4])  # chunks of 12 cells
  rows = np.asarray(shared_rows.segments(placement)).reshape(-1)
  assert rows[:24].tolist() == [2] * 9 + [9] * 3 + [4] * 7 + [5] * 5
  assert rows[24:36].tolist() == [1] * 4 + [3] * 2 + [6] * 4 + [7] * 2
  assert rows[36:48].tolist() == [8] * 4 + [0] * 2 + [10] * 3 + [0] * 3
  assert not rows[48:].any()


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("longest", [3, 6, 12])
def test_any_batch_fits_into_rows_of_several_widths(three_widths, rows, longest):
  for seed in range(20):
    length_B = np.random.default_rng(seed).integers(1, longest + 1, 8)
    is_token_BL = left_padded(length_B, width=12)
    placement = first_fit(is_token_BL, rows=rows)
    assert placement.end_K[-1] * rows <= 8
    cells = np.asarray(placement.cell_BL)[is_token_BL]
    assert len(set(cells)) == len(cells) and cells.max() < placement.end_K[-1] * rows * 12
    start = 0
    for width, end in zip((12, 6, 3), np.asarray(placement.end_K) * rows * 12, strict=True):
      for cell_L, is_token_L in zip(np.asarray(placement.cell_BL), is_token_BL, strict=True):
        mine = cell_L[is_token_L]
        if start <= mine[0] < end:  # in one row of this width
          assert mine[-1] < end and mine[0] // width == mine[-1] // width
      start = end


@pytest.mark.parametrize("rows", [1, 2])
def test_rows_of_every_width_are_worked_off_once(three_widths, rows):
  is_token_BL = left_padded([12, 7, 5, 6, 2, 3, 2, 1], width=12)
  x_BL = np.random.default_rng(4).normal(size=is_token_BL.shape).astype(np.float32)
  placement, widths = first_fit(is_token_BL, rows=rows), []
  packed_BL, segment_BL = (
    shared_rows.to_shared(placement, x_BL, 0.0),
    shared_rows.segments(placement),
  )

  def from_row_start(pair):
    x, segment = pair
    widths.append(x.shape)
    return x + 100 * jnp.arange(x.shape[1])[None]

  mapped = shared_rows.map_rows(
    from_row_start, placement, (packed_BL, segment_BL), **as_placed(placement, rows)
  )
  assert {*widths} == {(rows << k, 12 >> k) for k in range(3)}
  got_BL = np.asarray(shared_rows.to_padded(placement, mapped)) - np.where(is_token_BL, x_BL, 0)
  column_B = np.asarray(placement.cell_BL) % 12  # of a row of 12; narrower ones begin inside it
  for got_L, column_L, is_token_L in zip(got_BL, column_B, is_token_BL, strict=True):
    column_L, start = column_L[is_token_L], round(float(got_L[is_token_L][0]) / 100)
    np.testing.assert_allclose(
      got_L[is_token_L], 100 * (start + np.arange(len(column_L))), atol=1e-3
    )
    assert (column_L[0] - start) % 3 == 0

  def loss(scale, pair):
    value_BL = jnp.where(pair.is_token_BL, scale**2 * pair.x_BL, 0)
    mean = jnp.sum(value_BL) / jnp.maximum(jnp.sum(pair.is_token_BL), 1)
    return mean, {"x_max": jnp.max(value_BL)}

  pair = Pair(packed_BL, segment_BL > 0)
  (mean, metrics), gradient = shared_rows.mean_gradient(
    loss, 3.0, placement, pair, "is_token_BL", **as_placed(placement, rows)
  )
  expected = x_BL[is_token_BL].mean()
  np.testing.assert_allclose([mean, gradient], [9 * expected, 6 * expected], rtol=1e-4)
  np.testing.assert_allclose(metrics["x_max"], 9 * x_BL[is_token_BL].max(), rtol=1e-6)


@pytest.mark.parametrize("rows, done", [(1, 3), (2, 4), (4, 4)])
def test_only_chunks_in_use_are_done(rows, done):
  placement = first_fit(left_padded([7, 3, 6, 4, 5, 2, 2, 1]), rows=rows)  # three rows of eight
  assert placement.end_K == -(-3 // rows)
  x_BL = jnp.ones((8, WIDTH))

  def twice(x_BL):
    assert x_BL.shape == (rows, WIDTH)
    return 2 * x_BL

  mapped = jax.jit(
    lambda x: shared_rows.map_rows(twice, placement, x, **as_placed(placement, rows))
  )(x_BL)
  np.testing.assert_array_equal(np.sum(mapped, axis=1), [2 * WIDTH] * done + [0] * (8 - done))


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_mean_over_chunks_weighs_by_tokens(rows):
  is_token_BL = left_padded([7, 3, 6, 4, 5, 2, 2, 1])
  x_BL = np.random.default_rng(3).normal(size=is_token_BL.shape).astype(np.float32)
  placement = first_fit(is_token_BL, rows=rows)
  pair = Pair(shared_rows.to_shared(placement, x_BL, 0.0), shared_rows.segments(placement) > 0)

  def loss(scale, pair):
    assert pair.x_BL.shape == (rows, WIDTH)
    value_BL = jnp.where(pair.is_token_BL, scale**2 * pair.x_BL, 0)
    mean = jnp.sum(value_BL) / jnp.maximum(jnp.sum(pair.is_token_BL), 1)
    return mean, {"mean": mean, "x_max": jnp.max(value_BL)}

  run = lambda scale: shared_rows.mean_gradient(
    loss, scale, placement, pair, "is_token_BL", **as_placed(placement, rows)
  )
  (mean, metrics), gradient = jax.jit(run)(3.0)
  expected = x_BL[is_token_BL].mean()
  np.testing.assert_allclose([mean, metrics["mean"]], 9 * expected, rtol=1e-5)
  np.testing.assert_allclose(gradient, 6 * expected, rtol=1e-5)  # of scale ** 2
  np.testing.assert_allclose(metrics["x_max"], 9 * x_BL[is_token_BL].max(), rtol=1e-6)


def test_the_same_on_eight_devices():
  is_token_BL = left_padded(np.random.default_rng(2).integers(1, WIDTH + 1, 16))
  mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
  with jax.set_mesh(mesh):
    placed = sharding.place_batch(mesh, is_token_BL)
    placement = first_fit(placed, rows=8)
  np.testing.assert_array_equal(placement.cell_BL, first_fit(is_token_BL, rows=8).cell_BL)


# --- rows of episodes that are short --------------------------------------------------------------


@pytest.fixture
def joined(monkeypatch):
  """Rows of 20 columns, for episodes of up to WIDTH = 10."""
  monkeypatch.setattr(shared_rows, "JOINED", 2 * WIDTH)


def test_how_many_rows_are_joined(monkeypatch):
  monkeypatch.setattr(shared_rows, "JOINED", 128)
  width = lambda length, rows: shared_rows.row_widths(length, rows)[0]
  # 4 * 44 = 176 is the first multiple of 44 by a divisor of 8 that reaches 128, 3 * 44 = 132 by one of 6; 2 of 2 is 88.
  assert (width(44, 8), width(44, 6), width(44, 2), width(44, 1)) == (176, 132, 88, 44)
  assert width(127, 8) == 254 and shared_rows.row_widths(128, 8) == [128]
  with jax.set_mesh(sharding.make_mesh(MeshConfig(1, 2, 2, 2))):  # rows are split over four
    assert (width(44, 8), width(44, 4), width(44, 16)) == (88, 44, 176)
  # The planner counts for a mesh of other machines.
  assert [shared_rows.row_widths(44, 8, shards) for shards in (1, 4, 8)] == [[176], [88], [44]]
  placement = shared_rows.first_fit(jnp.ones((8, 44), bool), rows=8, shards=4)
  assert placement.end_K.tolist() == [1]


def test_joined_rows_hold_what_is_left_over(joined):
  """By hand: 7, 6, 5 and 2 fill a row of 20; 4, 3, 2 and 1 begin the next. Apart they took four rows of 10."""
  length_B = [3, 7, 5, 2, 6, 4, 2, 1]
  is_token_BL = left_padded(length_B)
  placement = first_fit(is_token_BL, rows=4)
  assert placement.end_K.tolist() == [1]  # a chunk of two rows of 20
  rows = np.asarray(shared_rows.segments(placement)).reshape(-1, 20)
  assert rows[0].tolist() == [2] * 7 + [5] * 6 + [3] * 5 + [4] * 2
  assert rows[1].tolist() == [6] * 4 + [1] * 3 + [7] * 2 + [8] + [0] * 10
  assert not rows[2:].any()


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_any_batch_fits_into_joined_rows(joined, rows):
  """Also where every episode is as long as it may be."""
  for seed in range(10):
    shortest = seed + 1
    length_B = np.random.default_rng(seed).integers(shortest, WIDTH + 1, 8)
    is_token_BL = left_padded(length_B)
    placement = first_fit(is_token_BL, rows=rows)
    assert placement.end_K[-1] * rows <= 8
    cells = np.asarray(placement.cell_BL)[is_token_BL]
    assert len(set(cells)) == len(cells) and cells.max() < placement.end_K[-1] * rows * WIDTH
    for cell_L, is_token_L in zip(np.asarray(placement.cell_BL), is_token_BL, strict=True):
      mine = cell_L[is_token_L]
      assert mine[0] // 20 == mine[-1] // 20  # in one row


@pytest.mark.parametrize("rows", [2, 4])
def test_joined_rows_are_worked_off_once(joined, rows):
  is_token_BL = left_padded([7, 3, 6, 4, 5, 2, 2, 1])
  x_BL = np.random.default_rng(3).normal(size=is_token_BL.shape).astype(np.float32)
  placement = first_fit(is_token_BL, rows=rows)
  packed_BL = shared_rows.to_shared(placement, x_BL, 0.0)

  def twice(x):
    assert x.shape == (rows // 2, 20)
    return 2 * x

  mapped = shared_rows.map_rows(twice, placement, packed_BL, **as_placed(placement, rows))
  np.testing.assert_array_equal(
    shared_rows.to_padded(placement, mapped), np.where(is_token_BL, 2 * x_BL, 0)
  )

  def loss(scale, pair):
    assert pair.x_BL.shape == (rows // 2, 20)
    value_BL = jnp.where(pair.is_token_BL, scale**2 * pair.x_BL, 0)
    return jnp.sum(value_BL) / jnp.maximum(jnp.sum(pair.is_token_BL), 1), {}

  pair = Pair(packed_BL, shared_rows.segments(placement) > 0)
  (mean, _), gradient = shared_rows.mean_gradient(
    loss, 3.0, placement, pair, "is_token_BL", **as_placed(placement, rows)
  )
  expected = x_BL[is_token_BL].mean()
  np.testing.assert_allclose([mean, gradient], [9 * expected, 6 * expected], rtol=1e-4)
