"""Compares models from GGUF files, and a real one's tokenizer, with what other libraries make of the same file.

Called by parity; imports torch and transformers. The other side never goes through instructjax's reader of GGUF files,
so that a mistake in it cannot cancel out: transformers has a reader of its own, and the tokenizer is built by hand.
"""

import itertools
import pathlib
import random
import tempfile
from collections.abc import Iterator

import gguf
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from benchmarks import parity_models
from instructjax.core.errors import UserError
from instructjax.data import tokenizer as our_tokenizers
from instructjax.models import interop
from instructjax.serve import packaging

NUM_LINES = 5000
# What a file must have of a tokenizer; nothing is encoded with it.
_TOKENIZER = {
  "tokenizer.ggml.model": "llama",
  "tokenizer.ggml.tokens": [f"<{i}>" for i in range(256)],
  "tokenizer.ggml.scores": [0.0] * 256,
  "tokenizer.ggml.token_type": [1] * 256,
}
_SIZES = parity_models.MODELS["llama, tied"][1]
# llama.cpp's architecture -> the family and the sizes of a small model. transformers' reader leaves head_dim of Qwen3
# and query_pre_attn_scalar of Gemma 3 at their defaults, 128 and 256, so that heads must have as many dimensions.
WRITTEN = {
  "llama": ("llama", _SIZES | dict(num_key_value_heads=2)),
  "qwen2": parity_models.MODELS["qwen2, untied, 5 layers"],
  "qwen3": ("qwen3", _SIZES | dict(head_dim=128)),
  "gemma3": (
    "gemma3_text",
    _SIZES | dict(num_hidden_layers=7, head_dim=256, query_pre_attn_scalar=256, sliding_window=48),
  ),
  "gptneox": parity_models.MODELS["gpt_neox"],
  "smollm3": parity_models.MODELS["smollm3, tied"],
}


def written_models() -> Iterator[tuple[str, dict[str, float] | None]]:
  """Compares small random models that instructjax writes as GGUF; yields (name, columns `right` to `greedy`).

  None stands for an architecture that transformers does not read from GGUF. Both sides read the rounded weights.
  """
  ids = list(parity_models.PARAGRAPH.encode())
  for arch, (family, sizes) in WRITTEN.items():
    name = f"gguf, {arch}"
    if arch not in GGUF_SUPPORTED_ARCHITECTURES:
      yield name, None
      continue
    ends = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    config = transformers.AutoConfig.for_model(family, **sizes, **ends)
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder)
      parity_models.random_model(transformers.AutoModelForCausalLM, config, folder / "lm")
      path = folder / "model.gguf"
      interop.write_file(path, *parity_models.load_ours(folder / "lm"), _TOKENIZER, name=arch)
      theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=path.name, dtype=torch.float32
      ).eval()
      yield name, parity_models.compare_lm(path, theirs, ids)


def compare_model(path: pathlib.Path) -> dict[str, float]:
  """Columns `right` to `export`. The export is the one that a user gets, with tokenizer and card.

  Raises:
    UserError: the file cannot be read, or its tokenizer is not of SmolLM2's kind.
  """
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  ).eval()
  ids = plain_tokenizer(path).encode(parity_models.PARAGRAPH).ids
  values = parity_models.compare_lm(path, theirs, ids)
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "out"
    packaging.write_huggingface(str(path), out)
    return values | {"export": parity_models.export_difference(out, theirs, ids)}


def plain_tokenizer(path: pathlib.Path) -> tokenizers.Tokenizer:
  """A tokenizer with the file's vocabulary, SmolLM2's rules as in its tokenizer.json, and no special tokens.

  Raises:
    UserError: the file's tokenizer is of another kind.
  """
  fields = gguf.GGUFReader(path).fields
  splitter = fields["tokenizer.ggml.pre"].contents()
  if splitter != "smollm":
    raise UserError(
      f"{path}: tokenizer.ggml.pre={splitter!r} must be 'smollm', which is built here"
    )
  tokens = fields["tokenizer.ggml.tokens"].contents()
  merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
  model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def sample_lines(paths: list[pathlib.Path]) -> list[str]:
  """Draws NUM_LINES lines, line ends included, in equal parts from the files as long as each has lines left."""
  rng = random.Random(0)
  files = []
  for path in paths:
    lines = path.read_bytes().decode().splitlines(keepends=True)
    files.append(rng.sample(lines, len(lines)))
  # Takes one line of each file in turn.
  turns = itertools.chain.from_iterable(itertools.zip_longest(*files))
  return list(itertools.islice((line for line in turns if line is not None), NUM_LINES))


def compare_tokenizers(path: pathlib.Path, lines: list[str]) -> dict[str, int]:
  """Columns `ids` and `texts`.

  Raises:
    UserError: see `plain_tokenizer`.
  """
  ours, plain = our_tokenizers.load(path), plain_tokenizer(path)
  ids = [plain.encode(line).ids for line in lines]
  return {
    "ids": sum(ours.encode(line) != expected for line, expected in zip(lines, ids)),
    "texts": sum(ours.decode(one) != plain.decode(one) for one in ids),
  }
