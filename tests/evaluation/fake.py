"""A model that is a table: log-probabilities by continuation and answers by prompt."""

import dataclasses
from collections.abc import Callable, Mapping

from instructjax.evaluation import runner
from instructjax.evaluation.task import Choice, Choices


def choice(*log_probs: float, is_cut: bool = False) -> Choice:
  """A continuation whose tokens have these log-probabilities."""
  return Choice(
    sum(log_probs), log_probs, tuple(f"t{i}" for i in range(len(log_probs))), False, is_cut
  )


@dataclasses.dataclass
class Fake:
  """Counts what it is asked, and stops when it is told to.

  Attributes:
    log_prob_of: a continuation -> the log-probabilities of its tokens.
    answers: prompt -> answer; every other prompt is answered with `answer`.
    stop_after: raise KeyboardInterrupt after so many results.
    fit: of everything that is asked.
    asked: how many results it has given.
    opened: how often it was loaded.
  """

  log_prob_of: Callable[[str], tuple[float, ...]] = lambda text: (-1.0 * len(text),)
  answers: Mapping[str, str] = dataclasses.field(default_factory=dict)
  answer: str = "nothing"
  stop_after: int = 10**9
  fit: Callable = lambda ask: "whole"
  asked: int = 0
  opened: int = 0

  def model(self, name: str = "fake", checksum: str = "1") -> runner.Model:
    def open_():
      self.opened += 1
      return runner.Engine(self._log_probs, self._generate, self.fit)

    return runner.Model(name, checksum, open_)

  def _give(self, told, number, result):
    if self.asked == self.stop_after:
      raise KeyboardInterrupt
    self.asked += 1
    told(number, result)

  def _log_probs(self, pairs, told):
    # Backwards, as a model that sorts by length may answer in any order.
    for number in reversed(range(len(pairs))):
      self._give(told, number, choice(*self.log_prob_of(pairs[number][1])))

  def _generate(self, questions, told):
    for number, question in enumerate(questions):
      assert not isinstance(question, Choices)
      self._give(told, number, self.answers.get(question.prompt, self.answer))
