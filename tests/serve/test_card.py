"""The model card: numbers come from the run's files, and what no file says is not measured."""

import dataclasses
import json

import pytest

from instructjax.core import provenance, results
from instructjax.serve import card
from instructjax.train import finished, weights
from tests import finished_run

FINDINGS = [
  {
    "id": "rl_over_sft",
    "claim": "RL | wins.",
    "measured": {"ppo_ptx": 0.7125},
    "interval": [[0.6543, 0.8]],
    "holds": True,
  },
  {
    "id": "reward_model",
    "claim": "It agrees.",
    "measured": {"accuracy": 0.7311, "labeler_agreement": 0.72},
    "interval": [[0.69, 0.77]],
    "holds": False,
  },
  {
    "id": "topic_following",
    "claim": "It follows.",
    "measured": {"ppo_ptx_minus_sft": 0.15, "sft": 0.5, "ppo_ptx": 0.65},
    "interval": [[0.1, 0.2]],
    "holds": True,
  },
  {
    "id": "kl_bounded",
    "claim": "Of no value.",
    "measured": {"ppo": 5.0, "ppo_ptx": None},
    "interval": [[0.1, 0.2]],
    "holds": True,
  },
]
POLICIES = {
  "base": {"reward": -1.25, "pretrain_loss": 3.5},
  "ppo_ptx": {"reward": 0.5432, "kl": 2.125, "pretrain_loss": 3.25},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A judged run: pretrain, rm, ppo_init and ppo_ptx."""
  folder = tmp_path_factory.mktemp("secret") / "demo"
  config, tokenizer = finished_run.write_run(folder)
  data = dataclasses.replace(config.data, prompts=f"jsonl:{folder}/prompts.jsonl")
  lm, scalar = (config.model.network, "lm"), (config.reward_model.network, "scalar")
  write = lambda stage, items, **more: finished_run.write_stage(
    folder / stage, tokenizer, items, **more
  )
  write(
    "pretrain",
    {"params": lm},
    base="hf://org/base@v2",
    blocks=[("pretrain", config.pretrain), ("documents", config.data.documents)],
    result=results.Pretrained(3.456),
  )
  write(
    "rm",
    {"params": scalar},
    blocks=[("rm", config.rm), ("data", data)],
    parents=["pretrain"],
    result=finished_run.reward_model(1.5226),
  )
  write(
    "ppo_init",
    {"params": lm},
    blocks=[("ppo_init", config.ppo_init), ("data", data)],
    parents=["pretrain"],
    result=results.Tuned((results.Epoch(7, 3.2398, 4.125),)),
  )
  rewards = ("rm", "0.5*python:checks:polite", f"model:{folder}/other/rm")
  ppo = dataclasses.replace(config.ppo, beta=0.0375, rewards=rewards)
  write(
    "ppo_ptx",
    {"ema_params": lm, "params": lm, "value_params": scalar},
    blocks=[("reward_model", scalar[0]), ("data", data), ("ppo", ppo)],
    parents=["ppo_init", "rm"],
  )
  evaluated = {
    "config.evaluate": json.dumps({"weights": "ema"}),
    "parent:ppo_ptx": finished_run.identity(folder / "ppo_ptx"),
  }
  judged = finished.Done("evaluate", evaluated, None, results.Evaluated(POLICIES))
  finished.write_done(folder / "evaluate", judged)
  (folder / "report").mkdir()
  (folder / "report" / "findings.json").write_text(json.dumps(FINDINGS))
  return folder


def text(path, which="ema", **changes):
  about = card.Export("out", "hf", which, "float32", 1234567)
  return card.text(weights.locate(path, which), dataclasses.replace(about, **changes))


def section(page, title):
  return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def row(page, start):
  """Cells of the table row that starts so."""
  (line,) = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
  return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_a_policys_card_holds_the_runs_numbers(run):
  page = text(run / "ppo_ptx")
  assert "stage `ppo_ptx`, step 2, of the run `demo`" in page and "eq. 2, sec 3.5" in page
  measured = section(page, "Measured")
  assert row(measured, "policy") == ["policy", "reward", "pretrain_loss", "kl"]
  assert row(measured, "**ppo_ptx**") == ["**ppo_ptx**", "0.5432", "3.25", "2.125"]
  assert row(measured, "base") == ["base", "-1.25", "3.5", ""]
  assert r"| RL \| wins. | ppo_ptx 0.7125 (0.6543 to 0.8) | yes |" in measured
  assert "accuracy 0.7311 (0.69 to 0.77), labeler_agreement 0.72 | no |" in measured
  # Each interval is beside its own value.
  assert (
    row(measured, "It follows.")[1] == "ppo_ptx_minus_sft 0.15 (0.1 to 0.2), sft 0.5, ppo_ptx 0.65"
  )
  assert row(measured, "Of no value.")[1] == "ppo 5, ppo_ptx not finite, 95% interval 0.1 to 0.2"
  settings = section(page, "Settings")
  assert row(settings, "setting") == ["setting", "ppo_ptx", "ppo_init", "rm", "pretrain"]
  assert row(settings, "`beta`") == ["`beta`", "0.0375", "", "", ""]
  assert row(settings, "`rewards`")[1] == r"\['rm', '0.5\*python:checks:polite', 'model:rm'\]"
  assert row(settings, "`batch_size`")[1:] == ["8", "8", "8", "8"]
  assert row(settings, "`policy_optim.learning_rate`")[1] == "0.05"
  assert row(settings, "`optim.learning_rate`")[1:] == ["", "0.01", "0.001", "0.01"]
  assert "1,234,567" in page
  assert "max_new_tokens=24" in page and "up to 36 tokens" in page
  assert "@inproceedings{ouyang2022training" in page


def test_the_examples_answer_is_as_long_as_training_allowed_and_never_guessed(run):
  assert "max_new_tokens=128" in text(run / "pretrain")
  found = weights.locate(run / "ppo_ptx")
  settings = {**found.settings, "config.data": json.dumps({"max_prompt_length": 36})}
  done = dataclasses.replace(found.done, fingerprint=settings)
  with pytest.raises(KeyError, match="max_response_length"):
    card.text(dataclasses.replace(found, done=done), card.Export("out", "hf", "ema", "float32", 1))


def test_folders_of_the_machine_stay_out(run):
  for stage in ("ppo_ptx", "rm", "pretrain"):
    page = text(run / stage)
    assert "secret" not in page
  assert "Data: documents `jsonl:books.jsonl`. One" in text(run / "ppo_ptx")


def test_other_weights_than_those_judged_say_so(run):
  assert "judged with" not in text(run / "ppo_ptx")
  assert "judged with the `ema` weights; these are the `raw` ones" in text(run / "ppo_ptx", "raw")
  assert section(text(run / "ppo_ptx", "value"), "Measured").strip() == "Not measured."


def test_a_reward_models_card(run):
  page = text(run / "rm", score_bias=-1.5226)
  measured = section(page, "Measured")
  assert "0.7311 (standard error 0.0123, 2560 pairs of 300 prompts)" in measured
  assert "1.523" in measured and "It agrees." in measured
  assert "wins" not in measured and "kl" not in measured  # of policies
  assert "AutoModelForSequenceClassification" in page and "logits[:, 0] + -1.5226" in page
  assert "instructjax_score_bias" in page
  assert "+ " not in section(text(run / "rm"), "How to load it").split("score = ")[1]


def test_a_stages_own_numbers(run):
  assert "loss on held-out text, nats a token | 3.456" in text(run / "pretrain")
  assert "step 7, nats a token | validation loss 3.24, pretrain loss 4.125 |" in text(
    run / "ppo_init"
  )


def test_what_was_judged_before_the_stage_was_made_anew_does_not_count(run, tmp_path):
  done = run / "ppo_ptx" / "done.json"
  before = done.read_text()
  try:
    finished_run.change_done(done.parent, '"config.seed": "0"', '"config.seed": "1"')
    page = text(run / "ppo_ptx")
  finally:
    done.write_text(before)
  assert section(page, "Measured").strip() == "Not measured."
  assert "Seed 1." in page


@pytest.mark.parametrize("which", ["ema", "value"])
def test_the_snippet_names_a_tokenizer_that_transformers_does_not_change(run, which):
  assert "import AutoModelFor" in text(run / "ppo_ptx", which)
  assert " AutoTokenizer\n" in text(run / "ppo_ptx", which)
  opened = weights.locate(run / "ppo_ptx", which)
  qwen2 = dataclasses.replace(opened, network=dataclasses.replace(opened.network, qkv_bias=True))
  page = card.text(qwen2, card.Export("out", "hf", which, "float32", 1))
  assert " PreTrainedTokenizerFast\n" in page and "= PreTrainedTokenizerFast.from_p" in page
  assert "AutoTokenizer" not in page


@pytest.mark.parametrize("stage", ["rm", "pretrain"])
def test_nor_does_it_for_what_the_judged_started_from(run, stage):
  assert "Means over" in text(run / "pretrain") and "It agrees." in text(run / "rm")
  done = run / stage / "done.json"
  before = done.read_text()
  try:
    finished_run.change_done(done.parent, '"config.seed": "0"', '"config.seed": "1"')
    page = text(run / stage)
  finally:
    done.write_text(before)
  assert "Seed 1." in page and "Means over" not in page and "It agrees." not in page


def test_a_conversions_card_claims_nothing(run):
  opened = dataclasses.replace(weights.locate(run / "ppo_ptx"), kind="hf", done=None)
  page = card.text(opened, card.Export("out", "hf", "ema", "float32", 1))
  assert "`ppo_ptx`, converted by instructjax without training" in page
  assert section(page, "Measured").strip() == "Not measured."
  assert section(page, "Settings").strip() == "None: nothing was trained."
  assert "Ouyang" not in page and "rlhf" not in page


def test_chats_are_spoken_of_where_the_tokenizer_has_a_template(run):
  opened = weights.locate(run / "ppo_ptx")
  about = card.Export("out", "hf", "ema", "float32", 1)
  assert "apply_chat_template" not in card.text(opened, about)
  chats = opened.tokenizer.chats
  special = dataclasses.replace(chats.special, chat_template="{{ messages }}")
  opened.tokenizer.chats = dataclasses.replace(chats, special=special)
  assert "apply_chat_template" in card.text(opened, about)


def test_names_with_signs_are_only_names(run):
  found, nasty = weights.locate(run / "ppo_ptx"), 'a|b`c" : #<script>_x_\x1b\nY'
  made = dataclasses.replace(finished_run.MADE, command=f"run '--workdir={nasty}'")
  done = dataclasses.replace(found.done, provenance=made)
  hostile = dataclasses.replace(found, done=done, base=nasty)
  page = card.text(hostile, card.Export(nasty, "hf", "ema", "float32", 1))
  assert r'# a|b\`c" : \#\<script\>\_x\_\\x1b\\nY' in page.splitlines()
  assert r'The base is ``a|b`c" : #<script>_x_\x1b\nY``; its licence' in page
  assert r'from_pretrained("a|b`c\" : #<script>_x_\\x1b\\nY")' in page
  cells = row(page, "command")
  assert len(cells) == 2 and r"a\|b\`c" in cells[1] and r"\<script\>" in cells[1]
  assert "\x1b" not in page
  hub = dataclasses.replace(found, base='hf://org/a: "b"')
  front = card.text(hub, card.Export("out", "hf", "ema", "float32", 1)).split("---\n")[1]
  assert r'base_model: "org/a: \"b\""' in front.splitlines()


def test_front_matter(run):
  head = lambda page: page.split("---\n")[1].splitlines()
  assert head(text(run / "pretrain")) == [
    *("license: other", "license_name: unknown", "base_model: org/base"),
    *("library_name: transformers", "pipeline_tag: text-generation"),
    *("tags:", "- instructjax", "- rlhf", "- instructgpt", "- pretrain"),
  ]
  assert "The base is `org/base@v2`" in text(run / "pretrain")
  rm = head(text(run / "rm"))
  assert "- reward-model" in rm and "pipeline_tag: text-classification" in rm
  assert not any(line.startswith("base_model") for line in rm)
  gguf = text(run / "ppo_ptx", name="out.gguf", format="gguf", numbers="Q8_0")
  assert "- gguf" in head(gguf) and "library_name: transformers" not in head(gguf)
  assert "llama-completion -m out.gguf" in gguf and "| numbers in the files | Q8_0 |" in gguf


@pytest.mark.parametrize(
  ("given", "shown"),
  [
    ("jsonl:/home/ann/secret/docs.jsonl", "jsonl:docs.jsonl"),
    ("jsonl:my secret/docs.jsonl", "jsonl:docs.jsonl"),
    ("tfds:anth/conf:1.0.0?data_dir=/secret/tf", "tfds:anth/conf:1.0.0"),
    ("demo:", "demo:"),
  ],
)
def test_a_source_without_its_folders(given, shown):
  made = dataclasses.replace(
    finished_run.MADE,
    command=f"instructjax run '--config.data.prompts={given}' --config.model.weights=../secret/m.gguf"
    " --config.reward_model.weights=hf://org/base --config.tokenizer.path=/secret/t.model",
    sources={"prompts": provenance.Source(given, "sha256:9")},
  )
  found = card._without_folders(made)
  assert found.sources["prompts"].spec == shown
  assert "secret" not in found.command and "--config.model.weights=m.gguf" in found.command
  assert "--config.reward_model.weights=hf://org/base" in found.command
