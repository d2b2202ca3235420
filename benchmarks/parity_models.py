"""Compares the same weights in instructjax and in transformers: logits, caches, greedy text, exports and scores.

Called by parity; imports torch and transformers.
"""

import copy
import functools
import json
import pathlib
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import logging

from instructjax.core.config import MeshConfig
from instructjax.core.structs import Params, PromptBatch
from instructjax.models import decoding, for_inference, interop, model_on, positions, transformer
from instructjax.ops import lm
from instructjax.parallel import sharding
from instructjax.rl import sampling, scoring
from instructjax.train import weights

# A text for all models. Those with random weights have a vocabulary of 256 and take its 400 bytes as ids.
PARAGRAPH = (
  "The history of the town begins with a small settlement on the bank of the river. Over the"
  " centuries it grew into a centre of trade, and merchants from many countries came to sell their"
  " goods in its markets. In the nineteenth century the railway arrived, and the population doubled"
  " within twenty years. Today it is known for its university, its 7 museums, and its parks; 81,000"
  " people live there."
)
NEW_TOKENS = 32  # length of a greedy continuation
FED_TOKENS = 12  # tokens that are fed one at a time through the caches
SCORE_BIAS = 0.75

_GPT2 = dict(vocab_size=256, n_embd=32, n_layer=3, n_head=4, n_positions=512)
_LLAMA = dict(
  vocab_size=256,
  hidden_size=32,
  intermediate_size=56,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=512,
)
_TIED = dict(tie_word_embeddings=True)
_LINEAR = dict(rope_type="linear", factor=4.0, rope_theta=5e4)
_LLAMA3 = dict(
  rope_type="llama3",
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=64,
  rope_theta=5e5,
)
_YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128, rope_theta=1e4)
_NEOX = dict(
  vocab_size=256,
  hidden_size=32,
  intermediate_size=56,
  num_hidden_layers=3,
  num_attention_heads=4,
  max_position_embeddings=512,
  rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25),
)
_GEMMA3 = _LLAMA | dict(
  num_hidden_layers=7, head_dim=16, query_pre_attn_scalar=16, sliding_window=48
)
MODELS = {
  "gpt2, tied": ("gpt2", _GPT2),
  "gpt2, untied": ("gpt2", _GPT2 | dict(tie_word_embeddings=False)),
  "gpt2, wide mlp, 1 layer": ("gpt2", _GPT2 | dict(n_inner=200, n_layer=1, n_embd=48, n_head=2)),
  "llama, tied": ("llama", _LLAMA | _TIED | dict(num_key_value_heads=4)),
  "llama, untied": ("llama", _LLAMA | dict(num_key_value_heads=4)),
  "llama, 2 KV heads of 6": ("llama", _LLAMA | dict(num_attention_heads=6, hidden_size=48)),
  "llama, 1 KV head, head_dim 16": ("llama", _LLAMA | dict(head_dim=16, num_key_value_heads=1)),
  "llama, biases": ("llama", _LLAMA | dict(attention_bias=True, mlp_bias=True)),
  "llama, linear rope scaling": ("llama", _LLAMA | dict(rope_parameters=_LINEAR)),
  "llama, llama3 rope scaling": ("llama", _LLAMA | _TIED | dict(rope_parameters=_LLAMA3)),
  "mistral, window 500 of 512": ("mistral", _LLAMA | dict(sliding_window=500)),
  "mistral, tied, no window": ("mistral", _LLAMA | _TIED | dict(sliding_window=None)),
  "qwen2, tied": ("qwen2", _LLAMA | _TIED),
  "qwen2, untied, 5 layers": ("qwen2", _LLAMA | dict(num_hidden_layers=5)),
  "qwen2, window 48 from layer 1": (
    "qwen2",
    _LLAMA | dict(use_sliding_window=True, sliding_window=48, max_window_layers=1),
  ),
  "qwen3, window 5, yarn": (
    "qwen3",
    _LLAMA
    | dict(
      use_sliding_window=True,
      sliding_window=5,
      layer_types=["sliding_attention", "full_attention", "sliding_attention"],
      head_dim=16,
      rope_parameters=_YARN,
    ),
  ),
  "qwen3, tied": ("qwen3", _LLAMA | _TIED | dict(head_dim=16)),
  "qwen3, untied, 1 KV head": ("qwen3", _LLAMA | dict(head_dim=8, num_key_value_heads=1)),
  "gpt_neox": ("gpt_neox", _NEOX),
  "gpt_neox, in turn, tied, gelu_new": (
    "gpt_neox",
    _NEOX | _TIED | dict(use_parallel_residual=False, hidden_act="gelu_new"),
  ),
  "gpt_neox, whole heads turn, linear": (
    "gpt_neox",
    _NEOX | dict(rope_parameters=_LINEAR | dict(partial_rotary_factor=1.0)),
  ),
  "smollm3, tied": ("smollm3", _LLAMA | _TIED | dict(num_hidden_layers=5)),
  "smollm3, irregular, biases": (
    "smollm3",
    _LLAMA | dict(no_rope_layers=[0, 1, 1], attention_bias=True, mlp_bias=True),
  ),
  "gemma3, 7 layers, window 48": ("gemma3_text", _GEMMA3),
  "gemma3, window 5, linear, scalar": (
    "gemma3_text",
    _GEMMA3
    | dict(
      num_hidden_layers=3,
      layer_types=["sliding_attention", "full_attention", "sliding_attention"],
      sliding_window=5,
      query_pre_attn_scalar=24,
      rope_parameters=dict(
        full_attention=_LINEAR, sliding_attention=dict(rope_type="default", rope_theta=700.0)
      ),
    ),
  ),
}

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.set_verbosity(logging.ERROR)


def random_models() -> Iterator[tuple[str, dict[str, float]]]:
  """Compares a language model and a reward model of each of MODELS; yields (name, column -> value)."""
  ids = list(PARAGRAPH.encode())
  for name, (family, sizes) in MODELS.items():
    ends = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    config = transformers.AutoConfig.for_model(family, **sizes, **ends, num_labels=1)
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder)
      theirs = random_model(transformers.AutoModelForCausalLM, config, folder / "lm")
      values = compare_lm(folder / "lm", theirs, ids)
      interop.write_folder(folder / "lm_out", *load_ours(folder / "lm"), {})
      values["export"] = export_difference(folder / "lm_out", theirs, ids)
      theirs = random_model(transformers.AutoModelForSequenceClassification, config, folder / "rm")
      yield name, values | _compare_scores(folder, theirs, ids)


def random_model(kind, config, folder: pathlib.Path):
  """Makes a model with random weights, norms and biases included, and saves it with transformers.

  Fresh norms are 1 and fresh biases 0; with these, a mistake in loading them would not show.
  """
  generator = torch.Generator().manual_seed(0)
  model = kind.from_config(config).eval()
  for parameter in model.parameters():
    is_norm = parameter.ndim == 1
    parameter.data = is_norm + 0.3 * torch.randn(parameter.shape, generator=generator)
  model.save_pretrained(folder)
  return model


def load_ours(path: pathlib.Path) -> tuple[transformer.Model, Params]:
  """Loads a model as its files have it; unlike `Weights.model` it needs no tokenizer.

  Raises:
    UserError: the files cannot be read.
  """
  opened = weights.locate(path)
  mesh = sharding.make_mesh(MeshConfig(slice=1, data=1, fsdp=1, tensor=1), jax.devices()[:1])
  execution = for_inference(sharding.platform_of(mesh))
  model = model_on(mesh, opened.network, execution, opened.vocab_size, opened.head)
  return model, opened.load(mesh, model)


@torch.inference_mode()
def compare_lm(path: pathlib.Path, theirs, ids: list[int]) -> dict[str, float]:
  """Columns `right` to `greedy`, and `theirs`.

  Args:
    path: the weights that instructjax imports.
    theirs: the model of transformers with the same weights.
    ids: token ids of a paragraph, at least 60.
  Raises:
    UserError: the weights cannot be read.
  """
  model, params = load_ours(path)
  apply = jax.jit(transformer.apply, static_argnums=0)
  # In float64, so that the difference is our rounding and not also theirs, which is as large where attention is sharp.
  exact = copy.deepcopy(theirs).double()
  values = {}
  for side in ("right", "left"):
    token_BL, is_token_BL = pad(cut(ids), side, model.vocab_size)
    position_BL = positions.from_mask(is_token_BL)
    segment_BL = is_token_BL.astype(np.int32)
    logits_BLV = apply(model, params, token_BL, segment_BL=segment_BL, position_BL=position_BL)
    exact_BLV = their_logits(exact, token_BL, is_token_BL)
    values[side] = _largest((logits_BLV - exact_BLV)[is_token_BL])
    if side == "right":
      theirs_BLV = their_logits(theirs, token_BL, is_token_BL)
      values["theirs"] = _largest((theirs_BLV - exact_BLV)[is_token_BL])
      # The first row is the whole paragraph, from the first column on.
      nll = -jnp.mean(lm.token_logprob(logits_BLV[:1, :-1], jnp.asarray([ids[1:]])))
  # Not their own loss, which sums in float32: at SmolLM2's vocabulary it is off by 8e-6, nearly the bound of 1e-5.
  their_LV = exact(torch.tensor([ids])).logits[0]
  their_nll = torch.nn.functional.cross_entropy(their_LV[:-1], torch.tensor(ids[1:]))
  values["nll"] = abs(float(nll) - their_nll.item())
  prompts = [row[: len(row) // 2] + row[:1] for row in cut(ids)]
  values |= _compare_caches(model, params, theirs, prompts, ids[-FED_TOKENS:])
  return values | {"greedy": _compare_greedy(model, params, theirs, prompts)}


def cut(ids: list[int]) -> list[list[int]]:
  """Cuts four rows of very different lengths: all ids, two thirds of them, a fifth, and a single one."""
  length = len(ids)
  return [ids, ids[length // 3 :], ids[length // 4 : length // 4 + length // 5], ids[7:8]]


def pad(rows: list[list[int]], side: str, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
  """Pads rows on one side, 'left' or 'right': (token_BL, is_token_BL)."""
  length = max(map(len, rows))
  token_BL = np.full((len(rows), length), pad_id, np.int32)
  is_token_BL = np.zeros(token_BL.shape, bool)
  for token_L, is_token_L, row in zip(token_BL, is_token_BL, rows):
    columns = slice(length - len(row), None) if side == "left" else slice(len(row))
    token_L[columns], is_token_L[columns] = row, True
  return token_BL, is_token_BL


def their_inputs(token_BL, is_token_BL, is_slot_BT=None) -> dict[str, torch.Tensor]:
  """The arguments of a transformers model for a batch; `is_slot_BT` marks real tokens of cache and batch together."""
  is_slot_BT = is_token_BL if is_slot_BT is None else is_slot_BT
  position_BT = np.cumsum(is_slot_BT, axis=1) - is_slot_BT
  return {
    "input_ids": torch.tensor(np.where(is_token_BL, token_BL, 0), dtype=torch.long),
    "attention_mask": torch.tensor(is_slot_BT, dtype=torch.long),
    "position_ids": torch.tensor(position_BT[:, -token_BL.shape[1] :], dtype=torch.long),
  }


@torch.inference_mode()
def their_logits(theirs, token_BL: np.ndarray, is_token_BL: np.ndarray) -> np.ndarray:
  return theirs(**their_inputs(token_BL, is_token_BL)).logits.numpy()


def _compare_caches(model, params, theirs, prompts, fed: list[int]) -> dict[str, float]:
  """Columns `prefill` and `decode`: both read the prompts, and are then fed the same tokens in every row."""
  token_BP, is_slot_BT = pad(prompts, "left", model.vocab_size)
  num_rows, prompt_length = token_BP.shape
  weights = jax.jit(functools.partial(decoding.decode_weights, model))(params)
  cache = decoding.init_cache(model, num_rows, prompt_length + len(fed))
  prefill = jax.jit(decoding.prefill, static_argnums=0)
  decode_step = jax.jit(decoding.decode_step, static_argnums=0)
  logits_BV, cache = prefill(model, weights, token_BP, is_slot_BT, cache)
  answer = theirs(**their_inputs(token_BP, is_slot_BT), use_cache=True)
  differences = [_largest(logits_BV - answer.logits[:, -1].numpy())]
  for step, token in enumerate(fed):
    token_B1, is_new_B1 = np.full((num_rows, 1), token, np.int32), np.ones((num_rows, 1), bool)
    position_B = np.sum(is_slot_BT, axis=1, dtype=np.int32)
    is_slot_BT = np.concatenate([is_slot_BT, is_new_B1], axis=1)
    is_column_BT = np.pad(is_slot_BT, ((0, 0), (0, len(fed) - 1 - step)))
    slot = jnp.int32(prompt_length + step)
    logits_BV, cache = decode_step(
      model, weights, token_B1[:, 0], position_B, slot, is_column_BT, cache
    )
    inputs = their_inputs(token_B1, is_new_B1, is_slot_BT)
    answer = theirs(**inputs, past_key_values=answer.past_key_values, use_cache=True)
    differences.append(_largest(logits_BV - answer.logits[:, -1].numpy()))
  return {"prefill": differences[0], "decode": max(differences[1:])}


def _compare_greedy(model, params, theirs, prompts) -> int:
  """Column `greedy`, the number of tokens that differ. No token ends a row, so that all of them are compared."""
  token_BP, is_prompt_BP = pad(prompts, "left", model.vocab_size)
  generate = functools.partial(
    sampling.generate, model, max_new_tokens=NEW_TOKENS, stop_ids=(-1,), temperature=0.0
  )
  batch = PromptBatch(token_BP, is_prompt_BP, np.arange(len(prompts), dtype=np.int32))
  token_BL = np.asarray(jax.jit(generate)(params, batch, jax.random.key(0)).token_BL)
  theirs.generation_config.eos_token_id = None
  inputs = their_inputs(token_BP, is_prompt_BP)
  del inputs["position_ids"]  # `generate` computes them from the mask
  their_BL = theirs.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
  new = slice(token_BP.shape[1], None)
  return int(np.sum(token_BL[:, new] != their_BL[:, new].numpy()))


def export_difference(folder: pathlib.Path, theirs, ids: list[int]) -> float:
  """Column `export`: compares an exported folder with the model that was imported, both run by transformers."""
  again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
  batch = pad(cut(ids), "right", 0)
  return _largest((their_logits(again, *batch) - their_logits(theirs, *batch))[batch[1]])


@torch.inference_mode()
def _compare_scores(folder: pathlib.Path, theirs, ids: list[int]) -> dict[str, float]:
  """Columns `score in` and `score out` of the reward model in folder/rm.

  The batch is padded on the right, where transformers looks for the last token of a row.
  """
  model, params = load_ours(folder / "rm")
  token_BL, is_token_BL = pad(cut(ids), "right", model.vocab_size)
  score = jax.jit(functools.partial(scoring.sequence_score, model))
  score_B = np.asarray(score(params, token_BL, is_token_BL))
  mask = {"attention_mask": torch.tensor(is_token_BL, dtype=torch.long)}
  padded_BL = torch.tensor(np.where(is_token_BL, token_BL, theirs.config.pad_token_id))
  their_B = theirs(padded_BL.long(), **mask).logits[:, 0].numpy()
  params["head"]["bias"] = jnp.float32(SCORE_BIAS)
  interop.write_folder(folder / "rm_out", model, params, {"pad_token_id": model.vocab_size})
  again = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "rm_out").eval()
  config = json.loads((folder / "rm_out" / "config.json").read_text())
  # The pad of our export is the id past the vocabulary, as in our own batches, so that token_BL can be taken as it is.
  again_B = again(torch.tensor(token_BL).long(), **mask).logits[:, 0].numpy()
  again_B = again_B + config.get(interop.SCORE_BIAS, 0.0)
  return {
    "score in": _largest(score_B - their_B),
    "score out": _largest(again_B - (score_B + SCORE_BIAS)),
  }


def _largest(difference) -> float:
  return float(np.max(np.abs(difference)))
