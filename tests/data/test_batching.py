import functools
import json

import jax
import numpy as np
import pytest

from instructjax.core.structs import Trees
from instructjax.data import batching
from instructjax.data.token_store import Encoded
from instructjax.data.tokenize import RankingTokens
from tests import micro

VOCAB, EOS = 90, 1


def prompts(count):
  """Prompts 1 to 3 tokens long; the first token of each is its number, from 10 on."""
  return [[10 + i] + [5] * (i % 3) for i in range(count)]


def prompt_batches(count=7, batch_size=4, seed=0, **shards):
  return batching.prompt_batches(
    prompts(count), length=3, batch_size=batch_size, seed=seed, vocab_size=VOCAB, **shards
  )


def numbers(batch):
  """Which prompts are in the batch, in order."""
  return [
    int(row[mask][0]) - 10 for row, mask in zip(batch.token_BP, batch.is_prompt_BP, strict=True)
  ]


def drawn(batches, steps):
  return [numbers(next(batches)) for _ in range(steps)]


# What a batch holds.


def test_details_12_prompts_are_padded_on_the_left():
  batch = next(prompt_batches())
  for row, number in enumerate(numbers(batch)):
    expected = prompts(7)[number]
    pads = [VOCAB] * (3 - len(expected))
    assert batch.token_BP[row].tolist() == pads + expected
    assert batch.is_prompt_BP[row].tolist() == [False] * len(pads) + [True] * len(expected)
  assert batch.index_B.tolist() == [0, 1, 2, 3]
  assert batch.token_BP.dtype == batch.index_B.dtype == np.int32
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch))


@pytest.mark.parametrize("prompt", [[], [3, 3, 3, 3]])
def test_a_prompt_that_does_not_fit_is_refused(prompt):
  with pytest.raises(ValueError, match=f"a prompt of {len(prompt)} tokens does not fit length=3"):
    batching.prompt_batches([prompt], length=3, batch_size=1, seed=0, vocab_size=VOCAB)


def packed(sequences, *, length, splits=False, batch_size=1, seed=0, **shards):
  """Batches of rows; a sequence is (prompt, response), or a document."""
  encoded = [
    Encoded([*one[0], *one[1], EOS], len(one[0]))
    if isinstance(one, tuple)
    else Encoded([*one, EOS])
    for one in sequences
  ]
  rows = micro.in_memory(encoded, VOCAB).pack(length, VOCAB, splits=splits)
  return batching.packed_batches(rows, batch_size=batch_size, seed=seed, **shards)


def test_details_10_sft_loss_is_on_the_response_and_its_eos_only():
  batch = next(packed([([5, 6, 7], [8, 9])], length=8))
  np.testing.assert_array_equal(batch.token_BL, [[5, 6, 7, 8, 9, EOS, VOCAB, VOCAB]])
  np.testing.assert_array_equal(batch.weight_BL, [[0, 0, 0, 1, 1, 1, 0, 0]])
  np.testing.assert_array_equal(batch.segment_BL, [[1, 1, 1, 1, 1, 1, 0, 0]])


def test_an_epoch_of_sft_holds_every_demonstration_once():
  batches = packed([([10 + i], [5] * (i % 4)) for i in range(50)], length=8, seed=3)
  seen = []
  for _ in range(batches.steps_per_epoch):
    batch = next(batches)
    seen += batch.token_BL[(batch.position_BL == 0) & (batch.segment_BL > 0)].tolist()
  assert sorted(seen) == [10 + i for i in range(50)]


def test_sft_rows_must_hold_the_longest_demonstration():
  with pytest.raises(ValueError, match="a sequence of 6 tokens does not fit rows of length=5"):
    packed([([5, 6, 7], [8, 9])], length=5)


def test_lm_documents_end_in_eos_and_are_split_over_rows():
  batches = packed([list(range(10, 20)), [40, 41]], length=4, splits=True)
  # 11 tokens in 4 + 4 + 3, and 3 that open a fourth row.
  assert batches.steps_per_epoch == 4
  rows = [next(batches) for _ in range(4)]
  tokens = sorted(row.token_BL[0].tolist() for row in rows)
  assert tokens == [
    [10, 11, 12, 13],
    [14, 15, 16, 17],
    [18, 19, EOS, VOCAB],
    [40, 41, EOS, VOCAB],
  ]
  # A piece's first token has nothing before it, so no loss.
  assert sum(row.weight_BL.sum() for row in rows) == 3 + 3 + 2 + 2


def ranking(number, *responses):
  return RankingTokens(
    [10 + number], [list(r) for r in responses], [2, 1, 1][: len(responses)], "x"
  )


def test_details_12_a_ranked_batch_by_hand():
  batch = batching.ranked_batch(
    [ranking(0, [5, EOS], [6, 7, EOS]), ranking(1, [5, EOS], [6, EOS], [8, 8, 8])],
    max_responses=3, length=5, vocab_size=VOCAB,
  )  # fmt: skip
  np.testing.assert_array_equal(
    batch.token_SL,
    [
      *([10, 5, EOS, 90, 90], [10, 6, 7, EOS, 90], [90] * 5),
      *([11, 5, EOS, 90, 90], [11, 6, EOS, 90, 90], [11, 8, 8, 8, 90]),
    ],
  )
  np.testing.assert_array_equal(batch.segment_SL, batch.token_SL != VOCAB)
  np.testing.assert_array_equal(batch.last_BC, [[2, 5 + 3, 0], [15 + 2, 20 + 2, 25 + 3]])
  np.testing.assert_array_equal(batch.rank_BC, [[2, 1, 0], [2, 1, 1]])
  np.testing.assert_array_equal(batch.is_answer_BC, [[True, True, False], [True, True, True]])
  assert all(x.dtype == np.int32 for x in (batch.token_SL, batch.segment_SL, batch.last_BC))
  assert batch.rank_BC.dtype == np.int32


def test_answers_that_share_rows_by_hand():
  rankings = [ranking(0, [5, EOS], [6, 7, EOS]), ranking(1, [5, EOS], [6, EOS], [8, 8, 8])]
  form = functools.partial(batching.ranked_batch, max_responses=3, length=8, vocab_size=VOCAB)
  batch = form(rankings, num_rows=3)
  # 4 and 4 tokens, the longest, fill a row; of the three of 3, two fill up the next.
  np.testing.assert_array_equal(
    batch.token_SL,
    [
      [10, 6, 7, EOS, 11, 8, 8, 8],
      [10, 5, EOS, 11, 5, EOS, 90, 90],
      [11, 6, EOS, 90, 90, 90, 90, 90],
    ],
  )
  np.testing.assert_array_equal(
    batch.segment_SL, [[1] * 4 + [2] * 4, [1] * 3 + [2] * 3 + [0] * 2, [1] * 3 + [0] * 5]
  )
  np.testing.assert_array_equal(batch.last_BC, [[8 + 2, 3, 0], [8 + 5, 16 + 2, 7]])
  np.testing.assert_array_equal(batch.rank_BC, [[2, 1, 0], [2, 1, 1]])
  with pytest.raises(
    ValueError, match="a batch of rankings needs 3 rows, and num_rows=2"
  ) as raised:
    form(rankings, num_rows=2)
  assert type(raised.value) is ValueError  # a programmer's mistake


def test_the_fullest_batch_says_how_many_rows_are_needed():
  # Three answers of 4 tokens need 3 rows of 5, those of 2 tokens share one; batches of one prompt.
  rankings = [ranking(0, [5, EOS]), ranking(1, [5, 6, EOS], [7, 7, EOS], [8, 8, EOS])]
  rankings += [ranking(i, [EOS], [EOS]) for i in range(2, 5)]
  needed = functools.partial(batching.rows_needed, rankings, length=5, num_epochs=1)
  assert needed(batch_size=1, seed=0) == 3
  # All at once: three rows of 4, one of 3 + 2, two of 2 + 2, and one of 2.
  assert needed(batch_size=5, seed=0) == 7
  kwargs = dict(max_responses=3, length=5, seed=3, vocab_size=VOCAB)
  num_rows = needed(batch_size=2, seed=3)
  batches = batching.ranking_batches(rankings, batch_size=2, num_rows=num_rows, **kwargs)
  used = [np.sum(np.any(next(batches).segment_SL, axis=1)) for _ in range(3)]
  assert max(used) == num_rows > min(used)


def test_a_prompt_that_several_answers_are_sampled_to_stands_in_consecutive_rows():
  prompts = [[i] for i in range(6)]
  kwargs = dict(length=1, batch_size=6, seed=4, vocab_size=VOCAB, repeats=3)
  batches = batching.prompt_batches(prompts, **kwargs)
  seen = [next(batches) for _ in range(3)]
  assert batches.steps_per_epoch == 3
  for batch in seen:
    token_NK = batch.token_BP.reshape(2, 3)
    assert (token_NK == token_NK[:, :1]).all()
    assert batch.index_B.tolist() == [*range(6)]  # each answer draws noise of its own
  assert sorted(np.concatenate([batch.token_BP[::3, 0] for batch in seen])) == [*range(6)]
  mine = next(batching.prompt_batches(prompts, **kwargs, places=[2, 3, 5]))
  np.testing.assert_array_equal(mine.token_BP, seen[0].token_BP[[2, 3, 5]])
  assert mine.index_B.tolist() == [2, 3, 5]


def test_groups_of_prompts_share_no_rows():
  """Prompts of three, one, one and one answers of 3, 2, 2 and 2 tokens, in rows of 5."""
  rankings = [ranking(0, [5, EOS], [6, EOS], [7, EOS])]
  rankings += [ranking(i, [EOS]) for i in (1, 2, 3)]
  kwargs = dict(max_responses=3, length=5, vocab_size=VOCAB)
  together = batching.ranked_batch(rankings, num_rows=3, **kwargs)
  assert (together.segment_SL.max(axis=1) > 1).all()  # 3 + 2 three times
  apart = batching.ranked_batch(rankings, num_rows=6, num_groups=2, **kwargs)
  # The first group has 3, 3 and 3 + 2; the second 2 + 2 and rows that stay empty.
  assert np.sum(apart.segment_SL > 0, axis=1).tolist() == [5, 3, 3, 4, 0, 0]
  read = apart.token_SL.reshape(-1)[apart.last_BC]
  assert set(read[apart.is_answer_BC]) == {EOS}
  np.testing.assert_array_equal((apart.last_BC // (3 * 5))[apart.is_answer_BC], [0, 0, 0, 0, 1, 1])
  needs = functools.partial(batching.rows_needed, rankings, length=5, batch_size=4, seed=0)
  assert (needs(num_epochs=1), needs(num_epochs=1, num_groups=4)) == (3, 12)
  with pytest.raises(ValueError, match="needs 6 rows, and num_rows=4"):
    batching.ranked_batch(rankings, num_rows=4, num_groups=2, **kwargs)


def test_a_process_takes_its_own_rows_and_prompts():
  rankings = [ranking(i, [5, EOS], [6, 7, EOS]) for i in range(4)]
  kwargs = dict(max_responses=2, length=8, batch_size=4, num_rows=6, seed=0, vocab_size=VOCAB)
  whole = next(batching.ranking_batches(rankings, **kwargs))
  mine = next(batching.ranking_batches(rankings, places=([1, 4, 5], [0, 3]), **kwargs))
  for name in ("token_SL", "segment_SL"):
    np.testing.assert_array_equal(getattr(mine, name), getattr(whole, name)[[1, 4, 5]])
  for name in ("last_BC", "rank_BC", "is_answer_BC"):
    np.testing.assert_array_equal(getattr(mine, name), getattr(whole, name)[[0, 3]])
  kwargs |= dict(share_prompts=True)
  whole = next(batching.ranking_batches(rankings, **kwargs))
  mine = next(batching.ranking_batches(rankings, places=([1, 4, 5], [0, 3]), **kwargs))
  assert isinstance(mine.segment_SL, Trees)
  for name, own in vars(mine.segment_SL).items():
    np.testing.assert_array_equal(own, getattr(whole.segment_SL, name)[[1, 4, 5]])


def test_answers_that_share_a_prompt_need_fewer_rows_and_end_where_it_is_said():
  """A prompt of a token with answers of 2, 2 and 3, another with answers of 1 and 4; rows of 8."""
  rankings = [ranking(0, [5, EOS], [6, EOS], [7, 8, EOS]), ranking(1, [EOS], [5, 6, 7, EOS])]
  kwargs = dict(length=8, num_groups=2)
  needed = functools.partial(batching.rows_needed, rankings, batch_size=2, seed=0, num_epochs=1)
  assert (needed(**kwargs), needed(**kwargs, share_prompts=True)) == (4, 2)
  batch = batching.ranked_batch(
    rankings, max_responses=3, vocab_size=VOCAB, num_rows=2, share_prompts=True, **kwargs
  )
  np.testing.assert_array_equal(
    batch.token_SL, [[10, 5, EOS, 6, EOS, 7, 8, EOS], [11, EOS, 5, 6, 7, EOS, 90, 90]]
  )
  np.testing.assert_array_equal(batch.last_BC, [[2, 4, 7], [8 + 1, 8 + 5, 0]])
  np.testing.assert_array_equal(batch.segment_SL.position_BL[0], [0, 1, 2, 1, 2, 1, 2, 3])
  np.testing.assert_array_equal(batch.segment_SL.last_BL[1], [5, 1, 5, 5, 5, 5, -1, -1])


def test_ranking_batches_hold_every_ranking_once_an_epoch():
  rankings = [ranking(i, [5, EOS], [6, EOS]) for i in range(6)]
  kwargs = dict(length=4, batch_size=2, seed=0, vocab_size=VOCAB)
  batches = batching.ranking_batches(rankings, max_responses=2, **kwargs)
  seen = [token for _ in range(3) for token in next(batches).token_SL[::2, 0].tolist()]
  assert sorted(seen) == [10 + i for i in range(6)]
  with pytest.raises(ValueError, match="has 2 ranked responses; raise rm.max_responses=1"):
    batching.ranking_batches(rankings, max_responses=1, **kwargs)


# Length filters.


# Order, epochs, processes.


@pytest.mark.parametrize(("count", "batch_size"), [(8, 4), (7, 4), (7, 3), (3, 8), (1, 2), (5, 5)])
def test_every_pass_holds_every_row_exactly_once(count, batch_size):
  batches = prompt_batches(count, batch_size)
  assert batches.steps_per_epoch == -(-count // batch_size)
  stream = np.concatenate(drawn(batches, 4 * batches.steps_per_epoch))
  for start in range(0, len(stream) - count + 1, count):
    assert sorted(stream[start : start + count]) == list(range(count))


def test_passes_and_seeds_differ_and_a_seed_repeats():
  first, again, other = (drawn(prompt_batches(64, 64, seed), 3) for seed in (0, 0, 1))
  assert first == again
  orders = [tuple(order) for order in first + other]
  assert len(set(orders)) == 6
  assert tuple(range(64)) not in orders


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_together_draw_what_one_draws(process_count):
  alone = prompt_batches(7, 4)
  order = [2, 0, 3, 1]  # rows of a process need not be neighbours
  places = [sorted(share) for share in np.split(np.array(order), process_count)]
  shares = [prompt_batches(7, 4, places=own) for own in places]
  back = np.argsort(np.concatenate(places))
  for _ in range(5):
    expected = next(alone)
    joined = jax.tree.map(lambda *rows: np.concatenate(rows)[back], *map(next, shares))
    jax.tree.map(np.testing.assert_array_equal, joined, expected)


def test_packed_rows_are_shared_out_too():
  documents = [[10 + i] * (1 + i % 5) for i in range(30)]
  kwargs = dict(length=8, batch_size=4, splits=True)
  alone = packed(documents, **kwargs)
  shares = [packed(documents, **kwargs, places=own) for own in ([0, 1, 2], [], [3])]
  for _ in range(4):
    joined = jax.tree.map(lambda *rows: np.concatenate(rows), *map(next, shares))
    jax.tree.map(np.testing.assert_array_equal, joined, next(alone))


def test_a_batch_of_nothing_is_refused():
  with pytest.raises(ValueError, match="batch_size=0 must be positive") as raised:
    prompt_batches(7, 0)
  assert type(raised.value) is ValueError  # a programmer's mistake


def test_no_data_is_refused():
  with pytest.raises(ValueError, match="there is no data"):
    prompt_batches(0)


# Saving the place.


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_restored_iterator_goes_on_exactly(steps):
  batches = prompt_batches()
  drawn(batches, steps)
  state = json.loads(json.dumps(batches.get_state()))
  expected = drawn(batches, 6)
  fresh = prompt_batches()
  fresh.set_state(state)
  assert drawn(fresh, 6) == expected
  batches.set_state(state)  # and back in time
  assert drawn(batches, 6) == expected


def test_a_state_serves_any_number_of_processes():
  batches = prompt_batches()
  drawn(batches, 3)
  share = prompt_batches(places=[2, 3])
  share.set_state(batches.get_state())
  assert share.get_state() == batches.get_state()
  assert drawn(share, 1)[0] == drawn(batches, 1)[0][2:]


@pytest.mark.parametrize(
  ("other", "name"),
  [
    (lambda: prompt_batches(count=8), "rows was 7 when saved and is 8 now"),
    (lambda: prompt_batches(batch_size=2), "batch_size was 4 when saved and is 2 now"),
    (lambda: prompt_batches(seed=1), "seed was 0 when saved and is 1 now"),
    (
      lambda: batching.prompt_batches(
        prompts(7)[::-1], length=3, batch_size=4, seed=0, vocab_size=VOCAB
      ),
      "checksum was",
    ),
  ],
)
def test_a_state_of_other_data_is_refused(other, name):
  with pytest.raises(ValueError, match=f"cannot resume the data: {name}"):
    other().set_state(prompt_batches().get_state())


def test_the_checksum_sees_packed_tokens_and_rankings():
  def state(token):
    lm = packed([[token]], length=4)
    ranked = batching.ranking_batches(
      [ranking(0, [token], [5])],
      max_responses=2,
      length=4,
      batch_size=1,
      seed=0,
      vocab_size=VOCAB,
    )
    return lm.get_state()["checksum"], ranked.get_state()["checksum"]

  assert state(5) == state(5)
  assert all(a != b for a, b in zip(state(5), state(6), strict=True))


def test_zipped_batches_advance_and_restore_together():
  def zipped():
    return batching.ZippedBatches({"few": prompt_batches(5), "many": prompt_batches(9, 2, seed=1)})

  def draw(batches):
    return [{name: numbers(part) for name, part in next(batches).items()} for _ in range(4)]

  batches = zipped()
  draw(batches)
  state = json.loads(json.dumps(batches.get_state()))
  expected = draw(batches)
  assert expected[0].keys() == {"few", "many"}
  fresh = zipped()
  fresh.set_state(state)
  assert draw(fresh) == expected
  with pytest.raises(ValueError, match=r"saved for \['few'\], now \['few', 'many'\]"):
    fresh.set_state({"few": state["few"]})
