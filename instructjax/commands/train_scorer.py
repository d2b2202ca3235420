r"""The command `python -m instructjax train_scorer --data=FILE --text=KEY --label=KEY --out=DIR`.

It trains a scorer of text from labelled texts: a reward model that ranks them, by the pipeline as it is. More:
docs/evaluation.md.
"""

import pathlib
import subprocess
import sys

from absl import flags

from instructjax.commands import cli
from instructjax.core import places
from instructjax.core.errors import UserError

_DATA = flags.DEFINE_multi_string("data", [], "Labelled texts: JSON lines, CSV, TSV or parquet.")
_TEXT = flags.DEFINE_multi_string("text", ["text"], "Key of the text, as text or prompt.text.")
_LABEL = flags.DEFINE_multi_string(
  "label", ["label"], "Key of its label, a number, true, false, yes or no; one for each --text."
)
_OUT = flags.DEFINE_string("out", None, "Folder of the scorer.", required=True)
_WHAT = flags.DEFINE_string("what", "score", "What the scorer looks for, as toxicity.")
_THRESHOLD = flags.DEFINE_float("threshold", 0.5, "Labels from here on are positive.")
_GROUP = flags.DEFINE_string(
  "group", "", "Pattern whose match in a text names its group, which is never split: '^Q: .*'."
)
_PAIR = flags.DEFINE_string(
  "pair", "{prompt}{answer}", r"How a prompt and its answer become a text; \n is a newline."
)
_WEIGHTS = flags.DEFINE_string(
  "weights",
  None,
  "Model to train adapters on, as package:NAME/FILE; without it, a small one is trained from nothing.",
)
_PASSES = flags.DEFINE_integer(
  "passes", None, "How often each text is trained on: 8 times by default, and 2 with --weights."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the order of texts and of the training.")

# A text is a line or two.
_SETTINGS = (
  "data.prompts=",
  "data.max_prompt_length=8",
  "data.max_response_length=120",
  "rm.row_length=256",
  "rm.batch_size=16",
  "rm.cross_validation_folds=0",
)
# Without weights: small enough for a few minutes on two cores.
_SMALL = (
  "model.max_length=160",
  "reward_model.num_layers=2",
  "reward_model.d_model=96",
  "reward_model.head_dim=48",
  "reward_model.max_length=160",
  "pretrain.num_steps=100",
  "pretrain.evaluate_every=100",
  "sft.length=128",
  "ppo_init.length=128",
)
# With weights: a model of 135M parameters takes half an hour for 5,000 texts of a line on two cores.
_ADAPTERS = (
  "rm.microbatches=4",
  "rm.optim.learning_rate=2e-5",  # times adapter.rate_factor
  "adapter.rank=16",
  "adapter.alpha=32",
)


def main(arguments: list[str]):
  """Runs the command.

  Args:
    arguments: what stands after `--`, for the run: `-- --config.rm.batch_size=32`.
  Raises:
    UserError: a flag or a row is wrong, or the training fails.
  """
  if not _DATA.value:
    raise UserError("--data must name labelled texts, as --data=labelled.jsonl")
  if len(_TEXT.value) != len(_LABEL.value):
    raise UserError(
      f"--text and --label go in pairs, got {len(_TEXT.value)} and {len(_LABEL.value)}"
    )
  passes = (2 if _WEIGHTS.value else 8) if _PASSES.value is None else _PASSES.value
  if passes < 1:
    raise UserError(f"--passes={passes} must be at least 1")
  pair = _PAIR.value.replace(r"\n", "\n")
  try:
    pair.format(prompt="", answer="")
  except (KeyError, IndexError, ValueError) as error:
    raise UserError(f"--pair={_PAIR.value!r} must hold {{prompt}} and {{answer}} only") from error
  out = pathlib.Path(places.require(_OUT.value, "--out")).absolute()
  # Imported here so that --help and bad flags are answered at once.
  from instructjax.evaluation import labelled, trained_scorer

  fields = list(zip(_TEXT.value, _LABEL.value))
  texts = [
    one
    for spec in _DATA.value
    for one in labelled.read(places.expand_source(spec, "--data"), fields, _GROUP.value)
  ]
  trained_scorer.require_classes(texts, _THRESHOLD.value)
  train = [one for one in texts if one.part == "train"]
  labelled.write(train, out / "data", passes, _SEED.value)
  _train(out, arguments)
  _measure(out, texts, pair)


def _train(out: pathlib.Path, arguments: list[str]):
  """Runs the stages up to the reward model; a run that was stopped goes on."""
  from instructjax.evaluation import labelled, trained_scorer

  kinds = ("documents", "comparisons", "demonstrations")
  settings = [f"data.{kind}=jsonl:{out / 'data' / kind}.jsonl" for kind in kinds]
  settings += [*_SETTINGS, f"rm.max_responses={labelled.RANKED}", f"seed={_SEED.value}"]
  config = "rm"
  if _WEIGHTS.value:
    config = "rm:weights"
    settings += [*_ADAPTERS, f"reward_model.weights={_WEIGHTS.value}"]
  else:
    settings += _SMALL
  command = [sys.executable, "-m", "instructjax.main", f"--config={config}"]
  command += [f"--workdir={out / trained_scorer.RUN}", *(f"--config.{one}" for one in settings)]
  done = subprocess.run([*command, *arguments])
  if done.returncode:
    raise UserError(
      f"the training of {out / trained_scorer.RUN} ended with code {done.returncode}; what it said is above"
    )


def _measure(out: pathlib.Path, texts, pair: str):
  import jax

  from instructjax.core.config import MeshConfig
  from instructjax.evaluation import language_model, trained_scorer
  from instructjax.parallel import sharding

  mesh = sharding.make_mesh(MeshConfig(slice=1, data=1, fsdp=1, tensor=1), jax.devices()[:1])
  model = language_model.open_reward_model(str(out / trained_scorer.RUN / "rm"), mesh)
  card = trained_scorer.measure(model, texts, _THRESHOLD.value, _WHAT.value, pair)
  trained_scorer.write(card, out)
  print(card.line)
  print(f"written: {out}; use it as --scorers=NAME={out}")


if __name__ == "__main__":
  cli.run(main, interrupted="interrupted: the same command goes on")
