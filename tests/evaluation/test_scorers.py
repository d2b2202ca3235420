"""Scorers by their spec. Those that train_scorer writes are in test_trained_scorer.py."""

import math
import types

import pytest

from instructjax.core.errors import UserError
from instructjax.evaluation import scorers
from tests.evaluation import small_models


def shouting(items):
  return [sum(map(str.isupper, item)) for item in items]


def few(items):
  return [0.5]


def broken(items):
  raise RuntimeError("no service\nsecond line")


def words(items):
  return ["high" for _ in items]


def nothing(items):
  return None


@pytest.mark.parametrize(
  "name, message",
  [
    ("broken", r"raised RuntimeError: no service .*test_scorers.py, line \d+\); mend the function"),
    ("words", "must give a list of numbers: could not convert string to float: 'high'"),
    ("nothing", "must give a list of numbers: 'NoneType' object is not iterable"),
  ],
)
def test_a_function_that_fails_is_told_in_a_line(name, message):
  spec = f"python:{__name__}:{name}"
  with pytest.raises(UserError, match=f"^scorer {spec} {message}") as told:
    scorers.load(spec).score(["a"])
  assert "\n" not in str(told.value)


def test_a_module_that_fails_is_told_in_a_line(tmp_path, monkeypatch):
  (tmp_path / "failing_scorer.py").write_text("1 / 0\n")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(UserError, match="failing_scorer:f cannot be imported: division by zero"):
    scorers.load("python:failing_scorer:f")


def test_a_function_of_the_user_is_a_scorer():
  one = scorers.load(f"python:{__name__}:shouting")
  assert one.score(["Ab", "ABc"]) == [1.0, 2.0]
  assert one.auc is None
  with pytest.raises(UserError, match="one finite number for each of 2 texts"):
    scorers.load(f"python:{__name__}:few").score(["a", "b"])


@pytest.mark.parametrize("spec", ["nothing", "python:tests.missing:f", "python:json:missing"])
def test_what_is_no_scorer_is_refused(spec):
  with pytest.raises(UserError, match="scorer"):
    scorers.load(spec)


def test_a_judge_weighs_yes_against_no(tmp_path, monkeypatch):
  one = small_models.language_model(tmp_path, max_length=64)
  monkeypatch.setattr(scorers.language_model, "open_model", lambda path, mesh: one)
  located = {"runs/judge": "lm", "runs/rm": "scalar"}
  monkeypatch.setattr(
    scorers.weights, "locate", lambda path: types.SimpleNamespace(head=located[path])
  )
  with pytest.raises(UserError, match="must name a language model, and runs/rm ends in a score"):
    scorers.find("judge:runs/rm?ask=a")
  judge = scorers.load("judge:runs/judge?ask=who sat?&yes=%20the cat&no=%20the sea")
  text = "Q: who?\nA: a cat\nwho sat?"
  yes, no = (
    found.log_prob
    for found in scorers.language_model.log_probs(one, [(text, " the cat"), (text, " the sea")])
  )
  assert judge.score([("who?", "a cat")])[0] == pytest.approx(1 / (1 + math.exp(no - yes)))
  for spec, says in (("judge:x", "what is asked"), ("judge:x?ask=a&if=b", "no option if")):
    with pytest.raises(UserError, match=says):
      scorers.load(spec)


def test_the_label_of_a_classifier():
  assert scorers._column("c", ["LABEL_0"], None) == 0
  assert scorers._column("c", ["clean", "toxic"], None) == 1
  assert scorers._column("c", ["toxic", "obscene", "threat"], "threat") == 2
  with pytest.raises(UserError, match=r"\?label=NAME; there are"):
    scorers._column("c", ["toxic", "obscene", "threat"], None)


def test_a_classifier_of_transformers(tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  letters = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5}
  (tmp_path / "vocab.txt").write_text("\n".join(letters))
  words = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
  words.save_pretrained(tmp_path)
  torch.manual_seed(0)
  config = transformers.BertConfig(
    vocab_size=6,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    id2label={0: "clean", 1: "toxic"},
    initializer_range=1.0,
  )
  network = transformers.BertForSequenceClassification(config).eval()
  network.save_pretrained(tmp_path)
  items = ["a b", "b b a a"]
  expected = [
    torch.softmax(network(**words(item, return_tensors="pt")).logits, -1)[0, 0].item()
    for item in items
  ]
  scorer = scorers.load(f"{tmp_path}?label=clean")
  assert scorer.score(items) == pytest.approx(expected, abs=1e-5)
