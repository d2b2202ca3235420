"""Trees after a cached past, for every family and on a mesh, beside each text by itself."""

import pytest

from instructjax.core.config import MeshConfig
from instructjax.evaluation import encoding, language_model, planning
from instructjax.parallel import sharding
from tests import tiny
from tests.evaluation import small_models
from tests.evaluation.test_language_model import logits_of, straight

SHOTS = "who sat? the cat.\nwho looked? the cat.\n"
PAIRS = [
  (SHOTS + question, ending)
  for question in ("who is sand?", "what is the hill by the sea made of?", "who?")
  for ending in (" the cat", " the mat", " a hill", " the sea and sand")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("model")


@pytest.fixture
def small_rows(monkeypatch):
  """Rows so short that what all texts share does not fit with them."""
  monkeypatch.setattr(planning, "ROW", 40)
  monkeypatch.setattr(planning, "SAVED", 4)
  monkeypatch.setattr(planning, "CACHED", 4)


def require_equal(one):
  results = language_model.log_probs(one, PAIRS)
  for pair, result in zip(PAIRS, results):
    before, after = encoding.pair_ids(one.tokenizer, *pair, one.first_id)
    expected, greedy = straight(one, before, after)
    assert result.log_probs == pytest.approx(expected, abs=3e-5)
    assert result.is_greedy == greedy


FAMILIES = {"gpt2": tiny.GPT2, "llama": tiny.LLAMA} | tiny.FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_after_a_past(folder, small_rows, family):
  one = small_models.language_model(folder, FAMILIES[family], max_length=64)
  texts = []
  for pair in PAIRS:
    before, after = encoding.pair_ids(one.tokenizer, *pair, one.first_id)
    texts.append(planning.Text((*before, *after[:-1]), len(before) - 1, tuple(after)))
  groups = planning.groups(texts)
  assert max(len(group.past) for group in groups) > 10
  assert max(len(tree.texts) for group in groups for tree in group.trees) > 1
  require_equal(one)


def test_on_a_mesh_of_several_devices(folder, small_rows):
  mesh = sharding.make_mesh(MeshConfig(slice=1, data=2, fsdp=2, tensor=2))
  require_equal(small_models.language_model(folder, mesh=mesh, max_length=64))


def test_a_result_does_not_depend_on_what_is_asked_beside_it(folder):
  one = small_models.language_model(folder, max_length=64)
  together = language_model.log_probs(one, PAIRS)
  alone = language_model.log_probs(one, PAIRS[5:6])
  assert alone[0].log_probs == pytest.approx(together[5].log_probs, abs=1e-5)


def test_long_rows_attend_in_parts(folder, monkeypatch):
  from instructjax.models import branches

  monkeypatch.setattr(branches, "QUERIES", 16)  # in rows of 64
  require_equal(small_models.language_model(folder, seed=5, max_length=64))


def test_rewards_of_answers_to_one_prompt_share_its_columns(folder):
  judge = small_models.language_model(folder, head="scalar", max_length=64)
  for pair, reward in zip(PAIRS, language_model.rewards(judge, PAIRS)):
    words = judge.tokenizer
    ids = [*words.encode(pair[0]), *words.encode(pair[1]), words.eos_id]
    assert reward == pytest.approx(logits_of(judge, ids)[-1], abs=3e-5)
