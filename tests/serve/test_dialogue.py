"""Answering prompts: what is drawn, what is shown and when, who judges, and what a mistake says.

The answers of a finished run's stages are compared with `sampling.generate` and `scoring`, which have
tests of their own. Weights are random: nothing is trained here.
"""

import dataclasses
import functools
import io
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models
from instructjax.core import results
from instructjax.core.errors import UserError
from instructjax.core.structs import PromptBatch
from instructjax.data import tokenizer as tokenizers
from instructjax.rl import sampling, scoring
from instructjax.serve import dialogue, speaker
from instructjax.serve.dialogue import Draw, Settings
from instructjax.train import checkpoint, finished
from tests import finished_run, micro, test_main, tiny

PROMPT = "say: sea or hill?\n"
MEAN = 0.75  # score of demonstrations, which the reward model's bias takes away
DRAW = Draw(temperature=1.0, top_p=1.0, max_new_tokens=24)
GREEDY = dataclasses.replace(DRAW, temperature=0.0)
SETTINGS = Settings(draw=DRAW, seed=0, chat=None, system="")
KEY = jax.random.key(3)


def write_stage(folder, cfg, tokenizer, head, item, seed, result, blocks=()):
  """A stage's folder as the stage leaves it, with random weights."""
  model = tiny.make_model(cfg, tokenizer.vocab_size, head)
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0.1, 0.25, x.shape), jnp.float32), models.param_shapes(model)
  )
  with checkpoint.Checkpoints(folder, keep=1) as checkpoints:
    checkpoints.save(2, {item: params}, None, {}, {}, finished_run.changeable(""))
  made_with = {
    "config.model": json.dumps(dataclasses.asdict(cfg)),
    "tokenizer": tokenizer.fingerprint,
  } | dict(blocks)
  finished.write_done(folder, finished.Done(folder.name, made_with, 2, result))
  return model, params


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run's folder with `sft`, `ppo_ptx` and `rm`, and (model, params) of each stage."""
  folder = tmp_path_factory.mktemp("run")
  cfg = micro.config("ppo_ptx", micro.write_data(folder / "data")).model.network
  cfg = dataclasses.replace(cfg, max_length=100)
  documents = folder / "data" / "documents.jsonl"
  texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
  path = folder / "tokenizer" / "tokenizer.model"
  tokenizer = tokenizers.train_tokenizer(texts, micro.VOCAB_SIZE, path, 0)
  write = functools.partial(write_stage, cfg=cfg, tokenizer=tokenizer)
  nets = {
    "sft": write(folder / "sft", head="lm", item="params", seed=1, result=results.Tuned(())),
    "ppo_ptx": write(
      folder / "ppo_ptx",
      head="lm",
      item="ema_params",
      seed=2,
      result=results.Nothing(),
      blocks={"config.ppo": '{"ema_decay": 0.9}'},
    ),
    "rm": write(
      folder / "rm", head="scalar", item="params", seed=3, result=finished_run.reward_model(MEAN)
    ),
  }
  return folder, nets


@pytest.fixture(scope="module")
def seat(run):
  """seat(*stages, reward='', **settings): the panel of these stages."""

  @functools.cache
  def one(*stages, reward="", **settings):
    paths = [str(run[0] / stage) for stage in stages]
    settings = dataclasses.replace(SETTINGS, **settings)
    return dialogue.seat(paths, reward and str(run[0] / reward), settings)

  return one


@pytest.fixture(scope="module")
def sft(seat):
  return seat("sft").speakers[0]


def answer(who, prompt=PROMPT, key=KEY, draw=DRAW):
  pieces = []
  given = speaker.answer(who, prompt, key, draw, pieces.append)
  assert "".join(pieces) == given.text
  return given, pieces


# --- one answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [DRAW, GREEDY], ids=["sampled", "greedy"])
def test_answers_are_those_of_generate(quick_jit, run, sft, draw):
  model, params = run[1]["sft"]
  ids, eos_id = sft.tokenizer.encode_prompt(PROMPT), sft.tokenizer.eos_id
  options = dict(max_new_tokens=24, eos_id=eos_id, temperature=draw.temperature)
  generate = quick_jit(functools.partial(sampling.generate, model, **options))
  prompts = PromptBatch(np.int32([ids]), np.ones((1, len(ids)), bool), np.int32([0]))
  endings = set()
  for seed in range(12 if draw is DRAW else 1):
    rollout = generate(params, prompts, jax.random.key(seed))
    tokens = np.asarray(rollout.token_BL)[0, len(ids) :][np.asarray(rollout.is_response_BR)[0]]
    given, pieces = answer(sft, key=jax.random.key(seed), draw=draw)
    assert given.text == sft.tokenizer.decode(tokens)
    assert (given.num_prompt_tokens, given.num_tokens) == (len(ids), len(tokens))
    assert given.ended == (tokens[-1] == eos_id)
    assert len(pieces) > len(tokens) // 2  # it comes token by token
    endings.add(given.ended)
  assert endings == {False, True} or draw is GREEDY  # both happened


def test_the_key_decides_and_top_p_narrows(sft):
  texts = [answer(sft, key=jax.random.key(seed))[0].text for seed in (5, 5, 6)]
  assert texts[0] == texts[1] != texts[2]
  narrow = dataclasses.replace(DRAW, top_p=1e-6)  # a nucleus of one token
  assert answer(sft, draw=narrow)[0].text == answer(sft, draw=GREEDY)[0].text != texts[0]


def test_prompts_of_many_lengths_share_programs(sft):
  before = speaker.Speaker.programs.cache_info().currsize
  draw = dataclasses.replace(GREEDY, max_new_tokens=3)
  for prompt in ("a", "say", PROMPT):
    answer(sft, prompt, draw=draw)
  assert speaker.Speaker.programs.cache_info().currsize == before + 1


def test_an_answer_ends_where_the_context_does(sft):
  limit = sft.model.network.max_length
  encode = lambda count: "\n" * count
  given, _ = answer(sft, encode(limit - 2))
  assert given.num_tokens <= 2
  # More tokens than there is room for cost nothing: the cache is no longer than the context.
  whole = lambda times: dataclasses.replace(DRAW, max_new_tokens=times * limit)
  answer(sft, "a", draw=whole(1))
  before = speaker.Speaker.programs.cache_info().currsize
  answer(sft, "a", draw=whole(2))
  assert speaker.Speaker.programs.cache_info().currsize == before
  with pytest.raises(ValueError, match=f"prompt of {limit} tokens must be shorter than"):
    answer(sft, encode(limit))
  with pytest.raises(ValueError, match="must hold at least one token"):
    answer(sft, "")


class Bytes:
  """A tokenizer of bytes; id 256 is EOS."""

  def decode(self, ids):
    return bytes(i for i in ids if i < 256).decode(errors="replace")


@pytest.mark.parametrize(
  ("text", "pieces"),
  [
    ("aé\n日🙂b".encode(), {0: "a", 2: "é", 3: "\n", 6: "日", 10: "🙂", 11: "b"}),
    # Nothing is broken here, but only the next byte tells.
    ("é\ufffd!".encode(), {1: "é", 5: "\ufffd!"}),
    ("a日".encode()[:-1], {0: "a", 3: "\ufffd"}),  # EOS in the middle of a character
  ],
)
def test_text_comes_as_soon_as_a_character_is_whole(text, pieces):
  fed = []

  def feed():
    for token in [*text, 256]:
      fed.append(token)
      yield token

  shown = {len(fed) - 1: piece for piece in speaker.text_pieces(Bytes(), feed())}
  assert shown == pieces


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ended", [False, True])
def test_score_is_that_of_scoring_with_the_bias(quick_jit, run, seat, ended):
  judge = seat("sft", reward="rm").judge
  model, params = run[1]["rm"]
  text = "the sea is near the hill."
  ids = judge.tokenizer.encode(PROMPT) + judge.tokenizer.encode(text)
  token_BL = np.int32([ids + [judge.tokenizer.eos_id] * ended])
  score = quick_jit(functools.partial(scoring.sequence_score, model))
  expected = score(params, token_BL, token_BL >= 0)[0] - MEAN
  given = speaker.Answer(text, 1, 1, ended, 1.0, 1.0)
  np.testing.assert_allclose(speaker.score(judge, PROMPT, given), expected, atol=1e-5)
  with pytest.raises(ValueError, match="tokens must not exceed the context of 100"):
    speaker.score(judge, PROMPT, dataclasses.replace(given, text="sea " * 300))


def test_stages_of_one_run_are_judged_by_its_own(run, seat, tmp_path):
  assert seat("sft").judge is None
  assert seat("sft", "ppo_ptx").judge.name == str(run[0] / "rm")
  shutil.copytree(run[0], tmp_path / "other")
  panel = dialogue.seat([str(run[0] / "sft"), str(tmp_path / "other" / "sft")], "", SETTINGS)
  assert panel.judge is None


# --- several, and conversations -------------------------------------------------------------------


def test_several_answer_side_by_side_and_are_scored(seat, capsys):
  panel, prompts = seat("sft", "ppo_ptx"), [PROMPT, "a\n"]
  dialogue.answer_all(panel, prompts, SETTINGS)
  shown = capsys.readouterr().out
  for number, prompt in enumerate(prompts):
    key = jax.random.fold_in(jax.random.key(SETTINGS.seed), number)  # the same for both
    given = [answer(who, prompt, key)[0] for who in panel.speakers]
    scores = [f"{speaker.score(panel.judge, prompt, one):+.3f}" for one in given]
    names = ["/sft", "/ppo_ptx"]
    for part in [f"> {prompt}", names[0], given[0].text, names[1], given[1].text, *scores]:
      assert part in shown, part
      shown = shown.split(part, 1)[1]
  assert given[0].text != given[1].text


def test_one_answer_is_all_that_stdout_holds(seat, capsys):
  panel = seat("sft", reward="rm")
  dialogue.answer_all(panel, [PROMPT], SETTINGS)
  out, err = capsys.readouterr()
  given, _ = answer(panel.speakers[0], key=jax.random.fold_in(jax.random.key(0), 0))
  assert out == given.text.removesuffix("\n") + "\n"
  assert re.fullmatch(
    rf"reward {speaker.score(panel.judge, PROMPT, given):+.3f}; {given.num_tokens} tokens( \(cut off\))?;"
    r" prefill [\d.]+, decode [\d.]+ tokens/s\n",
    err,
  )


class Chatting:
  """A tokenizer with a chat template, and one without."""

  def __init__(self, has_chat_template):
    self.has_chat_template = has_chat_template

  def render_chat(self, messages):
    return "".join(f"{message['role'][0]}:{message['content']};" for message in messages) + "a:"


@pytest.fixture
def heard(monkeypatch):
  """(panel of a chat model and a plain one, what each was given to read)."""
  prompts = []

  def reply(who, prompt, key, draw, on_text):
    prompts.append((who.name, prompt))
    if prompt == "stop":
      raise KeyboardInterrupt
    if prompt == "fail":
      raise UserError("too long")
    return speaker.Answer(f"R{len(prompts)}", 1, 2, True, 1.0, 1.0)

  monkeypatch.setattr(speaker, "answer", reply)
  chat, plain = (speaker.Speaker(n, Chatting(n == "chat"), None, None) for n in ("chat", "plain"))
  return dialogue.Panel([chat, plain], None, {chat}), prompts


def test_a_conversation_is_remembered_until_reset(heard, monkeypatch):
  panel, prompts = heard
  monkeypatch.setattr(sys, "stdin", io.StringIO("hi\\n\n\nmore\n/reset\nnew\n/quit\nnever\n"))
  system = dataclasses.replace(SETTINGS, system="S")
  dialogue.converse(panel, dialogue.typed_lines(), system)
  assert prompts == [
    ("chat", "s:S;u:hi\n;a:"),
    ("plain", "hi\n"),
    ("chat", "s:S;u:hi\n;a:R1;u:more;a:"),
    ("plain", "more"),
    ("chat", "s:S;u:new;a:"),
    ("plain", "new"),
  ]


def test_a_stopped_or_failed_answer_does_not_end_the_conversation(heard, capsys):
  panel, prompts = heard
  panel = dataclasses.replace(panel, speakers=panel.speakers[1:])
  dialogue.converse(panel, ["one", "stop", "fail", "two"], SETTINGS)
  assert [prompt for _, prompt in prompts] == ["one", "stop", "fail", "two"]
  assert "error: too long\n" in capsys.readouterr().err


def test_escapes_of_typed_prompts():
  assert dialogue.unescape(r"a\nb\tc\\n\d") == "a\nb\tc\\n\\d"


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("stage", "reward", "changes", "message"),
  [
    ("rm", "", {}, "rm must be a language model, and it is a reward model"),
    ("sft", "sft", {}, "sft must be a reward model, and it is a language model"),
    ("sft", "", {"chat": True}, "--chat needs a chat template, and .* of .*sft has none"),
    ("sft", "", {"system": "x"}, "--system='x' must go with a chat template"),
    ("none", "", {}, "none must be a Hugging Face folder or a .gguf file"),
    (
      "data",
      "",
      {},
      "data must be the folder of a finished stage, .* it has neither done.json nor",
    ),
  ],
)
def test_what_cannot_answer(seat, stage, reward, changes, message):
  with pytest.raises(ValueError, match=message) as error:
    seat(stage, reward=reward, **changes)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "changes", [{"temperature": -0.5}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}]
)
def test_settings_have_rules(changes):
  ((name, value),) = changes.items()
  with pytest.raises(ValueError, match=f"--{name}={value} must be "):
    dataclasses.replace(SETTINGS, draw=dataclasses.replace(DRAW, **changes)).validate()


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_is_what_a_key_can_be_made_of(seed):
  with pytest.raises(ValueError, match=f"--seed={seed} must be >= 0 and below"):
    dataclasses.replace(SETTINGS, seed=seed).validate()


def command(*arguments, **kwargs):
  command = [sys.executable, "-m", "instructjax", "generate", *arguments]
  return subprocess.run(
    command, cwd=test_main.ROOT, env=test_main.ENV, capture_output=True, text=True, **kwargs
  )


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--prompt=a"], "--checkpoint must have a value"),
    (["--checkpoint=x"], "one of --prompt, --prompt_file and --interactive must be given"),
    (["--checkpoint=x", "--prompt=a", "--interactive"], "one of --prompt, --prompt_file and"),
    (["--checkpoint=x", "hello"], "unexpected arguments ['hello']; a prompt is given as --prompt="),
    (
      ["--checkpoint=x", "--prompt_file=no.txt"],
      "--prompt_file=no.txt cannot be read: No such file",
    ),
    (["--top_p=a"], "flag --top_p=a: could not convert string to float"),
    (["--checkpoint=x", b"--prompt=a\xff"], "--prompt is not UTF-8 (character 2)"),
    (["--checkpoint=x", "--prompt=a", b"--system=\xff"], "--system is not UTF-8 (character 1)"),
  ],
)
def test_a_mistake_is_one_line(arguments, message):
  done = command(*arguments)
  assert (done.returncode, done.stdout) == (2, "")
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and message in line


def test_the_command_answers(run, seat):
  (who,) = seat("sft").speakers
  shared = [f"--checkpoint={run[0] / 'sft'}", "--max_new_tokens=24", "--seed=7"]
  done = command(*shared, "--interactive", input=PROMPT.replace("\n", "\\n") + "\n")
  given, _ = answer(who, PROMPT, jax.random.fold_in(jax.random.key(7), 0))
  assert (done.returncode, done.stdout) == (0, given.text.removesuffix("\n") + "\n"), done.stderr
