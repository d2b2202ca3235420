"""A run's records and tokens: each is read when a stage first asks for it, and kept for later stages.

Documents and demonstrations are kept as tokens on disk (data/token_cache.py), of which a batch reads its own rows.
"""

import contextlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from instructjax.core.config import Config
from instructjax.core.provenance import Source
from instructjax.core.stages import STAGES
from instructjax.data import sources, token_cache, tokenize
from instructjax.data.token_cache import CachedRows, CachedTokens, Tokenized
from instructjax.data.tokenizer import Tokenizer
from instructjax.parallel import distributed
from instructjax.stages import lineage, pinned
from instructjax.stages.contents import Contents, NotThere

RankedSplit = sources.Split | Literal["heldout"]


class RunData:
  """Records from the config's sources, and their tokens.

  Args:
    config: names the sources, and the seed that splits and orders them.
    workdir: the run's folder, which holds collected comparisons.
    tokenizer: the run's tokenizer.
    contents: what the sources hold.
  """

  def __init__(
    self, config: Config, workdir: pathlib.Path, tokenizer: Tokenizer, contents: Contents
  ):
    self._config, self._workdir, self._tokenizer = config, workdir, tokenizer
    self._contents = contents
    self._kept: dict[tuple[str, ...], Any] = {}

  def _once(self, key: tuple[str, ...], read: Callable[[], Any]):
    if key not in self._kept:
      self._kept[key] = read()
    return self._kept[key]

  def records(self, kind: str, split: sources.Split) -> list:
    """The records of a kind from the config's source. What a run has collected itself is in `rankings`.

    Args:
      kind: 'documents', 'prompts', 'demonstrations' or 'comparisons'.
      split: 'train', 'validation' or 'test'.
    Raises:
      UserError: the source cannot be read or is written meanwhile, or a record is bad.
    """
    return self._once((kind, split), lambda: self._read_unchanged(kind, split))

  def _read_unchanged(self, kind: str, split: Any) -> Sequence:
    # Before reading, and again after: fingerprints must tell what was read. Whoever reads has the better words for a
    # file that is not there.
    with contextlib.suppress(NotThere):
      self._contents.of(kind)
    found = self._read(kind, split)
    self._contents.require_same(kind)
    return found

  def rankings(self, stage: str, split: sources.Split) -> list:
    """The rankings that a reward model's stage reads: those of the config's source, and of the rounds up to its own.

    Args, raises: as for `records`; `stage` is the reward model's.
    """
    collected = [self.collected(name, split) for name in lineage.collected(self._config, stage)]
    if not lineage.collects(self._config):
      collected.insert(0, self.records("comparisons", split))
    return [record for records in collected for record in records]

  def collected(self, stage: str, split: RankedSplit) -> list:
    """The rankings that a stage of this run has collected.

    Args, raises: as for `records`; 'heldout' is a split too, the rankings by labelers of whom nothing is trained on.
    """
    return self._once((stage, split), lambda: self._read_unchanged(stage, split))

  def source(self, kind: str) -> Source:
    """The config's source of a kind, with the checksum that it had when it was first asked for."""
    return Source(pinned.spec(self._config, self._workdir, kind), self._contents.of(kind).checksum)

  def raw_records(self, kind: str, split: sources.Split) -> Sequence:
    """Records as they are read, in which a chat is still a list of messages; arguments and errors as `records`."""
    return self._once(("raw", kind, split), lambda: self._load(kind, split))

  def _load(self, kind: str, split: sources.Split) -> Sequence:
    data = self._config.data
    if kind in STAGES:
      # A stage that collects wrote one file for each split, so that nothing is left to split here.
      spec, kind, split = f"jsonl:{self._workdir / kind / split}.jsonl", "comparisons", "all"
    else:
      spec = pinned.spec(self._config, self._workdir, kind)
    return sources.load(
      spec,
      kind,
      split,
      seed=self._config.seed,
      validation_fraction=data.validation_fraction,
      on_bad_record=data.on_bad_record,
    )

  def _read(self, kind: str, split: sources.Split) -> Sequence:
    return sources.render(
      self._load(kind, split),
      self._tokenizer.chats.render_all,
      on_bad_record=self._config.data.on_bad_record,
    )

  def document_rows(self, split: sources.Split, length: int) -> CachedRows:
    """Documents packed into rows of `length` tokens. Longer ones are split; each ends in EOS.

    Raises:
      UserError: see `records`; or the token cache cannot be written.
    """
    return self._once(
      ("document rows", split, str(length)),
      lambda: self.tokens("documents", split).rows(length, splits=True),
    )

  def demonstration_rows(self, split: sources.Split, length: int) -> CachedRows:
    """Demonstrations packed into rows of `length` tokens, with loss on the response and its EOS only.

    Raises:
      UserError: see `records`; no demonstration is short enough, one is longer than a row, or the token cache cannot be
        written.
    """
    return self._once(
      ("demonstration rows", split, str(length)),
      lambda: self.tokens("demonstrations", split).rows(length, splits=False),
    )

  def prompt_tokens(self, split: sources.Split) -> list[list[int]]:
    """Token lists of the prompts; those longer than max_prompt_length are left out and counted, as in App. C.

    Raises:
      UserError: see `records`; or no prompt is short enough.
    """

    def encode():
      limit = self._config.data.max_prompt_length
      records = self.records("prompts", split)
      return tokenize.tokenize_prompts(records, self._tokenizer, max_prompt_length=limit)

    return self._once(("prompt tokens", split), encode)

  def tokens(self, kind: str, split: sources.Split) -> CachedTokens:
    """Documents or demonstrations as token ids, which lie in the token cache.

    Demonstrations that are too long are left out and counted.

    Raises:
      UserError: see `records`; no demonstration is short enough, or the cache cannot be written.
    """

    def open_():
      try:
        self._contents.of(kind)
      except NotThere:
        self._read(kind, split)  # which has the better words
      cached = CachedTokens(
        self._cache_folder(),
        f"{kind} ({split})",
        self._tokenizer.vocab_size,
        self._about(kind, split),
        lambda: self._tokenized(kind, split),
        distributed.progress,
      )
      store = cached.store()
      tokenize.report(kind, len(store), store.left_out)
      return cached

    return self._once(("tokens", kind, split), open_)

  def _cache_folder(self) -> pathlib.Path:
    named = self._config.data.token_cache
    return pathlib.Path(named) if named else self._workdir / "cache" / "tokens"

  def _about(self, kind: str, split: sources.Split) -> dict[str, Any]:
    """Everything that the ids depend on."""
    data, tokenizer = self._config.data, self._tokenizer
    result = {
      "kind": kind,
      "split": split,
      "content": self._contents.of(kind).fingerprint,
      "validation_fraction": data.validation_fraction,
      "on_bad_record": data.on_bad_record,
      "seed": self._config.seed if sources.simulation(getattr(data, kind)) else None,
      "tokenizer": tokenizer.fingerprint,
      "ids": [tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size],
      "code": token_cache.code(),
    }
    if kind == "demonstrations":
      result["limits"] = [data.max_prompt_length, data.max_response_length]
      result["date of chats"] = tokenizer.chats.clock
    return result

  def _tokenized(self, kind: str, split: sources.Split) -> Tokenized:
    # Not `records`, which would keep their text.
    records, data = self._read_unchanged(kind, split), self._config.data
    left_out: tokenize.LeftOut = {}
    if kind == "documents":
      return Tokenized(
        tokenize.tokenize_documents(records, self._tokenizer), len(records), left_out
      )
    sequences = tokenize.tokenize_demonstrations(
      records,
      self._tokenizer,
      left_out,
      max_prompt_length=data.max_prompt_length,
      max_response_length=data.max_response_length,
    )
    return Tokenized(sequences, len(records), left_out)

  def demonstration_tokens(self, split: sources.Split) -> list[tuple[list[int], list[int]]]:
    """(prompt, response with EOS) of each demonstration, as token lists.

    Raises:
      UserError: see `demonstration_rows`.
    """
    sequences = self.tokens("demonstrations", split).sequences()
    return [(one.ids[: one.num_unweighted], one.ids[one.num_unweighted :]) for one in sequences]
