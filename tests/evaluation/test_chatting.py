"""Questions as chats: what the user says, what is the answer, and what stays as it is."""

import pytest

from instructjax.core.errors import UserError
from instructjax.data.controls import Rendered
from instructjax.evaluation import chatting
from instructjax.evaluation.task import Choices, Question


def render_all(chats):
  for ((said),) in chats:
    assert said["role"] == "user"
    is_bad = "refused" in said["content"]
    yield UserError("no") if is_bad else Rendered(f"<u>{said['content']}</u><a>")


def test_contexts_and_prompts_become_what_the_user_says():
  asks = [
    Choices((("Is it so?", " yes"), ("Is it so?", " no"))),
    Question("Q: who?\n\nA:", 8, ("\n",)),
    Choices((("", " A text of its own."), ("It is", " so"))),
  ]
  choices, question, mixed = chatting.as_chats(render_all, asks)
  assert choices.pairs == (("<u>Is it so?</u><a>", "yes"), ("<u>Is it so?</u><a>", "no"))
  assert question == Question("<u>Q: who?\n\nA:</u><a>", 8, ("\n",))
  assert mixed.pairs == (("", " A text of its own."), ("<u>It is</u><a>", "so"))
  # Else control tokens of the template would be text.
  texts = [choices.pairs[0][0], question.prompt, mixed.pairs[1][0]]
  assert all(isinstance(text, Rendered) for text in texts)


def test_each_text_is_rendered_once():
  seen = []

  def counted(chats):
    seen.extend(chats)
    return render_all(chats)

  chatting.as_chats(counted, [Choices((("a", "b"), ("a", "c"))), Question("a", 1)])
  assert len(seen) == 1


def test_a_template_that_refuses_ends_the_command():
  with pytest.raises(UserError, match="no"):
    chatting.as_chats(render_all, [Question("refused", 1)])
