"""A run's records and token lists: each is read when a stage first asks for it, and kept for later stages."""

import contextlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from instructjax.core.config import Config
from instructjax.core.provenance import Source
from instructjax.core.stages import stage_of_kind
from instructjax.data import sources, tokenize
from instructjax.data.tokenizer import Tokenizer
from instructjax.stages import lineage
from instructjax.stages.contents import Contents, NotThere


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
    """The records of a kind from the config's source, or the comparisons that this run has collected.

    Args:
      kind: 'documents', 'prompts', 'demonstrations' or 'comparisons'.
      split: 'train', 'validation' or 'test'; also 'heldout' for collected comparisons.
    Raises:
      UserError: the source cannot be read or is written meanwhile, or a record is bad.
    """

    def read():
      # Before reading, and again after: fingerprints must tell what was read. Whoever reads has the better words for a
      # file that is not there.
      with contextlib.suppress(NotThere):
        self._contents.of(kind)
      found = self._read(kind, split)
      self._contents.require_same(kind)
      return found

    return self._once((kind, split), read)

  def source(self, kind: str) -> Source:
    """The config's source of a kind, with the checksum that it had when it was first asked for."""
    return Source(getattr(self._config.data, kind), self._contents.of(kind).checksum)

  def _read(self, kind: str, split: sources.Split) -> Sequence:
    data = self._config.data
    spec = getattr(data, kind)
    if kind == "comparisons" and lineage.collects(self._config):
      # The stage `collect` wrote one file for each split, so that nothing is left to split here.
      folder = self._workdir / stage_of_kind("collect").name
      spec, split = f"jsonl:{folder / split}.jsonl", "all"
    records = sources.load(
      spec,
      kind,
      split,
      seed=self._config.seed,
      validation_fraction=data.validation_fraction,
      on_bad_record=data.on_bad_record,
    )
    return sources.render(records, self._tokenizer.render_chat, on_bad_record=data.on_bad_record)

  def document_tokens(self, split: sources.Split) -> list[list[int]]:
    """Token lists of the documents, each begun with BOS if the tokenizer has one.

    Raises:
      UserError: see `records`.
    """
    tokenizer = self._tokenizer
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    encode = lambda: [bos + tokenizer.encode(r.text) for r in self.records("documents", split)]
    return self._once(("document tokens", split), encode)

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

  def demonstration_tokens(self, split: sources.Split) -> list:
    """Prompts and responses of the demonstrations as token lists; those that are too long are left out and counted.

    Raises:
      UserError: see `records`; or no demonstration is short enough.
    """

    def encode():
      data = self._config.data
      return tokenize.tokenize_demonstrations(
        self.records("demonstrations", split),
        self._tokenizer,
        max_prompt_length=data.max_prompt_length,
        max_response_length=data.max_response_length,
      )

    return self._once(("demonstration tokens", split), encode)
