"""The Winograd schemas with two sentences each, asked as Winogrande is. The paper's WSC is another task: wsc.py."""

from instructjax.evaluation import choosing
from instructjax.evaluation.task import Prompt, Task, each
from instructjax.evaluation.tasks.winogrande import ask, parse, score

TASK = Task(
  title="Winograd",
  files=("winograd_wsc*.jsonl", "wsc273*"),
  read=each(parse),
  group=lambda item: item.starts[0],
  prompts={"harness": Prompt("as lm-eval", ask, ("acc",))},
  metrics=choosing.METRICS,
  score=score,
)
