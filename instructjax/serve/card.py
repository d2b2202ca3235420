"""The model card of an export: what the model is, how it was made, what was measured, and how to load it.

Called by packaging.py. Every number on the card comes from files of the run: done.json of the stage and of the stages
it started from, and report/findings.json. Whatever they do not say counts as not measured.

This module turns the files into rows of tables. The wording of the card is in templates/card.md.j2.
"""

import dataclasses
import json
import pathlib
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2

from instructjax.core import provenance, results
from instructjax.core.provenance import Provenance
from instructjax.core.stages import STAGES, stage_of_kind
from instructjax.models.interop import SCORE_BIAS
from instructjax.serve import markdown
from instructjax.train import finished
from instructjax.train.weight_places import HUB
from instructjax.train.weights import Weights

# The folders of an absolute path, its last name left out.
_ABSOLUTE = re.compile(r"(?<![\w.~/-])~?/(?:[^/]+/)*")
# The path in an entry of `ppo.rewards` that names a reward model.
_MODEL = re.compile(r"(?<=model:).*", re.DOTALL)
# Tokens of the example's answer by a base, whose training has no limit on answers.
_EXAMPLE_LENGTH = 128


@dataclasses.dataclass(frozen=True)
class Export:
  """Facts of the export that the files of the run do not have.

  Attributes:
    name: name of the exported folder or file.
    format: 'hf', 'gguf' or 'peft'.
    which: which weights of an RL stage: 'ema' (averaged), 'raw' (the last policy) or 'value' (the value network).
    numbers: type of the numbers in the files, as float32, F16 or Q8_0.
    num_parameters: number of the network's parameters, or of an adapter's.
    score_bias: what a user must add to the score that transformers computes. 0 if the architecture stores the bias
      itself, or if there is none.
  """

  name: str
  format: str
  which: str
  numbers: str
  num_parameters: int
  score_bias: float = 0.0


def text(weights: Weights, export: Export) -> str:
  """The text of the card: YAML front matter and Markdown.

  Raises:
    UserError: a file of the run is damaged.
  """
  stage, data, base = weights.stage, _block(weights, "data"), weights.base
  what, where = _what(weights, export.which) if stage else ("", "")
  # For every model of Qwen2's architecture, AutoTokenizer of transformers 5 returns Qwen2's own tokenizer, whatever the
  # folder holds. So the card of such a model names the class that does read the folder.
  is_qwen2 = weights.network.qkv_bias and not weights.network.use_bias
  return _template().render(
    weights=weights,
    export=export,
    stage=stage.name if stage else "",
    run=weights.path.parent.name,
    what=what,
    where=where,
    base=base.removeprefix(HUB) if base.startswith(HUB) else pathlib.Path(base).name,
    base_on_hub=base.removeprefix(HUB).split("@")[0] if base.startswith(HUB) else "",
    facts=_facts(weights, export),
    tokenizer="PreTrainedTokenizerFast" if is_qwen2 else "AutoTokenizer",
    score_bias_key=SCORE_BIAS,
    answer_length=data["max_response_length"] if data else _EXAMPLE_LENGTH,
    data=data,
    **_measured(weights, export),
    sources=_sources(weights) if weights.done else [],
    settings=_settings(weights) if stage else None,
    made=_made(weights) if weights.done else [],
    is_from_labelers=stage is not None and stage.kind in ("rm", "rl"),
  )


def _paragraph(text: str) -> str:
  """On one line, which Markdown readers break as they like."""
  return " ".join(text.split()) + "\n"


def _template() -> jinja2.Template:
  """The card's template. It names for each value of the run how it is to be escaped."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
  )
  functions = (
    markdown.plain,
    markdown.code,
    markdown.cell,
    markdown.quoted,
    markdown.scalar,
    markdown.word,
  )
  environment.filters |= {function.__name__: function for function in functions}
  environment.filters["paragraph"] = _paragraph
  return environment.get_template("card.md.j2")


def _block(weights: Weights, name: str) -> dict[str, Any]:
  """A config block from the stage's fingerprint; {} if the stage does not depend on it."""
  return json.loads(weights.settings.get(f"config.{name}", "{}"))


def _what(weights: Weights, which: str) -> tuple[str, str]:
  """What a stage's weights are, in words, and the section of the paper that describes them."""
  stage = weights.require_stage()
  what, where = stage.what, stage.paper
  if which == "value":
    start = {"reward_model": "a reward model", "policy": "a policy"}[
      _block(weights, "ppo")["value_init"]
    ]
    what, where = f"a value network, trained with PPO from {start}", "sec 3.5, C.4"
  averaged = {"ema": ", averaged over iterations (EMA)", "raw": ", of the last iteration"}
  return what + (averaged.get(which, "") if stage.is_rl else ""), where


def _facts(weights: Weights, export: Export) -> list[tuple[str, Any]]:
  cfg = weights.network
  heads = f"{cfg.num_heads} ({cfg.num_kv_heads}) of {cfg.head_dim}"
  return [
    (
      "layers, width, heads (key/value heads) of size",
      f"{cfg.num_layers}, {cfg.d_model}, {heads}",
    ),
    ("positions, norm, MLP (width)", f"{cfg.position}, {cfg.norm}, {cfg.mlp} ({cfg.d_mlp})"),
    ("context, tokens", cfg.max_length),
    ("vocabulary", weights.tokenizer.vocab_size),
    ("parameters", f"{export.num_parameters:,}"),
    ("numbers in the files", export.numbers),
  ]


def _measured(weights: Weights, export: Export) -> dict[str, Any]:
  """What was measured of the weights, under the names that the template uses; empty values if nothing was."""
  result: dict[str, Any] = {"training": [], "judged_with": "", "policies": None, "findings": []}
  if weights.kind != "stage" or export.which == "value":
    return result
  result["training"] = _from_training(weights.require_done().result)
  run = weights.path.parent
  evaluation = finished.read_done(run / stage_of_kind("evaluate").name)
  if evaluation and _judged(weights, evaluation):
    # The evaluation judged either the averaged policies or the raw ones; the card says so if the export is the other.
    judged = json.loads(evaluation.fingerprint["config.evaluate"])["weights"]
    if weights.require_stage().is_rl and judged != export.which:
      result["judged_with"] = judged
    result["policies"] = _policies(weights, evaluation.result.summary)
    result["findings"] = _findings(run / "report" / "findings.json", weights.head)
  return result


def _judged(weights: Weights, evaluation: finished.Done) -> bool:
  """Whether an evaluation judged these very weights.

  The stage may have been deleted and trained anew since the evaluation, and must not get the old numbers.
  """
  ancestors = _ancestors(weights.path.parent, evaluation)
  seen = {identity for name, identity, _ in ancestors if name == weights.require_stage().name}
  return seen == {weights.require_done().identity}


def _ancestors(run: pathlib.Path, done: finished.Done) -> Iterator[tuple[str, str, finished.Done]]:
  """All stages that a stage started from, nearest first: (name, its identity when it was used, its done.json now).

  A stage may come several times. The line ends at anything without a folder in the run, such as given weights.
  """
  queue = [done]
  for done in queue:  # the list grows meanwhile, by the parents of each stage
    for name, identity in done.fingerprint.items():
      stage = name.removeprefix("parent:")
      parent = finished.read_done(run / stage) if stage != name else None
      if parent:
        queue.append(parent)
        yield stage, identity, parent


def _from_training(result: Any) -> list[tuple[str, str]]:
  """Rows for what the stage itself measured on held-out data: the result in its done.json."""
  rows = []
  if isinstance(result, results.Tuned):
    for epoch in result.epochs:
      losses = {name: loss for name, loss in vars(epoch).items() if name != "step"}
      shown = [f"{name.replace('_', ' ')} {_number(loss)}" for name, loss in losses.items()]
      rows.append((f"step {epoch.step}, nats a token", ", ".join(shown)))
  if isinstance(result, results.Pretrained):
    rows.append(("loss on held-out text, nats a token", _number(result.validation_loss)))
  if isinstance(result, results.RewardModel):
    groups = {"held-out prompts": result.validation, "held-out labelers": result.heldout_labelers}
    for what, judged in groups.items():
      if judged:
        rows.append(
          (
            f"accuracy on pairs of answers, {what}",
            f"{_number(judged.accuracy)} (standard error {_number(judged.accuracy_stderr)},"
            f" {judged.pairs} pairs of {judged.prompts} prompts)",
          )
        )
    if result.demonstration_mean is not None:
      what = "mean score of demonstrations before the bias, which makes it 0"
      rows.append((what, _number(result.demonstration_mean)))
  return rows


def _policies(
  weights: Weights, policies: Mapping[str, Mapping[str, float]]
) -> dict[str, Any] | None:
  """The table of means on held-out prompts, one row per policy; None for a reward model."""
  if weights.head == "scalar":
    return None
  mine = weights.require_stage().require_policy().name
  columns = list(dict.fromkeys(key for row in policies.values() for key in row))
  rows = [
    (
      markdown.bold(name) if name == mine else name,
      *(_number(row[c]) if c in row else "" for c in columns),
    )
    for name, row in policies.items()
  ]
  return {"head": ["policy", *columns], "rows": rows, "has_this": mine in policies}


def _findings(path: pathlib.Path, head: str) -> list[tuple[str, str, str]]:
  """(claim, measured values with intervals, whether it holds); of a reward model only the finding about it.

  An interval belongs to the value in its place, see findings.find.
  """
  if not path.is_file():
    return []
  rows = []
  for finding in json.loads(path.read_text(encoding="utf-8")):
    if head == "scalar" and finding["id"] != "reward_model":
      continue
    measured = [f"{name} {_number(value)}" for name, value in finding["measured"].items()]
    for i, ((low, high), value) in enumerate(
      zip(finding["interval"], finding["measured"].values())
    ):
      shown = f"{_number(low)} to {_number(high)}"
      if None in (low, value, high) or low <= value <= high:
        measured[i] += f" ({shown})"
      else:  # the interval of something else, such as of the difference of two of the values
        measured.append(f"95% interval {shown}")
    holds = {True: "yes", False: "no", None: "cannot be told"}[finding["holds"]]
    rows.append((finding["claim"], ", ".join(measured), holds))
  return rows


def _sources(weights: Weights) -> list[str]:
  return [
    f"{kind} {markdown.code(_source(source.spec))}"
    for kind, source in _provenance(weights).sources.items()
  ]


def _settings(weights: Weights) -> dict[str, Any]:
  """The table of settings: one row per setting, one column per stage, the exported stage first."""
  blocks = _lineage(weights)
  names = list(dict.fromkeys(key for block in blocks.values() for key in block))
  rows = [
    (markdown.code(name), *(block.get(name, "") for block in blocks.values())) for name in names
  ]
  return {"head": ["setting", *blocks], "rows": rows}


def _lineage(weights: Weights) -> dict[str, dict[str, Any]]:
  """Stage -> its settings under dotted names: the exported stage first, then those that it started from."""
  left = weights.require_done()
  own, result = (left.stage, "", left), {}
  for stage, _, done in [own, *_ancestors(weights.path.parent, left)]:
    if stage not in result:
      result[stage] = _flat(json.loads(done.fingerprint[f"config.{STAGES[stage].block}"]))
  return result


def _flat(block: Mapping[str, Any]) -> dict[str, Any]:
  """Nested blocks as dotted names."""
  result = {}
  for name, value in block.items():
    inner = {f"{name}.{k}": v for k, v in _flat(value).items()} if isinstance(value, dict) else None
    if name == "rewards":
      value = [_MODEL.sub(lambda found: pathlib.PurePath(found[0]).name, entry) for entry in value]
    result |= inner or {name: value}
  return result


def _made(weights: Weights) -> list[tuple[str, str]]:
  """Where the weights come from, in rows."""
  return provenance.rows(_without_folders(_provenance(weights)))


def _provenance(weights: Weights) -> Provenance:
  """The stage's own provenance, with the sources of all stages that it descends from."""
  own = weights.require_done()
  ancestors = [done for _, _, done in _ancestors(weights.path.parent, own)]
  sources = {
    kind: source
    for done in [*reversed(ancestors), own]
    for kind, source in done.require_provenance().sources.items()
  }
  return dataclasses.replace(own.require_provenance(), sources=sources)


def _without_folders(made: Provenance) -> Provenance:
  """The provenance with files but without the folders they are in: cards are published."""

  def short(word: str) -> str:
    flag, equals, value = word.partition("=")
    if flag.startswith("--config.data.") and ":" in value:
      return f"{flag}={_source(value)}"
    if value.startswith(HUB):  # a public name, not a path of this machine
      return word
    if flag.endswith((".weights", ".path")):
      return f"{flag}={pathlib.PurePath(value).name}"
    return flag + equals + _ABSOLUTE.sub("", value) if equals else _ABSOLUTE.sub("", word)

  sources = {
    kind: dataclasses.replace(source, spec=_source(source.spec))
    for kind, source in made.sources.items()
  }
  command = shlex.join(map(short, shlex.split(made.command)))
  return dataclasses.replace(made, command=command, sources=sources)


def _source(spec: str) -> str:
  """A source's scheme and file name, without folders: paths may tell private things."""
  scheme, _, rest = spec.partition(":")
  if scheme == "tfds":  # NAME/CONFIG is no folder; where the data lie is
    return f"{scheme}:{rest.partition('?data_dir=')[0]}"
  return f"{scheme}:{pathlib.PurePath(rest).name}"


def _number(value: float | None) -> str:
  # findings.json has null for what is not finite.
  return "not finite" if value is None else f"{value:.4g}"
