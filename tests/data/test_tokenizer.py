import json
import os
import random
import shutil
import string

import pytest
import sentencepiece

from instructjax.data import tokenizer as tokenizer_lib
from instructjax.data.tokenizer import agree, load, train_tokenizer

RNG = random.Random(0)
WORDS = ["".join(RNG.choices(string.ascii_lowercase, k=RNG.randint(2, 8))) for _ in range(150)]
WORDS += ["the", "king", "heard"]
LINES = [
  " ".join(word + RNG.choice(["", "", ",", ".", ";", " (it)"]) for word in RNG.choices(WORDS, k=8))
  for _ in range(360)
]
TEXTS = ["\n".join(LINES[start : start + 6]) for start in range(0, 360, 6)]
TEXTS.append("\ufb01ne \u00bd\ttab")  # a ligature and a fraction, which NFKC would rewrite
SIZE = 180


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return train_tokenizer(TEXTS, SIZE, tmp_path_factory.mktemp("tokenizer") / "a.model", seed=0)


def test_sizes_and_special_ids(tokenizer):
  assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (SIZE, SIZE, 1)


@pytest.mark.parametrize(
  "text",
  [
    TEXTS[0],
    "the king",
    " the king",
    "the king ",
    "the  king   heard",
    "\nthe king\n\n a servant\n",
    "the king\n",
    "\n",
    "   ",
    "",
    "kingking; (it)",
    "king\t\ufb01 \u00bd",
  ],
)
def test_spaces_and_newlines_survive(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompt_and_response_meet_without_loss(tokenizer):
  for prompt, response in [("the king", "heard."), ("the king", " heard."), ("the\n", "king\n")]:
    ids = tokenizer.encode(prompt), tokenizer.encode(response)
    assert "".join(map(tokenizer.decode, ids)) == prompt + response


@pytest.mark.parametrize("letters", ["xyz", "0123", "\u0436\u0437"])
def test_a_text_may_lack_the_letters_a_and_b(tmp_path, letters):
  words = ["".join(RNG.choices(letters, k=RNG.randint(2, 8))) for _ in range(400)]
  text = "\n".join(words)
  small = train_tokenizer([text], 60, tmp_path / "a.model", seed=0)
  assert small.decode(small.encode(text)) == text


def test_a_word_is_one_piece_wherever_it_stands(tokenizer):
  first, second = tokenizer.encode("king king")
  assert first == second
  assert tokenizer.encode("king\nking") == [first, tokenizer.newline_id, first]


def test_pieces_are_near_words(tokenizer):
  ids = [tokenizer.encode(word) for word in WORDS]
  assert sum(len(word_ids) == 1 for word_ids in ids) > 0.9 * len(WORDS)


def test_details_2_text_never_encodes_to_eos_or_pad(tokenizer):
  ids = tokenizer.encode("</s> <unk> the king \u2581 é")
  assert tokenizer.eos_id not in ids
  assert max(ids) < tokenizer.vocab_size


def test_decode_drops_eos_and_pads_and_shows_the_unknown(tokenizer):
  king = tokenizer.encode("king")
  assert tokenizer.decode([*king, tokenizer.eos_id, *[tokenizer.pad_id] * 3, 10**6]) == "king"
  assert tokenizer.decode(tokenizer.encode("king é")) == "king \ufffd"


def test_training_is_deterministic(tokenizer, tmp_path):
  again = train_tokenizer(TEXTS, SIZE, tmp_path / "elsewhere" / "b.model", seed=0)
  assert again.fingerprint == tokenizer.fingerprint
  fewer = train_tokenizer(TEXTS[1:], SIZE, tmp_path / "c.model", seed=0)
  assert fewer.fingerprint != tokenizer.fingerprint
  assert sorted(file.name for file in tmp_path.iterdir()) == ["c.model", "elsewhere"]


def test_much_text_is_sampled_by_the_seed(monkeypatch, tmp_path):
  monkeypatch.setattr(tokenizer_lib, "_MAX_TRAINING_CHARACTERS", sum(map(len, TEXTS)) // 3)
  lines = [len(tokenizer_lib._training_lines(TEXTS, seed)) for seed in (0, 0, 1)]
  assert 6 * 20 <= lines[0] == lines[1] <= 6 * 22
  drawn = [tokenizer_lib._training_lines(TEXTS, seed) for seed in (0, 0, 1)]
  assert drawn[0] == drawn[1] != drawn[2]


def test_a_line_of_any_length_is_used(tmp_path):
  # Sentencepiece skips lines over 4192 bytes unless told otherwise: Q would have no piece.
  tokenizer = train_tokenizer([*TEXTS, "Q " * 5000], SIZE, tmp_path / "a.model", seed=0)
  assert tokenizer.decode(tokenizer.encode("Q")) == "Q"


def test_lines_may_be_short(tmp_path):
  tokenizer = train_tokenizer(["ab", "b c", "a"], 7, tmp_path / "a.model", seed=0)
  assert tokenizer.decode(tokenizer.encode("cab")) == "cab"


def test_tokenizers_agree_if_ids_mean_the_same(tokenizer, tmp_path):
  tokenizer.save(tmp_path / "same")
  same = load(tmp_path / "same")
  assert agree(tokenizer, same)
  same.fingerprint = "another chat template"
  assert agree(tokenizer, same)
  decode = same.decode
  same.decode = lambda ids: decode(ids) if ids != [9] else "another piece"
  assert not agree(tokenizer, same)
  same.decode, same.vocab_size = decode, tokenizer.vocab_size + 1  # a token was added
  assert agree(tokenizer, same) and not agree(same, tokenizer)
  same.encode = lambda text: [4]
  assert not agree(tokenizer, same)


def test_a_saved_file_loads_the_same(tokenizer, tmp_path):
  path = tmp_path / "a.model"
  saved = train_tokenizer(TEXTS, SIZE, path, seed=0)
  moved = load(shutil.move(path, tmp_path / "b.model"))
  assert moved.fingerprint == saved.fingerprint == tokenizer.fingerprint
  assert moved.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


@pytest.mark.parametrize("size", [5, 10_000])
def test_an_impossible_size_is_refused(tmp_path, size):
  with pytest.raises(ValueError, match=rf"tokenizer.vocab_size={size} pieces: [VI]\w+.*\d"):
    train_tokenizer(TEXTS, size, tmp_path / "a.model", seed=0)
  assert not list(tmp_path.iterdir())


def test_no_text_is_refused(tmp_path):
  with pytest.raises(ValueError, match="there is no text"):
    train_tokenizer(["\n", ""], SIZE, tmp_path / "a.model", seed=0)


def test_bad_files_are_refused(tokenizer, tmp_path):
  with pytest.raises(ValueError, match=r"no.model cannot be read: No such file"):
    load(tmp_path / "no.model")
  pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
  for name in ("tokenizer.model", "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
    folder = tmp_path / name.replace(".", "-")
    folder.mkdir()
    tokenizer.save(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / name).write_bytes(pointer)
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer"):
      load(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)  # to open it would wait for a writer
    with pytest.raises(
      ValueError, match=f"{name} must be a file, and it is a folder, a pipe or a device"
    ):
      load(folder)
  with pytest.raises(ValueError, match="/dev/zero must be a file"):
    load("/dev/zero")
  for content in (b"", b"not a model", b"\x00" * 100):
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(ValueError, match="bad.model' is not a sentencepiece model file"):
      load(tmp_path / "bad.model")


def foreign_file(path, **options):
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([line for text in TEXTS for line in text.split("\n")]),
    model_prefix=str(path.with_suffix("")),
    num_threads=1,
    minloglevel=2,
    **options,
  )
  return path


def test_a_file_without_eos_is_refused(tmp_path):
  path = foreign_file(tmp_path / "a.model", vocab_size=SIZE, eos_id=-1, byte_fallback=False)
  with pytest.raises(ValueError, match="has no end-of-sequence piece"):
    load(path)


def test_a_file_that_loses_newlines_is_refused(tmp_path):
  path = foreign_file(tmp_path / "a.model", vocab_size=SIZE)
  with pytest.raises(ValueError, match="loses newlines"):
    load(path)


def test_a_file_in_the_style_of_llama_is_used_as_it_is(tmp_path):
  options = dict(byte_fallback=True, normalization_rule_name="identity")
  path = foreign_file(
    tmp_path / "a.model", vocab_size=SIZE + 256, remove_extra_whitespaces=False, **options
  )
  tokenizer = load(path)
  text = "the king\n\n  heard é"
  assert tokenizer.newline_id is None
  assert tokenizer.decode(tokenizer.encode(text)) == text
  plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
  assert tokenizer.encode(text) == plain.encode(text)


def test_a_file_alone_has_no_bos_no_specials_and_no_chat(tokenizer, tmp_path):
  tokenizer.save(tmp_path / "saved")
  assert [path.name for path in (tmp_path / "saved").iterdir()] == ["tokenizer.model"]
  again = load(tmp_path / "saved")
  assert (again.fingerprint, again.bos_id) == (tokenizer.fingerprint, None)
  assert again.path == tmp_path / "saved" / "tokenizer.model"
  text = "the king</s>\nheard"
  assert again.encode_prompt(text) == again.encode(text) == tokenizer.encode(text)
  with pytest.raises(ValueError, match="tokenizer.model has no chat template, which chat messages"):
    again.chats.render_one([{"role": "user", "content": "the"}])


@pytest.fixture
def llama_folder(tmp_path):
  """llama_folder(**config): a folder with a model in the style of Llama and its config."""
  options = dict(byte_fallback=True, normalization_rule_name="identity")
  foreign_file(
    tmp_path / "tokenizer.model", vocab_size=SIZE + 256, remove_extra_whitespaces=False, **options
  )

  def write(**config):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path

  return write


def test_a_folder_says_what_begins_and_ends_a_prompt(llama_folder):
  flags = {"add_bos_token": True, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
  tokenizer = load(llama_folder(**flags))
  king = tokenizer.encode("king")
  assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
  assert tokenizer.encode_prompt("king") == tokenizer.encode_prompt("<s>king") == [1, *king]
  assert tokenizer.encode_prompt("king</s><s>king") == [1, *king, 2, 1, *king]
  assert not {1, 2} & set(tokenizer.encode("<s>king</s>"))
  assert tokenizer.decode(tokenizer.encode_prompt("king</s>")) == "king"
  without = load(llama_folder(bos_token="<s>"))
  assert without.bos_id is None and without.encode_prompt("king") == king
  assert load(llama_folder(eos_token="<s>")).eos_id == 1


def test_a_folder_saves_and_renders_chats(llama_folder, tmp_path):
  template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
  flags = {"add_bos_token": True, "bos_token": "<s>", "chat_template": template}
  tokenizer = load(llama_folder(**flags))
  assert tokenizer.chats.render_one([{"role": "user", "content": "king"}]) == "<s>king</s>"
  with pytest.raises(
    ValueError, match="message 1 of a chat must not hold the special token '</s>'"
  ):
    tokenizer.chats.render_one([{"role": "user", "content": "king</s>"}])
  tokenizer.save(tmp_path / "saved")
  again = load(tmp_path / "saved")
  assert (again.fingerprint, again.bos_id) == (tokenizer.fingerprint, 1)
  assert again.chats.render_one([{"role": "user", "content": "king"}]) == "<s>king</s>"
  other = load(llama_folder(**flags | {"add_bos_token": False})).fingerprint
  assert len({tokenizer.fingerprint, other, load(llama_folder()).fingerprint}) == 3


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"add_bos_token": True}, "tokenizer_config.json asks for a BOS token and names none"),
    ({"eos_token": "<|im_end|>"}, r"tokenizer.model' has no piece '<\|im_end\|>', its BOS or EOS"),
    ({"eos_token": "▁king"}, "encodes the text of its EOS to EOS"),
  ],
)
def test_special_tokens_that_do_not_fit_are_refused(llama_folder, config, message):
  with pytest.raises(ValueError, match=message):
    load(llama_folder(**config))


def test_a_template_beside_a_sentencepiece_model_counts_without_a_config(tmp_path):
  texts = ["in the beginning was the word, and the word was good.\n" * 3] * 20
  train_tokenizer(texts, 20, tmp_path / "tokenizer.model", 0)
  assert not load(tmp_path).chats.has_template
  (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
  assert load(tmp_path).chats.has_template
