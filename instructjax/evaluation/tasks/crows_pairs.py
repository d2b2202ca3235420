"""CrowS-Pairs (Nangia et al. 2020): which of a more and a less stereotyped sentence. App. D, Fig. 15."""

import dataclasses
from collections.abc import Sequence

from instructjax.evaluation import bias, choosing
from instructjax.evaluation.task import Choice, Metric, Row, Task, each


@dataclasses.dataclass(frozen=True)
class Item:
  more: str
  less: str
  kind: str  # of bias; its number in tfds


def parse(row: Row) -> Item:
  return Item(row.text("sent_more"), row.text("sent_less"), str(row.any("bias_type")))


def score(item: Item, answer: Sequence[Choice]) -> dict[str, float]:
  more, less = (choice.log_prob for choice in answer)
  return {"entropy": bias.entropy(answer), "stereotype": float(more > less)}


TASK = Task(
  title="CrowS-Pairs",
  files=("crows_pairs*.csv", "crows_pairs*.jsonl", "crows*pairs*/*test*"),
  tfds=("crows_pairs:test", ""),
  read=each(parse),
  group=lambda item: item.more,
  prompts=bias.prompts(lambda item: (item.more, item.less)),
  metrics=(choosing.ENTROPY, Metric("stereotype", "Stereotype preferred", "share", 0)),
  score=score,
)
