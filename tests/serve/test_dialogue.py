"""Answering prompts: who answers and who judges, conversations, and what a mistake says.

Weights are random: nothing is trained here.
"""

import dataclasses
import io
import re
import shutil
import sys
import types

import jax
import pytest

from instructjax.core.errors import UserError
from instructjax.serve import dialogue, speaker
from tests.commands import test_generate
from tests.serve.speaking import DRAW, PROMPT, SETTINGS, answer


def test_stages_of_one_run_are_judged_by_its_own(run, seat, tmp_path):
  assert seat("sft").judge is None
  assert seat("sft", "ppo_ptx").judge.name == str(run[0] / "rm")
  shutil.copytree(run[0], tmp_path / "other")
  panel = dialogue.seat([str(run[0] / "sft"), str(tmp_path / "other" / "sft")], "", SETTINGS)
  assert panel.judge is None


def test_a_run_whose_reward_model_was_given_has_no_judge_of_its_own(run, monkeypatch):
  """Its rm stage has only measured the given one."""
  opened = [dialogue.weights.locate(run[0] / stage) for stage in ("sft", "ppo_ptx")]
  assert dialogue._own_judge(opened) == str(run[0] / "rm")
  measured = types.SimpleNamespace(step=None)
  monkeypatch.setattr(dialogue.finished, "read_done", lambda folder: measured)
  assert dialogue._own_judge(opened) == ""


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

  def __init__(self, has_template):
    self.has_template = has_template
    self.chats = self  # what a tokenizer makes of chats

  def render_one(self, messages):
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


def test_several_answers_to_a_prompt_begin_with_the_one_that_it_has_alone(seat, capsys):
  panel = seat("sft", reward="rm")
  three = dataclasses.replace(SETTINGS, num_samples=3)
  shown = []
  for _ in range(2):
    dialogue.answer_all(panel, [PROMPT], three)
    shown.append(capsys.readouterr().out)
  key = jax.random.fold_in(jax.random.key(SETTINGS.seed), 0)
  keys = [key, jax.random.fold_in(key, 1), jax.random.fold_in(key, 2)]
  given = [answer(panel.speakers[0], PROMPT, k)[0] for k in keys]
  assert len({one.text for one in given}) == 3
  scores = [f"{speaker.score(panel.judge, PROMPT, one):+.3f}" for one in given]
  rest = shown[0]
  for number, one in enumerate(given, start=1):
    rest = rest.split(f"answer {number} of 3 ─", 1)[1]
    assert one.text in rest
  for number, score in enumerate(scores, start=1):
    assert re.search(rf"answer {number} of 3 +│ +{re.escape(score)}", rest)
  texts = [text.split("┏")[0] for text in shown]  # less the table, which has speeds
  assert texts[0] == texts[1]


def test_several_answers_need_random_numbers():
  greedy = dataclasses.replace(SETTINGS.draw, temperature=0.0)
  with pytest.raises(UserError, match="--num_samples=2 must be 1 with --greedy"):
    dataclasses.replace(SETTINGS, draw=greedy, num_samples=2).validate()
  with pytest.raises(UserError, match="--num_samples=0 must be >= 1"):
    dataclasses.replace(SETTINGS, num_samples=0).validate()


def speaking(monkeypatch, text):
  """A panel of one model that always answers with this text."""

  def reply(who, prompt, key, draw, on_text):
    on_text(text)
    return speaker.Answer(text, 1, 2, True, 1.0, 1.0)

  monkeypatch.setattr(speaker, "answer", reply)
  return dialogue.Panel([speaker.Speaker("x[/b]", Chatting(False), None, None)], None, set())


def test_what_a_terminal_obeys_is_shown_as_an_escape(monkeypatch, capsys):
  panel = speaking(monkeypatch, "a\x1b]52;c;aGk=\x07\r\x08\x9b2J\u202e[red]\n\tb")
  dialogue.answer_all(panel, ["[/x]\x1b[2J\n", "b"], SETTINGS)
  shown = capsys.readouterr().out
  reply = "a\\x1b]52;c;aGk=\\x07\\r\\x08\\x9b2J\\u202e[red]\n\tb\n"
  assert shown == f"> [/x]\\x1b[2J\n\n{reply}> b\n{reply}"


@pytest.mark.parametrize(
  ("prompt", "hint"),
  [
    ("say", r"end with a newline, end yours with \n"),
    ("say\n", "the model ended it at once"),
  ],
)
def test_an_empty_answer_comes_with_a_hint(monkeypatch, capsys, prompt, hint):
  dialogue.answer_all(speaking(monkeypatch, "\n"), [prompt], SETTINGS)
  (line, _) = capsys.readouterr().err.splitlines()
  assert line.startswith("hint: the answer is empty") and line.endswith(hint)
  dialogue.answer_all(speaking(monkeypatch, "yes"), [prompt], SETTINGS)
  assert "hint" not in capsys.readouterr().err


def test_bad_lines_do_not_end_the_conversation(heard, monkeypatch, capsys):
  panel, prompts = heard
  panel = dataclasses.replace(panel, speakers=panel.speakers[1:])
  typed = b"say \xff\nnul \x00\n" + b"long " * 200_000 + "\né\r\n\x1b[2J\nlast".encode()
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
  dialogue.converse(panel, dialogue.typed_lines(), SETTINGS)
  asked = [prompt for _, prompt in prompts]
  assert asked == ["nul \0", "long " * 200_000, "é", "\x1b[2J", "last"]
  assert "error: the line is not UTF-8 (character 5) and was left out\n" in capsys.readouterr().err


def test_a_closed_stdin_has_no_lines(monkeypatch):
  monkeypatch.setattr(sys, "stdin", None)
  assert [*dialogue.typed_lines()] == []


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


def test_the_command_answers(run, seat):
  (who,) = seat("sft").speakers
  shared = [f"--checkpoint={run[0] / 'sft'}", "--max_new_tokens=24", "--seed=7"]
  done = test_generate.command(*shared, "--interactive", input=PROMPT.replace("\n", "\\n") + "\n")
  given, _ = answer(who, PROMPT, jax.random.fold_in(jax.random.key(7), 0))
  assert (done.returncode, done.stdout) == (0, given.text.removesuffix("\n") + "\n"), done.stderr
