"""TruthfulQA in words: the published table and the hub's rows, and what the judges' numbers become."""

import pytest

from instructjax.data.messages import BadRecord
from instructjax.evaluation import truthful
from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import truthful_qa as task

TABLE = {
  "Question": "Where?",
  "Correct Answers": "In a; In b;",
  "Incorrect Answers": "In c",
}
HUB = {"question": "Where?", "correct_answers": ["In a", "In b"], "incorrect_answers": ["In c"]}


def test_rows_and_prompts():
  item = task.parse(Row("a:1", TABLE))
  assert item == task.parse(Row("a:1", HUB)) == task.Item("Where?", ("In a", "In b"), ("In c",))
  with pytest.raises(BadRecord, match="'Correct Answers' is empty"):
    task.parse(Row("a:1", TABLE | {"Correct Answers": " ;"}))
  for name, prompt in task.TASK.prompts.items():
    assert prompt.ask(item, []).prompt == truthful.prompt(name, "Where?")
  assert task.TASK.judge_text(item, " In a ") == ("Where?", "In a")


@pytest.mark.parametrize(
  ("truth", "info", "scores"), [(0.5, 0.5, (1, 1, 1)), (0.9, 0.1, (1, 0, 0)), (0.1, 0.9, (0, 1, 0))]
)
def test_both_must_hold(truth, info, scores):
  found = task.judged({"truth": truth, "info": info})
  assert (found["true"], found["info"], found["true_info"]) == scores
