"""What a sentencepiece model may not hold, and how tokens are found in a text."""

import pytest
from sentencepiece import sentencepiece_model_pb2

from instructjax.core.errors import UserError
from instructjax.data import sentencepiece_file
from instructjax.data.special_tokens import Added

NORMAL = 1


def model(*pieces) -> bytes:
  """A unigram model of <unk>, </s> and these pieces, (text, type)."""
  proto = sentencepiece_model_pb2.ModelProto()
  known = (("<unk>", sentencepiece_file.UNKNOWN), ("</s>", sentencepiece_file.CONTROL))
  for text, kind in (*known, *pieces):
    proto.pieces.add(piece=text, score=-1.0, type=kind)
  proto.normalizer_spec.add_dummy_prefix = False
  return proto.SerializeToString()


LETTERS = [(letter, NORMAL) for letter in "abc<>"]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "has 0 unknown pieces, and must have one"),
    (b"no model", "F is not a sentencepiece model file"),
    (model(("<other>", sentencepiece_file.UNKNOWN)), "has 2 unknown pieces, and must have one"),
    (model(("a", NORMAL), ("a", NORMAL)), "F: the text 'a' of piece 3 is that of piece 2"),
    (model(("", NORMAL)), "F: the text '' of piece 2 is empty"),
    (
      model(("\u2581x", NORMAL)).replace(b"\xe2\x96\x81x", b"\xe2\x96\xffx"),
      "of piece 2 is not UTF",
    ),
  ],
)
def test_what_is_refused(content, message):
  with pytest.raises(UserError, match=message):
    sentencepiece_file.kinds("F", content)


def test_a_model_without_some_of_its_pieces():
  content = model(*LETTERS, ("<b>", NORMAL), ("<c>", sentencepiece_file.USER_DEFINED))
  whole = sentencepiece_file.processor("F", content)
  assert whole.encode("a<b><c>") == [2, 7, 8]
  # a < b > < c >
  assert sentencepiece_file.without("F", content, [7, 8]).encode("a<b><c>") == [2, 5, 3, 6, 5, 4, 6]


def test_tokens_are_found_longest_first_and_take_the_blanks_that_are_theirs():
  ids = {"<a>": 1, "<a>b": 2, "c": 3, "<d>": 4}
  added = {3: Added("c", single_word=True), 4: Added("<d>", lstrip=True, rstrip=True)}
  find = sentencepiece_file.token_pattern(ids, added)
  assert list(find("<a>b<a> c cc")) == [(0, 4, 2), (4, 7, 1), (8, 9, 3)]
  assert list(find("x \n<d>  y")) == [(1, 8, 4)]
  assert sentencepiece_file.token_pattern({}, {}) is None
