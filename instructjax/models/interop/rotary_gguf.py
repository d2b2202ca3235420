"""Rotary settings of a GGUF file's metadata, read by gguf_config.py.

What llama.cpp makes of metadata (llama-model.cpp, llama-context.cpp):
  - Without `rope.scaling.type` the type is linear.
  - The factor is `rope.scaling.factor`, or else `rope.scale_linear`, or else 1; 0 means 1. Type `none` ignores it.
  - `rope_freqs.weight` divides each frequency, in addition, for architecture llama only.
  - `rope.scaling.attn_factor` multiplies cosine and sine, whatever the type. Type yarn multiplies them by
    0.1 ln(factor) + 1 too.
  - Type yarn counts turns within `rope.scaling.original_context_length`, or else `context_length`. Of these
    architectures none reads the keys of its betas, which are 1 and 32.
  - Local layers of gemma3 have base 10,000 and no scaling; newer versions read `rope.freq_base_swa`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from instructjax.core.config import RopeScalingConfig
from instructjax.core.errors import UserError
from instructjax.core.foreign import named, shown
from instructjax.models.interop import gguf_names
from instructjax.models.interop.rotary import DEFAULT_BASE, NO_SCALING, YARN_BETAS, Rotary

# Of GGUF, below `ARCHITECTURE.rope.`: what is read, and what only YaRN uses.
_GGUF_READ = ("freq_base", "dimension_count", "scale_linear", "scaling.type", "scaling.factor")
_GGUF_LOCAL = "freq_base_swa"  # gemma3 only, and only in newer files
_ORIGINAL = "scaling.original_context_length"
_GGUF_YARN = (_ORIGINAL, "scaling.finetuned")
# Of YaRN, for other architectures: the value that changes nothing here.
_GGUF_BUILT_IN = {
  "scaling.yarn_log_multiplier": 0.0,
  "scaling.yarn_beta_slow": YARN_BETAS[0],
  "scaling.yarn_beta_fast": YARN_BETAS[1],
}
_ATTENTION = "scaling.attn_factor"
# A GGUF file stores only the result of Llama 3's rotary scaling, one divisor a frequency. The models of Llama 3.x share
# these parameters and differ in the factor only, so the factor can be recovered: see `_from_divisors`.
_LLAMA3 = RopeScalingConfig("llama3", 1.0, 1.0, 4.0, 8192, 0.0)


def from_gguf(
  get: Callable[..., Any],
  metadata: Mapping[str, Any],
  architecture: str,
  where: str,
  head_dim: int,
  read_freqs: Callable[[], np.ndarray] | None,
) -> Rotary:
  """The rotary settings of a GGUF file of an architecture with rotary positions.

  Args:
    get: get(key, kind, default) -> value of a key, checked; keys are without the architecture.
    metadata: all keys, to find those that are not known.
    architecture: the prefix of keys.
    where: the file, for errors.
    head_dim: dimensions of a head that turn.
    read_freqs: reads `rope_freqs.weight`, float32 [head_dim / 2]; None if the file has no such tensor.
  Raises:
    UserError: another scaling, two of them, or a key that is not known.
  """
  kind = get("rope.scaling.type", str, "linear")
  _refuse_keys(get, metadata, f"{architecture}.rope.", where, kind)
  base = get("rope.freq_base", float, DEFAULT_BASE)
  if not 0 < base < np.inf:
    raise UserError(f"{where}: {architecture}.rope.freq_base={base:g} must be a number above 0")
  local = get(f"rope.{_GGUF_LOCAL}", float, DEFAULT_BASE) if architecture == "gemma3" else 0.0
  if not 0 <= local < np.inf:
    raise UserError(
      f"{where}: {architecture}.rope.{_GGUF_LOCAL}={local:g} must be a number above 0"
    )
  plain = Rotary(base, NO_SCALING, local_base=local)
  if kind not in ("none", "linear", "yarn"):
    raise UserError(
      f"{where}: {architecture}.rope.scaling.type={shown(kind)} is not supported; none, linear and yarn are"
    )
  name = "rope.scaling.factor"
  if f"{architecture}.{name}" not in metadata:
    name = "rope.scale_linear"
  factor = get(name, float, 0.0) or 1.0
  if not 1 <= factor < np.inf:
    raise UserError(f"{where}: {architecture}.{name}={factor:g} must be 1 or more")
  scaled = kind == "yarn" or (kind == "linear" and factor != 1)
  if read_freqs is not None:
    if scaled:
      raise UserError(
        f"{where}: {architecture}.{name}={factor:g} ({kind}) and tensor {gguf_names.ROPE_FREQS!r} are two"
        " rotary scalings; one of them is supported"
      )
    return dataclasses.replace(plain, scaling=_from_divisors(read_freqs(), base, head_dim, where))
  if not scaled:
    return plain
  factor = gguf_names.decimal(factor)
  scaling = dataclasses.replace(NO_SCALING, kind="linear", factor=factor)
  if kind == "yarn":
    length = get(f"rope.{_ORIGINAL}", int, 0) or get("context_length", int)
    extra = get(f"rope.{_ATTENTION}", float, 1.0)
    sharper = 0.0 if extra == 1 else gguf_names.decimal(extra * (0.1 * math.log(factor) + 1.0))
    scaling = RopeScalingConfig("yarn", factor, *YARN_BETAS, length, sharper)
  return dataclasses.replace(plain, scaling=scaling)


def _refuse_keys(get, metadata: Mapping[str, Any], prefix: str, where: str, kind: str):
  """Raises UserError for a rotary key of an unknown meaning, and for a scaling of cosine and sine but YaRN's."""
  is_yarn = kind == "yarn"
  for key in metadata:
    if not key.startswith(prefix):
      continue
    name = key.removeprefix(prefix)
    if name == _ATTENTION and is_yarn and prefix != "gemma3.rope.":
      if not 0 < get(f"rope.{name}", float) < np.inf:
        raise UserError(f"{where}: {key}={metadata[key]:g} must be a number above 0")
    elif name in (_ATTENTION, "scaling.yarn_attn_factor"):
      if get(f"rope.{name}", float) != 1:
        raise UserError(f"{where}: {key}={metadata[key]:g} is not supported, only 1")
    elif name == "scaling.yarn_ext_factor":
      # Below 0 it is what the type asks for: 1 for yarn, 0 for the others.
      if get(f"rope.{name}", float) >= 0 and get(f"rope.{name}", float) != is_yarn:
        raise UserError(f"{where}: {key}={metadata[key]:g} is not supported, only {int(is_yarn)}")
    elif name in _GGUF_BUILT_IN:
      if is_yarn and get(f"rope.{name}", float) != _GGUF_BUILT_IN[name]:
        raise UserError(
          f"{where}: {key}={metadata[key]:g} is not read for this architecture in llama.cpp, where it is"
          f" {_GGUF_BUILT_IN[name]:g}; remove the key if the model was trained so"
        )
    elif name not in (*_GGUF_READ, *_GGUF_YARN) and (prefix, name) != ("gemma3.rope.", _GGUF_LOCAL):
      raise UserError(f"{where}: {named(key)}={shown(metadata[key])} is a rotary key not supported")


def _from_divisors(freqs: np.ndarray, base: float, head_dim: int, where: str) -> RopeScalingConfig:
  """Llama 3's scaling from its divisors.

  Raises:
    UserError: the divisors are those of another scaling.
  """
  # Slow frequencies are divided by the whole factor, so it is the greatest divisor. With the factor all divisors can be
  # computed; if they differ from the file's, this is some other scaling.
  fits = freqs.shape == (head_dim // 2,) and np.isfinite(freqs).all() and (freqs >= 1).all()
  factor = float(freqs.max(initial=1.0)) if fits else 1.0
  scaling = dataclasses.replace(_LLAMA3, factor=factor)
  if not fits or not np.allclose(
    freqs, gguf_names.llama3_factors(scaling, base, head_dim), rtol=1e-4, atol=0
  ):
    raise UserError(
      f"{where}: tensor {gguf_names.ROPE_FREQS!r} must be Llama 3's rotary scaling (low 1, high 4,"
      f" original context 8192) by a factor {factor:g}; another one is not supported"
    )
  return NO_SCALING if factor == 1 else scaling
