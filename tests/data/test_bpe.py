import json
import random
import string

import pytest
import tokenizers
from tokenizers import (
  AddedToken,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from instructjax.data.tokenizer import load
from tests.data import added_spellings

RNG = random.Random(0)
WORDS = ["".join(RNG.choices(string.ascii_lowercase, k=RNG.randint(2, 6))) for _ in range(60)]
TEXTS = [" ".join(RNG.choices([*WORDS, "the", "King\n", "end"], k=20)) for _ in range(60)]
START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
  "{% for m in messages %}{{ bos_token }}{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
  "{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}"
)


def trained(alphabet=None, specials=(START, END)) -> tokenizers.Tokenizer:
  """A byte-level BPE of 330 tokens, the specials first."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=330,
    special_tokens=list(specials),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet,
    show_progress=False,
  )
  tokenizer.train_from_iterator(TEXTS, trainer)
  return tokenizer


@pytest.fixture(scope="session")
def definition() -> str:
  return trained().to_str()


@pytest.fixture
def raw(definition) -> tokenizers.Tokenizer:
  return tokenizers.Tokenizer.from_str(definition)


@pytest.fixture
def folder(tmp_path):
  """folder(raw, **config): a Hugging Face folder; the config goes into tokenizer_config.json."""

  def write(tokenizer, **config):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END} | config))
    return tmp_path

  return write


def test_sizes_and_special_ids(raw, folder):
  tokenizer = load(folder(raw))
  assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (330, 330, 1)
  assert tokenizer.bos_id is None
  assert tokenizer.newline_id == raw.token_to_id("Ċ")
  assert tokenizer.path == folder(raw) / "tokenizer.json"


@pytest.mark.parametrize(
  "text",
  [
    TEXTS[0],
    " the  King\n\n the\tend \n",
    "naïve Ärger ﬁne ½ 東京 שלום",
    "🙂👩‍👩‍👧 e\u0301 \u200b",
    "def f(x):\n    return {'a': x**2}  # 12345\r\n",
    "".join(map(chr, range(32))) + "\x7f\ufeff",
    "",
  ],
)
def test_any_text_survives_and_is_encoded_as_the_package_does(raw, folder, text):
  tokenizer = load(folder(raw))
  assert tokenizer.encode(text) == tokenizer.encode_prompt(text) == raw.encode(text).ids
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompt_and_response_meet_without_loss(raw, folder):
  tokenizer = load(folder(raw))
  for prompt, response in [("the King", "end"), ("the ", " end"), ("the\n", "\nend\n")]:
    ids = tokenizer.encode_prompt(prompt), tokenizer.encode(response)
    assert "".join(map(tokenizer.decode, ids)) == prompt + response


def test_special_tokens_are_text_in_documents_and_recognised_in_prompts(raw, folder):
  tokenizer = load(folder(raw))
  text = f"{START}user\nthe{END}"
  ids = tokenizer.encode(text)
  assert not {0, 1} & set(ids)
  assert tokenizer.decode(ids) == text
  prompt = tokenizer.encode_prompt(text)
  assert (prompt[0], prompt[-1]) == (0, 1)
  assert tokenizer.decode(prompt) == "user\nthe"
  assert tokenizer.encode(text) == ids  # no state is left behind


def test_an_eos_that_its_file_does_not_call_special_is_special(raw, folder):
  raw.add_tokens([AddedToken("<eot>", special=False, normalized=False), "<tool>"])
  tokenizer = load(folder(raw, eos_token={"content": "<eot>", "lstrip": False}))
  assert tokenizer.eos_id == 330
  assert tokenizer.eos_id not in tokenizer.encode("the<eot>")
  assert tokenizer.encode_prompt("the<eot>")[-1] == 330
  assert tokenizer.decode([*tokenizer.encode("the"), 330]) == "the"
  assert tokenizer.encode("<tool>") == [331]  # a token of the vocabulary like any other


def test_decode_drops_what_is_no_text(raw, folder):
  tokenizer = load(folder(raw))
  the = tokenizer.encode("the")
  assert tokenizer.decode([0, *the, 1, tokenizer.pad_id, 10**6, -1]) == "the"


def test_ids_without_a_token_are_allowed_in_the_vocabulary(raw, folder, tmp_path):
  content = json.loads(raw.to_str())
  content["model"]["vocab"]["far"] = 400
  path = folder(raw)
  (path / "tokenizer.json").write_text(json.dumps(content))
  tokenizer = load(path)
  assert (tokenizer.vocab_size, tokenizer.pad_id) == (401, 401)
  assert tokenizer.decode([350, *tokenizer.encode("the"), 400]) == "thefar"
  tokenizer.save(tmp_path / "saved")
  assert load(tmp_path / "saved").fingerprint == tokenizer.fingerprint
  # The package counts tokens, and would give this one the id 331 in silence.
  content["added_tokens"].append(content["added_tokens"][1] | {"id": 410, "content": "<far>"})
  (path / "tokenizer.json").write_text(json.dumps(content))
  refuse(path, "added token '<far>' must have the next free id, 331, has 410")


def llama3_style(raw, token=START):
  raw.post_processor = processors.Sequence(
    [
      processors.ByteLevel(trim_offsets=True),
      processors.TemplateProcessing(
        single=f"{token} $A {END}", pair="$A $B", special_tokens=[(token, 0), (END, 1)]
      ),
    ]
  )
  return raw


def test_bos_is_what_the_post_processor_begins_with(raw, folder):
  the = raw.encode("the").ids
  tokenizer = load(folder(llama3_style(raw), chat_template=TEMPLATE))
  assert tokenizer.bos_id == 0
  assert tokenizer.encode_prompt("the") == [0, *the]  # and no EOS, which it also adds
  assert tokenizer.encode_prompt(START + "the") == [0, *the]
  assert tokenizer.encode_prompt("") == [0]
  assert tokenizer.encode("the") == the
  prompt = tokenizer.chats.render_one([{"role": "user", "content": "the"}])
  assert tokenizer.encode_prompt(prompt).count(0) == 2  # the template's own, of two turns


def test_bos_where_a_flag_asks_for_it(raw, folder, tmp_path):
  the = raw.encode("the").ids
  flags = {"bos_token": START, "add_bos_token": True}
  assert load(folder(raw, bos_token=START)).encode_prompt("the") == the
  tokenizer = load(folder(raw, **flags))
  assert tokenizer.encode_prompt("the") == [0, *the]
  tokenizer.save(tmp_path / "saved")
  saved = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
  assert saved.encode("the").ids == [0, *the]  # which tells other readers
  with pytest.raises(
    ValueError, match=r"tokenizer_config.json asks for a BOS token and names none"
  ):
    load(folder(raw, add_bos_token=True))


def test_truncation_and_padding_of_the_file_are_off(raw, folder):
  raw.enable_truncation(3)
  raw.enable_padding(length=8)
  tokenizer = load(folder(raw))
  assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
  assert tokenizer.decode(tokenizer.encode_prompt(TEXTS[0])) == TEXTS[0]
  assert len(tokenizer.encode("the")) < 3


def test_a_saved_folder_loads_the_same(raw, folder, tmp_path):
  tokenizer = load(folder(llama3_style(raw), chat_template=TEMPLATE))
  tokenizer.save(tmp_path / "a" / "b")
  again = load(tmp_path / "a" / "b")
  names = {path.name for path in (tmp_path / "a" / "b").iterdir()}
  assert names == {"tokenizer.json", "tokenizer_config.json"}
  assert again.fingerprint == tokenizer.fingerprint
  assert (again.bos_id, again.eos_id, again.vocab_size) == (0, 1, 330)
  chat = [{"role": "user", "content": "the"}]
  assert (
    again.chats.render_one(chat)
    == tokenizer.chats.render_one(chat)
    == f"""{START}user
the{END}
{START}assistant
"""
  )
  assert again.encode_prompt(TEXTS[0]) == tokenizer.encode_prompt(TEXTS[0])


def test_the_fingerprint_knows_vocabulary_specials_and_template(raw, folder):
  prints = [
    load(folder(raw)).fingerprint,
    load(folder(raw, eos_token=START)).fingerprint,
    load(folder(raw, bos_token=START)).fingerprint,
    load(folder(raw, bos_token=START, add_bos_token=True)).fingerprint,
    load(folder(raw, chat_template=TEMPLATE)).fingerprint,
  ]
  raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  prints.append(load(folder(raw)).fingerprint)
  assert len(set(prints)) == len(prints)


def test_characters_without_a_byte_symbol_are_lost(folder):
  # The byte 5 is written U+0105. SmolLM2 lacks the symbols of 21 control characters.
  alphabet = [symbol for symbol in pre_tokenizers.ByteLevel.alphabet() if symbol != "\u0105"]
  tokenizer = load(folder(trained(alphabet)))
  assert tokenizer.decode(tokenizer.encode("the\x05end\x06")) == "theend\x06"


def test_llama_2_style_files_are_used_as_they_are(folder):
  vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
  vocab |= {f"<0x{b:02X}>": 3 + b for b in range(256)}
  for token in ["▁", *string.ascii_letters, "th", "the", "▁the"]:
    vocab[token] = len(vocab)
  raw = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=[("t", "h"), ("th", "e"), ("▁", "the")],
      unk_token="<unk>",
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  raw.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  raw.add_special_tokens(["<unk>", "<s>", "</s>"])
  raw.post_processor = processors.TemplateProcessing(
    single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
  )
  tokenizer = load(folder(raw, eos_token="</s>", bos_token="<s>"))
  assert tokenizer.encode_prompt("the") == [1, vocab["▁the"]]
  for text in ["the end", " the\n\n  é🙂\t", "</s>"]:
    assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.eos_id not in tokenizer.encode("</s>")


def refuse(path, message):
  with pytest.raises(ValueError, match=message) as caught:
    load(path)
  assert "\n" not in str(caught.value)


def test_special_tokens_that_do_not_fit_are_refused(raw, folder, tmp_path):
  refuse(folder(raw, eos_token=None), r"tokenizer.json' has no end-of-sequence token")
  refuse(folder(raw, eos_token="</s>"), r"tokenizer.json' has no token '</s>', its BOS or EOS")
  (tmp_path / "config.json").write_text('{"eos_token_id": 330}')
  refuse(folder(raw, eos_token=None), "has no token 330, its BOS or EOS")
  word = min(token for token in raw.get_vocab() if len(token) > 2 and token.isalpha())
  refuse(folder(raw, eos_token=word), f"encodes the text '{word}' to its EOS")
  raw.post_processor = processors.TemplateProcessing(
    single=f"{START} {END} $A", pair="$A $B", special_tokens=[(START, 0), (END, 1)]
  )
  refuse(folder(raw), "must begin a text with one token, has 2")
  raw.post_processor = processors.TemplateProcessing(
    single=START, pair="$A $B", special_tokens=[(START, 0)]
  )
  refuse(folder(raw), "loses capitals, spaces or newlines")  # it leaves out the text


def test_a_tokenizer_that_loses_text_is_refused(raw, folder):
  raw.normalizer = normalizers.Lowercase()
  refuse(folder(raw), "tokenizer.json' loses capitals, spaces or newlines")
  words = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, END: 2}, unk_token="[UNK]"))
  words.pre_tokenizer = pre_tokenizers.Whitespace()
  refuse(folder(words), "loses capitals, spaces or newlines")
  refuse(folder(tokenizers.Tokenizer(models.BPE({END: 0}, []))), "loses capitals")


def test_files_that_are_no_tokenizer_are_refused(raw, tmp_path):
  refuse(tmp_path / "tokenizer.json", r"tokenizer.json cannot be read: No such file")
  refuse(tmp_path, "must hold one of tokenizer.json, tokenizer.model")
  for content in ("", "{", "[]", '{"version": "1.0"}', "\udcff"):
    (tmp_path / "tokenizer.json").write_bytes(content.encode(errors="surrogateescape"))
    refuse(tmp_path, r"tokenizer.json' is not a tokenizer.json: ")


@pytest.mark.parametrize("name", added_spellings.SPELLINGS)
def test_tokens_beside_the_file_are_those_of_transformers(name, tmp_path):
  files, expected = added_spellings.SPELLINGS[name]
  added_spellings.write(tmp_path, files)
  tokenizer, text = load(tmp_path), added_spellings.TEXT
  known = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab()
  # Ordinary letters stand for their ids; a space has its own letter there.
  letters = lambda part: [known[letter] for letter in part.replace(" ", "\u0120")]
  ids = [i for part in expected for i in (letters(part) if isinstance(part, str) else [part])]
  assert tokenizer.encode_prompt(text) == ids
  tokenizer.save(tmp_path / "saved")
  again = load(tmp_path / "saved")
  assert again.fingerprint == tokenizer.fingerprint
  assert again.encode_prompt(text) == ids and again.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
  ("decoder", "message"),
  [
    ({"331": {"content": "<f>"}}, "the added token '<f>' must have the next free id, 330, has 331"),
    ({"5": {"content": "<f>"}}, "the added token '<f>' must have the next free id, 330, has 5"),
    (
      {"330": {"content": END}},
      r"the added token '<\|im_end\|>' must have the next free id, 1, has",
    ),
    ({"330": {"content": "<f>"}, "0330": {"content": "<g>"}}, "two added tokens have the id 330"),
  ],
)
def test_added_tokens_of_other_ids_are_refused(raw, folder, decoder, message):
  refuse(folder(raw, added_tokens_decoder=decoder), message)


def test_flags_beside_the_file_replace_its_own(raw, folder):
  decoder = {"0": {"content": START, "rstrip": True, "special": True}}
  path = folder(raw, added_tokens_decoder=decoder)
  assert load(path).encode_prompt(f"{START} \n the") == [0, *raw.encode("the").ids]


def test_a_pad_that_has_only_a_name_is_a_token_if_the_model_has_a_row(raw, folder, caplog):
  path = folder(raw, pad_token="[PAD]")
  for rows, size in ((None, 331), (331, 331), (330, 330)):
    (path / "config.json").write_text(json.dumps({"vocab_size": rows}))
    assert load(path).vocab_size == size
  assert "'[PAD]' is not used: the model has no row for it" in caplog.text


def test_stop_tokens_are_kept(raw, folder, tmp_path):
  path = folder(raw)
  assert load(path).stop_ids == (1,)
  (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
  tokenizer = load(path)
  assert (tokenizer.eos_id, tokenizer.stop_ids) == (1, (1, 0))
  tokenizer.save(tmp_path / "saved")
  again = load(tmp_path / "saved")
  assert (again.stop_ids, again.fingerprint) == ((1, 0), tokenizer.fingerprint)
  (path / "generation_config.json").unlink()
  (path / "config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))  # 7 is a word
  assert load(path).stop_ids == (1, 0)


def test_a_panic_of_the_package_is_an_error_of_the_file(raw, folder, monkeypatch):
  class PanicException(BaseException):
    pass

  class Panics:
    @staticmethod
    def from_str(_):
      raise PanicException("index out of\nbounds")

  path = folder(raw)
  monkeypatch.setattr(tokenizers, "Tokenizer", Panics)
  refuse(path, "is not a tokenizer.json: index out of bounds")
