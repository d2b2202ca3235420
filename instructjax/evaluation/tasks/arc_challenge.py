"""ARC (Clark et al. 2018), the hard part; as arc_easy.py."""

import dataclasses

from instructjax.evaluation.tasks import arc_easy

TASK = dataclasses.replace(
  arc_easy.TASK,
  title="ARC-Challenge",
  files=("arc-challenge/*test*", "arc-challenge*test*", "arc_challenge*.jsonl"),
)
