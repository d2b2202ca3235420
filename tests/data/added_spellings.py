"""Ways in which a model's folder adds tokens to its tokenizer.json, and the ids that transformers makes of a text.

The ids were printed by transformers 5.24: AutoTokenizer.from_pretrained(FOLDER)(TEXT)["input_ids"], for the folder that
`write` makes.
"""

import json
import pathlib

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

START, END, TOOL = "<|im_start|>", "<|im_end|>", "<tool>"
TEXT = f"a{START} b {END}c{TOOL}d {TOOL} [PAD]"
# The vocabulary has the 256 bytes and <|endoftext|>, and no merges. Below, a text stands for the ids of its letters.
_FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def _token(content: str, **flags) -> dict:
  return {"content": content, "special": True} | _FLAGS | flags


_TWO = {"257": _token(START), "258": _token(END)}
SPELLINGS = {
  "added_tokens_decoder": (
    {"tokenizer_config": {"added_tokens_decoder": _TWO}},
    ["a", 257, " b ", 258, "c<tool>d <tool> [PAD]"],
  ),
  "its flags": (
    {
      "tokenizer_config": {
        "added_tokens_decoder": {
          "257": _token(START, rstrip=True),
          "258": _token(END, lstrip=True, special=False),
          "259": _token(TOOL, special=False, normalized=True, single_word=True),
        }
      }
    },
    ["a", 257, "b", 258, "c<tool>d ", 259, " [PAD]"],
  ),
  "its order and what may be left out": (
    {
      "tokenizer_config": {
        "added_tokens_decoder": {"258": {"content": END}, "257": {"content": START}}
      }
    },
    ["a", 257, " b ", 258, "c<tool>d <tool> [PAD]"],
  ),
  "it replaces the old files": (
    {
      "tokenizer_config": {"added_tokens_decoder": _TWO},
      "special_tokens_map": {"additional_special_tokens": [TOOL]},
      "added_tokens": {TOOL: 259},
    },
    ["a", 257, " b ", 258, "c<tool>d <tool> [PAD]"],
  ),
  "added_tokens.json": (
    {"added_tokens": {END: 258, START: 257, TOOL: 259}},
    ["a", 257, " b ", 258, "c", 259, "d ", 259, " [PAD]"],
  ),
  "with a map, which also names a pad": (
    {
      "added_tokens": {START: 257, END: 258},
      "special_tokens_map": {"additional_special_tokens": [START, TOOL], "pad_token": "[PAD]"},
    },
    ["a", 257, " b ", 258, "c", 260, "d ", 260, " ", 259],
  ),
  "special_tokens_map.json alone": (
    {"special_tokens_map": {"extra_special_tokens": [START, END]}},
    ["a", 257, " b ", 258, "c<tool>d <tool> [PAD]"],
  ),
  "additional_special_tokens": (
    {"tokenizer_config": {"additional_special_tokens": [START, END, TOOL]}},
    ["a", 257, " b ", 258, "c", 259, "d ", 259, " [PAD]"],
  ),
  "extra_special_tokens as an object": (
    {"tokenizer_config": {"extra_special_tokens": {"image_token": TOOL, "other": START}}},
    ["a", 258, " b <|im_end|>c", 257, "d ", 257, " [PAD]"],
  ),
  "tokens of other names": (
    {"tokenizer_config": {"image_token": TOOL, "boi_token": START}},
    ["a", 258, " b <|im_end|>c", 257, "d ", 257, " [PAD]"],
  ),
  "pad, unknown and separator": (
    {"tokenizer_config": {"pad_token": "[PAD]", "unk_token": START, "sep_token": END}},
    ["a", 257, " b ", 258, "c<tool>d <tool> ", 259],
  ),
  "pad is EOS, unknown is null": (
    {"tokenizer_config": {"pad_token": "<|endoftext|>", "unk_token": None}},
    ["a<|im_start|> b <|im_end|>c<tool>d <tool> [PAD]"],
  ),
}


def write(folder: pathlib.Path, files: dict[str, dict]):
  """Makes the folder of a spelling."""
  vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
  raw = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  raw.decoder = decoders.ByteLevel()
  raw.add_special_tokens(["<|endoftext|>"])
  raw.save(str(folder / "tokenizer.json"))
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
  for name, content in ({"tokenizer_config": {}} | files).items():
    content = config | content if name == "tokenizer_config" else content
    (folder / f"{name}.json").write_text(json.dumps(content))
