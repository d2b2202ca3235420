"""Passages with questions, in the form of the published samples."""

from instructjax.evaluation import reading


def test_conversation():
  text = reading.conversation("Title: T\n\nBackground: B.", (("q1?", "a1"),), "q2?")
  assert text == "Title: T\n\nBackground: B.\n\nQ: q1?\n\nA: a1\n\nQ: q2?\n\nA:"


def test_joined():
  assert reading.joined("Do it.", ["one", "two"], "three") == "Do it.\n\none\n\ntwo\n\nthree"
  assert reading.joined("", [], "three") == "three"
