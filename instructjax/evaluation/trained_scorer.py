"""A scorer trained by this project: a reward model, what its scores mean as probabilities, and how good it is.

Called by commands/train_scorer.py, which trains the reward model by the pipeline, and by scorers.py.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from instructjax.core import foreign
from instructjax.core.errors import UserError, writing
from instructjax.evaluation import labelled, language_model, platt
from instructjax.evaluation.labelled import Labelled
from instructjax.evaluation.language_model import LanguageModel

FILE = "scorer.json"
RUN = "run"  # the folder of the training run, beside the file


@dataclasses.dataclass(frozen=True)
class Card:
  """What is known of a trained scorer: the content of scorer.json.

  Attributes:
    what: what it looks for, in the user's words.
    pair: how a prompt and its answer become a text, with {prompt} and {answer}.
    slope, offset: the probability of a score is sigmoid(slope * score + offset).
    threshold: labels from here on are positive.
    auc: area under the ROC curve on texts that were neither trained on nor calibrated with.
    accuracy: share of these that a probability of one half gets right.
    majority: share of the more frequent class among these.
    num_train, num_test: texts.
  """

  what: str
  pair: str
  slope: float
  offset: float
  threshold: float
  auc: float
  accuracy: float
  majority: float
  num_train: int
  num_test: int

  @property
  def line(self) -> str:
    """One line about how good it is."""
    return (
      f"{self.what}: AUC {self.auc:.3f}, accuracy {self.accuracy:.3f} (majority class {self.majority:.3f})"
      f" on {self.num_test} held-out texts; trained on {self.num_train}"
    )


def require_classes(texts: Sequence[Labelled], threshold: float):
  """Refuses labels of which nothing can be learnt or told.

  Raises:
    UserError: a part of the texts has but one class.
  """
  for part in ("train", "calibration", "test"):
    found = [one.value >= threshold for one in texts if one.part == part]
    if len({*found}) < 2:
      raise UserError(
        f"of {len(texts)} labelled texts, {len(found)} belong to the part for {part}, and these must have labels below"
        f" and from --threshold={threshold} on; give more texts, or another threshold"
      )


def scores(model: LanguageModel, texts: Sequence[str]) -> np.ndarray:
  """The reward model's scores of texts, before calibration. What is too long loses its beginning."""
  fitting = [_end(model, text) for text in texts]
  pairs = [(labelled.PROMPTS[0], text) for text in fitting]
  return np.array(language_model.rewards(model, pairs))


def _end(model: LanguageModel, text: str) -> str:
  """The end of a text, as much as the model reads at once; EOS needs a token too."""
  while (size := len(model.tokenizer.encode(text))) > model.max_length - 1:
    text = text[-(len(text) * (model.max_length - 1) // (size + 1)) :]
  return text


def measure(
  model: LanguageModel, texts: Sequence[Labelled], threshold: float, what: str, pair: str
) -> Card:
  """Calibrates a trained reward model on one part of the held-out texts, and measures it on the other."""
  parts: dict[str, list[Labelled]] = {"train": [], "calibration": [], "test": []}
  for one in texts:
    parts[one.part].append(one)
  fit, test = parts["calibration"], parts["test"]
  score_N = scores(model, [one.text for one in fit + test])
  positive_N = np.array([one.value >= threshold for one in fit + test])
  slope, offset = platt.fit(score_N[: len(fit)], positive_N[: len(fit)])
  score_N, positive_N = score_N[len(fit) :], positive_N[len(fit) :]
  right_N = (platt.probability(score_N, slope, offset) >= 0.5) == positive_N
  share = float(positive_N.mean())
  return Card(
    what=what,
    pair=pair,
    slope=slope,
    offset=offset,
    threshold=threshold,
    auc=platt.auc(score_N, positive_N),
    accuracy=float(right_N.mean()),
    majority=max(share, 1 - share),
    num_train=len(parts["train"]),
    num_test=len(test),
  )


def write(card: Card, folder: pathlib.Path):
  """Writes scorer.json, without which a folder is no scorer."""
  path = folder / FILE
  with writing(path):
    path.write_text(json.dumps(dataclasses.asdict(card), indent=2) + "\n", encoding="utf-8")


def read(folder: pathlib.Path) -> Card:
  """Reads scorer.json.

  Raises:
    UserError: it cannot be read, or is none.
  """
  found: dict[str, Any] = foreign.read_json(folder / FILE)
  try:
    card = Card(**found)
    card.pair.format(prompt="", answer="")
    platt.probability(np.zeros(1), card.slope, card.offset)
    return card
  except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
    raise UserError(
      f"{folder / FILE} is not what train_scorer writes; train the scorer anew"
    ) from error


def text_of(card: Card, item: str | tuple[str, str]) -> str:
  """The text that is scored for an item."""
  if isinstance(item, str):
    return item
  prompt, answer = item
  return card.pair.format(prompt=prompt, answer=answer)


def probabilities(
  card: Card, model: LanguageModel, items: Sequence[str | tuple[str, str]]
) -> list[float]:
  """The probability of each item to be positive."""
  score_N = scores(model, [text_of(card, item) for item in items])
  return platt.probability(score_N, card.slope, card.offset).tolist()
