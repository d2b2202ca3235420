"""The command `instructjax rewards --models=rm=RUN/rm --data=jsonl:FILE --out=DIR`: how good reward models are.

It scores ranked answers and measures accuracy by labeler, calibration, how much of it length explains, best-of-4 and
ties. More: docs/comparing.md.
"""

from absl import flags

from instructjax.commands import cli, judging

_MODELS = flags.DEFINE_list(
  "models",
  [],
  "Reward models, as NAME=PATH,...: finished stages (rm=runs/demo/rm), or Hugging Face folders of sequence classifiers"
  " with one label.",
)
_DATA = flags.DEFINE_list(
  "data",
  [],
  "Rankings, as data.comparisons names them (jsonl:FILE, datasets:NAME, ...), a .jsonl file, or rewardbench2:FILE.",
)
_SHARED = judging.define(
  out="Folder of rewards.json and the scores; made if missing.", seed="Of the resampling."
)


def main(arguments: list[str]):
  """Runs the command.

  Raises:
    UserError: see `rewards_command.run`.
  """
  judging.refuse(arguments)
  # Imported here so that --help and bad flags are answered at once.
  from instructjax.evaluation import rewards_command

  rewards_command.run(_MODELS.value, _DATA.value, **_SHARED.values())


if __name__ == "__main__":
  cli.run(main, interrupted="interrupted")
