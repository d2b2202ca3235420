"""The model card of an export: what it is, how it was made, what was measured of it, how to load it.

Called by export.py. Every number comes from files: done.json of the stage and of those it started
from, evaluate/results.json and report/findings.json of its run. What no file says is not measured.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from instructjax.models.interop import SCORE_BIAS
from instructjax.train import finished
from instructjax.train.weights import HUB, RL_STAGES, Weights

# Stage -> (what it is, where the paper has it).
_STAGES = {
  "pretrain": ("a base language model, trained on documents", "the base that stands in for GPT-3"),
  "reward_pretrain": (
    "a base language model, trained on documents",
    "the base of the reward model, which stands in for GPT-3",
  ),
  "sft": ("a supervised baseline, trained on demonstrations", "sec 3.5, C.1"),
  "ppo_init": (
    "a supervised model, trained on demonstrations mixed with pretraining text: PPO's start and"
    " KL reference",
    "C.3",
  ),
  "rm": ("a reward model, trained on ranked answers", "eq. 1, sec 3.5, C.2"),
  "ppo": ("a policy trained with PPO against a reward model", "sec 3.5, C.4, gamma = 0"),
  "ppo_ptx": ("a policy trained with PPO-ptx against a reward model", "eq. 2, sec 3.5, C.4"),
  "ppo_beta0": ("a policy trained with PPO without a KL penalty, to show its need", "E.7"),
}
_IN_RESULTS = {"pretrain": "base", "reward_pretrain": "reward_base"}  # evaluate's names
_OWN_BLOCKS = ("config.ppo", "config.stage", "config.collect")  # what is a stage's own
_NOT_MEASURED = "Not measured."
_CITATION = """The recipe is that of Ouyang et al. 2022 ([arXiv:2203.02155](https://arxiv.org/abs/2203.02155)).

```bibtex
@inproceedings{ouyang2022training,
  title     = {Training language models to follow instructions with human feedback},
  author    = {Ouyang, Long and Wu, Jeffrey and Jiang, Xu and Almeida, Diogo and Wainwright, Carroll L. and others},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {35},
  year      = {2022},
  eprint    = {2203.02155},
}
```"""


@dataclasses.dataclass(frozen=True)
class Export:
  """What the card says of the export itself.

  Attributes:
    name: of the folder or file.
    format: of the files.
    which: of an RL stage, the averaged policy, the last one, or the value network.
    numbers: type of the numbers in the files, as float32, F16 or Q8_0.
    num_parameters: of the network.
    score_bias: what must be added to the score that transformers computes; 0 where it has its own
      place in the files, or there is none.
  """

  name: str
  format: str
  which: str
  numbers: str
  num_parameters: int
  score_bias: float = 0.0


def text(weights: Weights, export: Export) -> str:
  """The card: YAML front matter and Markdown."""
  parts = {
    f"# {export.name}": _what(weights, export),
    "## How to load it": _loading(weights, export),
    "## Prompts": _prompts(weights),
    "## Measured": _measured(weights, export),
    "## Settings": _settings(weights),
    "## Intended use and limits": _limits(weights),
  }
  if weights.kind == "stage":
    parts["## Citation"] = _CITATION
  return _front_matter(weights, export) + "".join(f"\n{h}\n\n{body}\n" for h, body in parts.items())


def _block(weights: Weights, name: str) -> dict[str, Any]:
  """A config block that the stage depends on, {} if it does not."""
  return json.loads(weights.settings.get(f"config.{name}", "{}"))


def _front_matter(weights: Weights, export: Export) -> str:
  is_scalar = weights.head == "scalar"
  tags = ["instructjax"]
  if weights.kind == "stage":
    tags += ["rlhf", "instructgpt", weights.path.name.replace("_", "-")]
  tags += ["reward-model"] * is_scalar + ["gguf"] * (export.format == "gguf")
  lines = ["license: other", "license_name: unknown"]
  base = weights.base
  if base.startswith(HUB):
    lines.append(f"base_model: {base.removeprefix(HUB).split('@')[0]}")
  if export.format == "hf":
    lines.append("library_name: transformers")
  lines.append(f"pipeline_tag: {'text-classification' if is_scalar else 'text-generation'}")
  return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""])


def _what(weights: Weights, export: Export) -> str:
  cfg = weights.network
  if weights.kind == "stage":
    what, where = _STAGES.get(weights.path.name, ("a network", "sec 3"))  # a renamed folder
    if export.which == "value":
      what, where = "a value network, trained with PPO from a reward model", "sec 3.5, C.4"
    averaged = {"ema": ", averaged over iterations (EMA)", "raw": ", of the last iteration"}
    what += averaged.get(export.which, "") if weights.path.name in RL_STAGES else ""
    sentence = (
      f"This is {what}: stage `{weights.path.name}`, step {weights.step}, of the run"
      f" `{weights.path.parent.name}` of instructjax, the InstructGPT recipe in JAX (Ouyang et al. 2022:"
      f" {where})."
    )
    base = weights.base
    if base:
      name = base.removeprefix(HUB) if base.startswith(HUB) else pathlib.Path(base).name
      sentence += f" The base is `{name}`; its licence and limits hold here too."
  else:
    sentence = (
      f"This is `{weights.path.name}`, converted by instructjax without training: its licence, card and"
      " limits hold here too."
    )
  rows = {
    "layers, width, heads (key/value heads) of size": f"{cfg.num_layers}, {cfg.d_model}, {cfg.num_heads}"
    f" ({cfg.num_kv_heads}) of {cfg.head_dim}",
    "positions, norm, MLP (width)": f"{cfg.position}, {cfg.norm}, {cfg.mlp} ({cfg.d_mlp})",
    "context, tokens": cfg.max_length,
    "vocabulary": weights.tokenizer.vocab_size,
    "parameters": f"{export.num_parameters:,}",
    "numbers in the files": export.numbers,
  }
  return sentence + "\n\n" + _table(["", ""], list(rows.items()))


def _loading(weights: Weights, export: Export) -> str:
  length = _block(weights, "data").get("max_response_length", 128)
  if export.format == "gguf":
    return (
      f"```bash\nllama-completion -m {export.name} -no-cnv -n {length} -p $'Name a colour.\\n'\n```\n\n"
      "or in instructjax: `python -m instructjax generate"
      f" --checkpoint={export.name} --prompt=...`"
    )
  # transformers 5 gives every model of Qwen2's kind Qwen2's own tokenizer, whatever the folder holds.
  is_qwen2 = weights.network.qkv_bias and not weights.network.use_bias
  tokenizer = "PreTrainedTokenizerFast" if is_qwen2 else "AutoTokenizer"
  if weights.head == "scalar":
    bias = f" + {export.score_bias!r}" if export.score_bias else ""
    why = (
      "\n\nThe score is read at the last token that is not a pad. This architecture has no place for the"
      f" score's bias in transformers: add {export.score_bias!r}, which is `{SCORE_BIAS}` in config.json,"
      " if scores are compared with zero; differences of scores do not need it."
    )
    return (
      "```python\nfrom transformers import AutoModelForSequenceClassification,"
      f" {tokenizer}\n\n"
      f'tokenizer = {tokenizer}.from_pretrained("{export.name}")\n'
      f'model = AutoModelForSequenceClassification.from_pretrained("{export.name}")\n'
      'text = "Name a colour.\\n" + "Blue." + tokenizer.eos_token\n'
      'inputs = tokenizer([text], padding=True, return_tensors="pt")\n'
      f"score = model(**inputs).logits[:, 0]{bias}\n```" + (why if bias else "")
    )
  return (
    f"```python\nfrom transformers import AutoModelForCausalLM, {tokenizer}\n\n"
    f'tokenizer = {tokenizer}.from_pretrained("{export.name}")\n'
    f'model = AutoModelForCausalLM.from_pretrained("{export.name}")\n'
    'inputs = tokenizer("Name a colour.\\n", return_tensors="pt")\n'
    f"output = model.generate(**inputs, do_sample=True, max_new_tokens={length})\n"
    "answer = output[0, inputs.input_ids.shape[1] :]\n"
    "print(tokenizer.decode(answer, skip_special_tokens=True))\n```"
  )


def _prompts(weights: Weights) -> str:
  data = _block(weights, "data")
  limits = (
    f" Training saw prompts of up to {data['max_prompt_length']} tokens and answers of up to"
    f" {data['max_response_length']}, EOS included."
    if data
    else ""
  )
  chats = (
    " Chats go through the tokenizer's chat template, as chats in the training data did:"
    " `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`."
    if weights.tokenizer.has_chat_template
    else ""
  )
  return (
    "A prompt that is text is used exactly as it is: end it with what parted prompts from answers in the"
    f" training data, a newline for example.{chats} An answer ends with the token of id"
    f" {weights.tokenizer.eos_id} (EOS).{limits}"
  )


def _measured(weights: Weights, export: Export) -> str:
  if weights.kind != "stage" or export.which == "value":
    return _NOT_MEASURED
  parts = [_from_training(weights.result)]
  run = weights.path.parent
  evaluation = finished.read_done(run / "evaluate")
  if evaluation and _judged(weights, evaluation["fingerprint"]):
    judged = json.loads(evaluation["fingerprint"]["config.evaluate"])["weights"]
    if weights.path.name in RL_STAGES and judged != export.which:
      parts.append(
        f"The run was judged with the `{judged}` weights; these are the `{export.which}` ones."
      )
    parts.append(_policies(weights, run / "evaluate" / "results.json"))
    parts.append(_findings(run / "report" / "findings.json", weights.head))
  return "\n\n".join(part for part in parts if part) or _NOT_MEASURED


def _judged(weights: Weights, evaluation: Mapping[str, str]) -> bool:
  """Whether an evaluation saw this very stage, not one that was trained in its place since."""
  mine = json.dumps(weights.settings, sort_keys=True).encode()  # as context.fingerprint hashes it
  ancestors = _ancestors(weights.path.parent, evaluation)
  seen = {identity for name, identity, _ in ancestors if name == weights.path.name}
  return seen == {hashlib.sha256(mine).hexdigest()}


def _ancestors(
  run: pathlib.Path, made_with: Mapping[str, str]
) -> Iterator[tuple[str, str, Mapping[str, str]]]:
  """(stage, its identity then, what it was made with) of all that something started from, nearest first.

  Some come several times. What lies in no folder of the run, as given weights, ends the line.
  """
  queue = [made_with]
  for made_with in queue:  # which grows
    for name, identity in made_with.items():
      stage = name.removeprefix("parent:")
      done = finished.read_done(run / stage) if stage != name else None
      if done:
        queue.append(done["fingerprint"])
        yield stage, identity, done["fingerprint"]


def _from_training(result: Mapping[str, Any]) -> str:
  """What the stage itself measured on held-out data: its done.json."""
  rows = []
  for epoch in result.get("epochs", ()):
    losses = [f"{k.replace('_', ' ')} {_number(v)}" for k, v in epoch.items() if k != "step"]
    rows.append((f"step {epoch['step']}, nats a token", ", ".join(losses)))
  if "validation_loss" in result:
    rows.append(("loss on held-out text, nats a token", _number(result["validation_loss"])))
  for name, what in (("validation", "held-out prompts"), ("heldout_labelers", "held-out labelers")):
    if name in result:
      judged = result[name]
      rows.append(
        (
          f"accuracy on pairs of answers, {what}",
          f"{_number(judged['accuracy'])} (standard error {_number(judged['accuracy_stderr'])},"
          f" {judged['pairs']} pairs of {judged['prompts']} prompts)",
        )
      )
  if "demonstration_mean" in result:
    rows.append(
      (
        "mean score of demonstrations before the bias, which makes it 0",
        _number(result["demonstration_mean"]),
      )
    )
  return _table(["in training", "value"], rows) if rows else ""


def _policies(weights: Weights, path: pathlib.Path) -> str:
  """Means on held-out prompts, a row a policy."""
  if weights.head == "scalar" or not path.is_file():
    return ""
  policies = json.loads(path.read_text(encoding="utf-8"))["policies"]
  mine = _IN_RESULTS.get(weights.path.name, weights.path.name)
  columns = list(dict.fromkeys(key for row in policies.values() for key in row))
  rows = [
    (
      f"**{name}**" if name == mine else name,
      *(_number(row[c]) if c in row else "" for c in columns),
    )
    for name, row in policies.items()
  ]
  note = "Means over answers to held-out prompts" + (
    " (this model in bold)" if mine in policies else ""
  )
  return f"{note}; losses and KL in nats.\n\n" + _table(["policy", *columns], rows)


def _findings(path: pathlib.Path, head: str) -> str:
  if not path.is_file():
    return ""
  rows = []
  for finding in json.loads(path.read_text(encoding="utf-8")):
    if head == "scalar" and finding["id"] != "reward_model":
      continue
    interval = finding["interval"]
    intervals = [interval] if not isinstance(interval[0], list) else interval
    shown = [f"{_number(low)} to {_number(high)}" for low, high in intervals]
    measured = [
      f"{name} {_number(value)}" + (f" ({shown[i]})" if i < len(shown) else "")
      for i, (name, value) in enumerate(finding["measured"].items())
    ]
    rows.append((finding["claim"], ", ".join(measured), "yes" if finding["holds"] else "no"))
  return (
    "The paper's findings in this run, with 95% intervals (one run: they say nothing of other seeds).\n\n"
    + _table(["finding", "measured", "holds"], rows)
  )


def _settings(weights: Weights) -> str:
  if weights.kind != "stage":
    return "None: nothing was trained."
  blocks = _lineage(weights)
  names = list(dict.fromkeys(key for block in blocks.values() for key in block))
  rows = [(f"`{name}`", *(block.get(name, "") for block in blocks.values())) for name in names]
  data = _block(weights, "data")
  sources = [f"{kind} `{_source(data[kind])}`" for kind in _kinds(data)]
  documents = weights.settings.get("config.documents")
  if documents:
    sources.append(f"documents `{_source(json.loads(documents))}`")
  return (
    f"Seed {weights.settings['config.seed']}. Data: {', '.join(sources)}. A column a stage, this one first,"
    " then those it started from.\n\n" + _table(["setting", *blocks], rows)
  )


def _lineage(weights: Weights) -> dict[str, dict[str, Any]]:
  """Stage -> its settings with dotted names: the exported one first, then what it started from."""
  own = (weights.path.name, "", weights.settings)
  result = {}
  for stage, _, made_with in [own, *_ancestors(weights.path.parent, weights.settings)]:
    block = next((made_with[name] for name in _OWN_BLOCKS if name in made_with), None)
    if block and stage not in result:
      result[stage] = _flat(json.loads(block))
  return result


def _flat(block: Mapping[str, Any]) -> dict[str, Any]:
  """Nested blocks as dotted names."""
  result = {}
  for name, value in block.items():
    inner = {f"{name}.{k}": v for k, v in _flat(value).items()} if isinstance(value, dict) else None
    result |= inner or {name: value}
  return result


def _kinds(data: Mapping[str, Any]) -> list[str]:
  return [
    kind for kind in ("documents", "demonstrations", "comparisons", "prompts") if kind in data
  ]


def _source(spec: str) -> str:
  """The scheme and the file's name: folders of the machine are nobody's business."""
  scheme, _, rest = spec.partition(":")
  return f"{scheme}:{pathlib.PurePath(rest).name}"


def _limits(weights: Weights) -> str:
  made = (
    "It learned what its labelers, simulated ones unless the data named above are yours, preferred. "
    if weights.kind == "stage" and weights.path.name in (*RL_STAGES, "rm")
    else ""
  )
  scores = (
    "A score means something only next to other scores of this model, on answers like those it was"
    " trained on; a policy trained against it will find what it misjudges. "
    if weights.head == "scalar"
    else "Answers can be false, biased or harmful, and nothing filters them. "
  )
  return (
    f"For research on learning from human feedback and for teaching. {made}{scores}Only what is listed"
    " under Measured was measured: no safety evaluation was made. Do not use it where a wrong answer does"
    " harm."
  )


def _number(value: float) -> str:
  return f"{value:.4g}"


def _table(head: list[str], rows: list[tuple]) -> str:
  lines = [head, ["---"] * len(head), *rows]
  cell = lambda value: str(value).replace("|", r"\|").replace("\n", " ")
  return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)
