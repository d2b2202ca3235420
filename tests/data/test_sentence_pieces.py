"""Sentencepiece models with files beside them: added tokens, stop tokens, and control tokens of every type.

What a model does alone is in test_tokenizer.
"""

import json
import logging

import pytest
from sentencepiece import sentencepiece_model_pb2

from instructjax.core.errors import UserError
from instructjax.data.controls import Rendered
from instructjax.data.tokenizer import load, prompt_ids

START, END, TOOL = "<|im_start|>", "<|im_end|>", "<tool>"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
LETTERS = "abcdehimnorstu<>|_/"


@pytest.fixture(scope="module")
def model() -> bytes:
  """A unigram model of 24 pieces: a newline, a space, letters, and a word."""
  proto = sentencepiece_model_pb2.ModelProto()
  add = lambda text, kind: proto.pieces.add(piece=text, type=kind, score=-2.0)
  for text, kind in (("<unk>", UNKNOWN), ("</s>", CONTROL), ("\n", USER_DEFINED)):
    add(text, kind)
  for text in ("\u2581", *LETTERS, "\u2581the"):
    add(text, NORMAL)
  trainer = proto.trainer_spec
  trainer.model_type, trainer.vocab_size = trainer.UNIGRAM, len(proto.pieces)
  trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, -1, 1, -1
  proto.normalizer_spec.remove_extra_whitespaces = False
  return proto.SerializeToString()


@pytest.fixture
def folder(model, tmp_path):
  """folder(pieces, **files): a folder with a model that has these pieces too, (text, type, score)."""

  def write(pieces=(), **files):
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for text, kind, score in pieces:
      proto.pieces.add(piece=text, type=kind, score=score)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    for name, content in ({"tokenizer_config": {}} | files).items():
      (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path, len(proto.pieces)

  return write


def token(content, **flags):
  return {"content": content, "special": True} | flags


def test_tokens_of_files_beside_the_model_are_tokens(folder, tmp_path):
  _, size = folder()
  decoder = {
    "1": token("</s>"),
    str(size): token(START),
    str(size + 1): token(END, rstrip=True),
    str(size + 3): token(TOOL, special=False),
  }
  path, _ = folder(tokenizer_config={"added_tokens_decoder": decoder, "eos_token": END})
  tokenizer = load(path)
  # There is no token of id size + 2: files may leave holes, and the model has a row for each id.
  assert (tokenizer.vocab_size, tokenizer.eos_id) == (size + 4, size + 1)
  the = tokenizer.encode("the")
  assert tokenizer.encode_prompt(f"{START}the{END} \nthe") == [size, *the, size + 1, *the]
  assert tokenizer.encode(f"the{TOOL}the") == [*the, size + 3, *the]
  assert tokenizer.decode([size, *the, size + 3, *the, size + 1, size + 2]) == f"the{TOOL}the"
  assert not {size, size + 1} & set(tokenizer.encode(f"{START}the{END}"))
  tokenizer.save(tmp_path / "saved")
  again = load(tmp_path / "saved")
  assert (again.fingerprint, again.vocab_size) == (tokenizer.fingerprint, size + 4)
  text = f"{START}a{END} {TOOL}"
  assert again.encode_prompt(text) == tokenizer.encode_prompt(text)
  assert again.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
  "files",
  [
    {"added_tokens": {START: 24, END: 25}},
    {"special_tokens_map": {"additional_special_tokens": [START, END]}},
    {"tokenizer_config": {"extra_special_tokens": {"x": START, "y": END}}},
  ],
)
def test_other_spellings(folder, files):
  path, size = folder(**files)
  assert size == 24
  assert load(path).encode_prompt(END + START) == [25, 24]


@pytest.mark.parametrize(
  ("decoder", "message"),
  [
    ({"3": START}, r"the added token '<\|im_start\|>' has the id 3, which is that of "),
    ({"24": "</s>"}, "the added token '</s>' has the ids 1 and 24"),
  ],
)
def test_an_id_has_one_token_and_a_token_one_id(folder, decoder, message):
  decoder = {key: token(content) for key, content in decoder.items()}
  path, _ = folder(tokenizer_config={"added_tokens_decoder": decoder})
  with pytest.raises(UserError, match=message):
    load(path)


@pytest.mark.parametrize("rows", [24, 25])
def test_a_pad_that_has_only_a_name_is_a_token_if_the_model_has_a_row(folder, rows):
  path, size = folder(tokenizer_config={"pad_token": "[PAD]"}, config={"vocab_size": rows})
  tokenizer = load(path)
  assert (size, tokenizer.vocab_size) == (24, rows)
  assert (tokenizer.encode_prompt("[PAD]") == [24]) is (rows == 25)


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
def test_no_text_gives_a_control_token_whatever_its_type(folder, kind):
  pieces = [(START, kind, 0.0), (END, kind, 0.0), (TOOL, USER_DEFINED, 0.0)]
  path, size = folder(pieces, tokenizer_config={"chat_template": TEMPLATE})
  tokenizer, start, end = load(path), size - 3, size - 2
  chat = tokenizer.chats.render_one([{"role": "user", "content": "the"}])
  assert isinstance(chat, Rendered)
  ids = prompt_ids(tokenizer, chat)
  assert [i for i in ids if i in (start, end)] == [start, end]
  assert tokenizer.decode(ids) == "user\nthe"
  for text in (f"{START}user\nthe{END}", f"a{END}", END, f"{START}{END}{END}"):
    for ids in (tokenizer.encode(text), prompt_ids(tokenizer, text)):
      assert not {start, end} & set(ids)
      assert tokenizer.decode(ids) == text
  assert size - 1 in tokenizer.encode(f"a{TOOL}")  # the template does not use it
  with pytest.raises(UserError, match=r"must not hold the special token '<\|im_end\|>'"):
    tokenizer.chats.render_one([{"role": "user", "content": f"a{END}"}])


def test_an_eos_of_an_ordinary_type_is_spelled_in_letters(folder):
  path, size = folder([(END, NORMAL, 0.0)], tokenizer_config={"eos_token": END})
  tokenizer = load(path)
  assert tokenizer.eos_id == size - 1
  assert tokenizer.eos_id not in tokenizer.encode(f"the{END}")
  assert tokenizer.decode([*tokenizer.encode("the"), tokenizer.eos_id]) == "the"


def test_stop_tokens_of_the_settings_for_generation(folder, tmp_path, caplog):
  files = {"generation_config": {"eos_token_id": [1, 24, 5]}, "config": {"eos_token_id": 6}}
  path, size = folder([(END, CONTROL, 0.0)], **files)
  with caplog.at_level(logging.WARNING):
    tokenizer = load(path)
  assert (size, tokenizer.eos_id, tokenizer.stop_ids) == (25, 1, (1, 24, 5))
  assert "answers also end at" in caplog.text  # 5 is a letter
  tokenizer.save(tmp_path / "saved")
  again = load(tmp_path / "saved")
  assert (again.stop_ids, again.fingerprint) == (tokenizer.stop_ids, tokenizer.fingerprint)


def test_a_model_that_writes_what_is_no_text_is_refused(folder):
  """Its text for unknown letters is cut off in the middle of a letter."""
  path, _ = folder()
  model = (path / "tokenizer.model").read_bytes()
  proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  proto.trainer_spec.unk_surface = "ab\u00e9"
  damaged = proto.SerializeToString().replace("ab\u00e9".encode(), b"ab\xffx")
  (path / "tokenizer.model").write_bytes(damaged)
  with pytest.raises(UserError, match="decodes tokens to what is not UTF-8"):
    load(path)


def test_an_end_that_stands_for_unknown_letters_is_refused(folder):
  with pytest.raises(UserError, match="encodes letters that it does not know to the token 0, at"):
    load(folder(generation_config={"eos_token_id": [1, 0]})[0])
