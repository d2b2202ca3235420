"""TL;DR: summaries of posts, scored with ROUGE-L. App. D, Fig. 27."""

from instructjax.evaluation.metrics import rouge
from instructjax.evaluation.task import Metric, Prompt, Row, Task, each
from instructjax.evaluation.tasks.cnn_dm import Item, ask, score


def parse(row: Row) -> Item:
  """An item of OpenAI's file (`post`, `summary`) or of Webis' (`content`)."""
  return Item(row.text("post", "content").strip(), row.text("summary").strip())


TASK = Task(
  title="TL;DR",
  files=("tldr*/*test*", "tldr*test*", "tldr*/*val*"),
  read=each(parse),
  group=lambda item: item.text,
  prompts={"zero_shot": Prompt("0-shot", ask, ("rouge_l",))},
  metrics=(Metric("rouge_l", "ROUGE-L", "share", 1),),
  score=score,
  require=rouge.require,
)
