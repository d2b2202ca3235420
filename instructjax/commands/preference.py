"""The command `instructjax preference --answers=RUN --judges=rm=RUN/rm --out=DIR`: who is preferred to whom.

Nothing is trained or sampled: it judges answers that lie in a file. More: docs/comparing.md.
"""

from absl import flags

from instructjax.commands import cli, judging

_ANSWERS = flags.DEFINE_string(
  "answers",
  "",
  "A run's folder, its evaluate/answers.jsonl, or a jsonl file with prompt, model and answer in each row, and perhaps"
  " metadata, an object with what a labeler noted.",
)
_JUDGES = flags.DEFINE_list(
  "judges",
  [],
  "Who judges: rm=PATH, judge=python:MODULE:FUNCTION, people=jsonl:FILE of rankings, and for the task demo:"
  " gold=demo: or labelers=demo:.",
)
_BASELINE = flags.DEFINE_string(
  "baseline", "", "The policy beside which tables show the others; by default sft."
)
_SHARED = judging.define(
  out="Folder of preference.json; made if missing.",
  seed="Of the resampling and of simulated labelers.",
)


def main(arguments: list[str]):
  """Runs the command.

  Raises:
    UserError: see `preference_command.run`.
  """
  judging.refuse(arguments)
  # Imported here so that --help and bad flags are answered at once.
  from instructjax.evaluation import preference_command

  preference_command.run(_ANSWERS.value, _JUDGES.value, _BASELINE.value, **_SHARED.values())


if __name__ == "__main__":
  cli.run(main, interrupted="interrupted")
