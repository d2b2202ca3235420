"""Rotary settings, wherever config.json puts them.

Called by hf_fields.py and hf_keys.py; rotary_gguf.py reads the metadata of GGUF. Both readers end in a `Rotary`. They
take every spelling to the frequencies that transformers 5 or llama.cpp computes from it, or refuse it by the name of
the key: a model whose positions turn at another speed than in training writes fluent nonsense, and nothing else would
tell.

What transformers 5 makes of config.json (modeling_rope_utils.py):
  - A `rope_scaling` that is not empty replaces `rope_parameters` as a whole.
  - `rope_theta` inside the block wins over that at the top, and 10,000 is the default of both.
  - `rope_type` wins over the old name `type`; the default is `default`.
  - `original_max_position_embeddings` at the top wins over that inside; the default is `max_position_embeddings`.
Older versions disagree in some of these. So two places that contradict each other are refused, whoever would win.
GPT-NeoX has names of its own for two of the keys, and Gemma 3 has settings for each of two kinds of layers: `_STYLES`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from absl import logging

from instructjax.core.config import RopeScalingConfig
from instructjax.core.errors import UserError
from instructjax.core.foreign import Keys, named, shown

# No field but the first has a meaning here. They are those of configs/base.py, so that descriptions compare equal.
NO_SCALING = RopeScalingConfig("none", 8.0, 1.0, 4.0, 8192, 0.0)
YARN_BETAS = 1.0, 32.0  # slow and fast, where nothing else is said
DEFAULT_BASE = 10_000.0  # in transformers and in llama.cpp
_SHARE = "partial_rotary_factor"
_ORIGINAL = "original_max_position_embeddings"
_BLOCKS = ("rope_scaling", "rope_parameters")
# Keys of a block besides its type, base and `partial_rotary_factor`, by type.
_USED = {
  "default": (),
  "linear": ("factor",),
  "dynamic": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
  "yarn": (
    *("factor", "beta_slow", "beta_fast", _ORIGINAL, "attention_factor", "mscale"),
    *("mscale_all_dim", "truncate"),
  ),
}
# Rotary keys at the top of config.json. All others that look like one are refused: other architectures read them.
_TOP = {*_BLOCKS, "rope_theta", _SHARE, _ORIGINAL}


@dataclasses.dataclass(frozen=True)
class _Style:
  """What an architecture's rotary settings have of their own.

  Attributes:
    base: its first name of `rope_theta` at the top.
    default_base: where no place has the base.
    share: its first name of `partial_rotary_factor` at the top; None if heads turn as a whole.
    default_share: where no place has the share.
    local_base: the name of the local layers' base at the top; None if all layers turn at one speed.
    default_local_base: where no place has it.
    others: keys that hf_fields.py reads.
  """

  base: str = "rope_theta"
  default_base: float = DEFAULT_BASE
  share: str | None = None
  default_share: float = 1.0
  local_base: str | None = None
  default_local_base: float = 0.0
  others: tuple[str, ...] = ()

  @property
  def names(self) -> set[str]:
    """Keys at the top that this architecture has besides `_TOP`."""
    return {name for name in (self.base, self.share, self.local_base, *self.others) if name}


_STYLES = {
  "gpt_neox": _Style(base="rotary_emb_base", share="rotary_pct", default_share=0.25),
  "smollm3": _Style(default_base=2e6, others=("no_rope_layers", "no_rope_layer_interval")),
  "gemma3_text": _Style(
    default_base=1e6, local_base="rope_local_base_freq", default_local_base=DEFAULT_BASE
  ),
}
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"  # Gemma 3's blocks inside rope_parameters
_ROTARY = re.compile(
  r"(^|_)(rope|mrope|nope|rotary|yarn|ntk)(_|$)|(low|high)_freq_factor|^(factor|attention_factor|mscale)$"
)
_NEUTRAL = {
  "rotary_pct": 1.0,
  "use_rope": True,
  "use_mrope": False,
  "use_dynamic_ntk": False,
  "rope_interleaved": False,
  "rope_traditional": False,
  "rope_type": "default",
}


@dataclasses.dataclass(frozen=True)
class Rotary:
  """How fast rotary positions turn, and how many dimensions.

  Attributes:
    base: of the geometric series of wavelengths.
    scaling: what is changed of it.
    share: part of a head's dimensions that turn.
    local_base: the base in local layers, which are not scaled; 0 for that of the other layers.
  """

  base: float
  scaling: RopeScalingConfig
  share: float = 1.0
  local_base: float = 0.0


def is_rotary(name: str) -> bool:
  """Whether a key at the top of config.json is one that this module obeys or refuses."""
  return name in _TOP or _ROTARY.search(name) is not None


def to_config(rotary: Rotary, family: str) -> dict[str, Any]:
  """The keys of config.json, in transformers 4's spelling, which both versions read."""
  style, scaling = _STYLES.get(family, _Style()), rotary.scaling
  result: dict[str, Any] = {style.base: rotary.base, "rope_scaling": None}
  if style.share:
    result[style.share] = rotary.share
  if style.local_base:
    result[style.local_base] = rotary.local_base
  if scaling.kind != "none":
    block = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
      block |= {
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        _ORIGINAL: scaling.original_length,
      }
    if scaling.kind == "yarn":
      block |= {
        "beta_slow": scaling.low_freq_factor,
        "beta_fast": scaling.high_freq_factor,
        _ORIGINAL: scaling.original_length,
      }
      if scaling.attention_factor:
        block["attention_factor"] = scaling.attention_factor
    result["rope_scaling"] = block
  return result


def share_of(rotary_dim: int, head_dim: int) -> float:
  """The share of a head's dimensions whose product with them has this integer part, which transformers takes."""
  share = rotary_dim / head_dim
  return share if int(head_dim * share) == rotary_dim else share + 1e-9


# --- config.json ----------------------------------------------------------------------------------


def refuse_any(keys: Keys):
  """Refuses rotary settings of an architecture that has none (GPT-2).

  Raises:
    UserError: config.json has a rotary key.
  """
  for name in keys.raw:
    if is_rotary(name) and keys.has(name):
      raise keys.wrong(name, "is not supported: this architecture has learned positions")


def from_config(keys: Keys, family: str) -> Rotary:
  """The rotary settings of a config.json.

  Args:
    keys: the file's.
    family: its model_type.
  Raises:
    UserError: a kind of scaling is not supported, a value has the wrong type, two places contradict each other, or a
      key asks for something that the architecture does not do in transformers.
  """
  style = _STYLES.get(family, _Style())
  _refuse_strangers(keys, style)
  blocks = {name: block for name in _BLOCKS if (block := _block(keys, name, style))}
  if style.local_base is None:
    return _agreed(blocks, keys, style)
  parameters = blocks.get("rope_parameters", Keys({}, keys.where))
  unknown = sorted(parameters.raw.keys() - {_GLOBAL, _LOCAL})
  if unknown:
    raise parameters.wrong(unknown[0], f"is not supported: it must hold {_GLOBAL} and {_LOCAL}")
  by_kind = {"rope_scaling": blocks.get("rope_scaling"), _GLOBAL: parameters.block(_GLOBAL)}
  found = _agreed({name: block for name, block in by_kind.items() if block}, keys, style)
  local = parameters.block(_LOCAL) or Keys({}, keys.where)
  if local.where != keys.where:
    for name in ("rope_type", "type"):
      local.refuse(name, "default")
  base = _base(local, keys, (style.local_base,), style.default_local_base)
  return dataclasses.replace(found, local_base=base)


def _agreed(blocks: Mapping[str, Keys], keys: Keys, style: _Style) -> Rotary:
  """What all of the blocks say; without any, what the top says.

  Raises:
    UserError: they contradict each other.
  """
  found = {name: _from_block(block, keys, style) for name, block in blocks.items()}
  if not found:
    return _from_block(Keys({}, keys.where), keys, style)
  chosen = next(iter(found.values()))
  for name, other in found.items():
    # A `rope_parameters` that only says `default` is what transformers 5 writes of itself: the other may say more.
    same = other.scaling in (chosen.scaling, NO_SCALING)
    if not same or (other.base, other.share) != (chosen.base, chosen.share):
      raise UserError(
        f"{keys.where}: rope_scaling and {name} contradict each other"
        f" ({_words(chosen)}, {_words(other)}); remove the one that the model was not trained with"
      )
  return chosen


def _words(rotary: Rotary) -> str:
  scaled = "" if rotary.scaling.kind == "none" else f" by {rotary.scaling.factor:g}"
  return f"rope_theta {rotary.base:g} and scaling {rotary.scaling.kind}{scaled}"


def _refuse_strangers(keys: Keys, style: _Style):
  """Raises UserError for a rotary key at the top that the architecture does not read."""
  for name in keys.raw:
    if name not in _TOP | style.names and is_rotary(name) and keys.has(name):
      if name in _NEUTRAL and keys.raw[name] == _NEUTRAL[name]:
        continue
      raise keys.wrong(
        name,
        "is not read by this architecture in transformers; remove the key if the model was trained"
        " without it, or write rope_scaling",
      )


def _block(keys: Keys, name: str, style: _Style) -> Keys | None:
  """The keys of a block; None if it is absent, null or empty, which transformers takes for absent."""
  block = keys.block(name)
  if block is None or not block.raw:
    return None
  has_kinds = style.local_base is not None and name == "rope_parameters"
  for inner, value in block.raw.items():
    if isinstance(value, Mapping) and not has_kinds:
      raise block.wrong(inner, "is not supported: one setting must hold for all layers")
  return block


def _from_block(block: Keys, top: Keys, style: _Style) -> Rotary:
  kind = _kind(block)
  if not block.has("rope_theta"):
    _require_read(top, "rope_theta", style.base, style.default_base)
  if style.share and not block.has(_SHARE):
    _require_read(top, _SHARE, style.share, style.default_share)
  share = _share(block, top, style)
  found = Rotary(
    _base(block, top, tuple(dict.fromkeys((style.base, "rope_theta"))), style.default_base),
    NO_SCALING,
    share,
  )
  unused = [
    name
    for name in block.raw
    if block.has(name) and name not in ("rope_type", "type", "rope_theta", _SHARE, *_USED[kind])
  ]
  if unused:
    logging.warning(
      "%s: keys that rope_type %s has no use for, as in transformers: %s",
      block.where,
      kind,
      ", ".join(map(named, sorted(unused)[:8])),
    )
  if kind == "default":
    return found
  factor = block.number("factor", None)
  if kind == "linear":
    scaling = dataclasses.replace(NO_SCALING, kind="linear", factor=factor)
    return dataclasses.replace(found, scaling=scaling)
  if kind == "dynamic":
    # It changes nothing up to max_position_embeddings, and that is the longest context here.
    if block.value(_ORIGINAL) not in (None, top.value("max_position_embeddings")):
      raise block.wrong(_ORIGINAL, "must be max_position_embeddings for dynamic scaling")
    logging.warning(
      "%s: dynamic scaling begins beyond max_position_embeddings, which is the longest context here",
      block.where,
    )
    return found
  inner = _original_length(block, top)
  if kind == "yarn":
    return dataclasses.replace(found, scaling=_yarn(block, factor, inner))
  scaling = dataclasses.replace(
    NO_SCALING,
    kind="llama3",
    factor=factor,
    low_freq_factor=block.number("low_freq_factor", None),
    high_freq_factor=block.number("high_freq_factor", None),
    original_length=inner,
  )
  return dataclasses.replace(found, scaling=scaling)


def _original_length(block: Keys, top: Keys) -> int:
  """The context length before scaling; raises UserError if it is no length, or the two places contradict each other."""
  length = top.size("max_position_embeddings", None)
  if _ORIGINAL in block.raw and not block.has(_ORIGINAL):
    raise block.wrong(_ORIGINAL, "must be a positive whole number")
  inner = block.size(_ORIGINAL, top.size(_ORIGINAL, length))
  if top.size(_ORIGINAL, inner) != inner:
    raise block.wrong(_ORIGINAL, f"contradicts {_ORIGINAL}={top.raw[_ORIGINAL]} at the top")
  return inner


def _yarn(block: Keys, factor: float, original_length: int) -> RopeScalingConfig:
  """YaRN's settings; raises UserError for one that is not supported, or that is out of its range."""
  block.refuse("truncate", True)
  sharper = 0.0  # the default, 0.1 ln(factor) + 1
  if block.has("attention_factor"):
    sharper = block.number("attention_factor", None)
    if sharper <= 0:
      raise block.wrong("attention_factor", "must be above 0")
  else:
    scales = [block.number(name, 0.0) for name in ("mscale", "mscale_all_dim")]
    if all(scales) and factor > 1:  # transformers takes the first alone for none
      top, below = (0.1 * scale * math.log(factor) + 1.0 for scale in scales)
      if not (below and 0 < top / below < math.inf):
        raise block.wrong("mscale_all_dim", "must leave attention a factor above 0")
      sharper = top / below
  # A 0 stands for the default in transformers.
  slow, fast = (
    block.number(name, 0.0) or default
    for name, default in zip(("beta_slow", "beta_fast"), YARN_BETAS)
  )
  return RopeScalingConfig("yarn", factor, slow, fast, original_length, sharper)


def _require_read(top: Keys, name: str, known: str, default: float):
  """Refuses the common name of a key without the architecture's own, which alone transformers 5 reads.

  Raises:
    UserError: the key has another value than the default, which transformers 5 would take.
  """
  if name != known and top.has(name) and not top.has(known) and top.number(name, None) != default:
    raise top.wrong(name, f"is not read by transformers 5, which takes {default:g}: write {known}")


def _share(block: Keys, top: Keys, style: _Style) -> float:
  """The part of a head's dimensions that turn.

  Raises:
    UserError: it is out of its range, two places differ, or the architecture turns whole heads only.
  """
  names = tuple(dict.fromkeys((style.share or _SHARE, _SHARE)))
  places = [(part, name) for part, names in ((block, (_SHARE,)), (top, names)) for name in names]
  found = {(part, name): part.number(name, None) for part, name in places if part.has(name)}
  for (part, name), value in found.items():
    if style.share is None and value != 1:
      raise part.wrong(name, "is not supported, only 1.0")
    if not 0 < value <= 1:
      raise part.wrong(name, "must be above 0 and at most 1")
    if value != next(iter(found.values())):
      (first, first_name), first_value = next(iter(found.items()))
      raise part.wrong(name, f"contradicts {first_name}={first_value:g} in {first.where}")
  return next(iter(found.values()), style.default_share)


def _kind(block: Keys) -> str:
  """The type of scaling, by its new name or its old one.

  Raises:
    UserError: it is not supported, null, given twice with two values, or missing beside a key that needs one.
  """
  names = [name for name in ("rope_type", "type") if name in block.raw]
  if not names:
    needing = [name for name in block.raw if name not in ("rope_theta", _SHARE)]
    needing = [name for name in needing if block.has(name)]
    if needing:
      raise UserError(
        f"{block.where} lacks 'rope_type', and has {named(needing[0])}="
        f"{shown(block.raw[needing[0]])}; say which scaling this is, or remove the key"
      )
    return "default"
  for name in names:
    if not block.has(name):
      raise block.wrong(name, f"is not supported; known: {', '.join(_USED)}")
    block.one_of(name, tuple(_USED))
  if len({block.raw[name] for name in names}) > 1:
    raise block.wrong("type", f"contradicts rope_type={block.raw['rope_type']!r}")
  return block.raw[names[0]]


def _base(block: Keys, top: Keys, names: tuple[str, ...], default: float) -> float:
  """The base of the frequencies, from inside the block, the top, or the default.

  Args:
    block, top: the keys of both places.
    names: of the base at the top; inside the block it is `rope_theta`.
    default: where it has none.
  Raises:
    UserError: it is null or not positive, or two places differ.
  """
  places = [(block, "rope_theta")] if "rope_theta" in block.raw else []
  at_top = [(top, name) for name in names if name in top.raw]
  if places:
    at_top = [(part, name) for part, name in at_top if part.has(name)]
  for part, name in (*places, *at_top):
    if not part.has(name) or part.number(name, None) <= 0:
      raise part.wrong(name, "must be a number above 0")
  found = [(part.number(name, None), part, name) for part, name in (*places, *at_top)]
  for value, _, name in found[1:]:
    if value != found[0][0]:
      raise found[0][1].wrong(found[0][2], f"contradicts {name}={value:g} at the top")
  return found[0][0] if found else default
