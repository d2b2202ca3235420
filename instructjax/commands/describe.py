"""Says which networks files of weights hold, as JSON: a program for `weights_preset`, which runs it as a process.

It is a process of its own because reading weights imports JAX. The command whose flags are being parsed must not have
JAX yet: main forks first, and the planner sets JAX's environment first.

  echo '{"weights": {"model": "PATH"}, "tokenizer": ""}' | python -m instructjax.commands.describe
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from instructjax.core.errors import UserError, one_line
from instructjax.data import tokenizer as tokenizers
from instructjax.models import execution, transformer
from instructjax.train import weights


def describe(paths: Mapping[str, str], tokenizer_path: str) -> dict[str, Any]:
  """The networks that files of weights hold.

  Args:
    paths: field of the config that names weights -> their path.
    tokenizer_path: the tokenizer that the config names; '' takes that of the first weights.
  Returns:
    `vocab_size` of the tokenizer, and for each field of `paths` the `network` as plain values, its `head` and the
    number of its parameters, `num_params`.
  Raises:
    UserError: a path is no weights or has no tokenizer; the message begins with the field.
  """
  found: dict[str, weights.Weights] = {}
  for field, path in paths.items():
    try:
      found[field] = weights.locate(path)
    except UserError as error:
      raise UserError(f"config.{field}: {error}") from error
  first = next(iter(found))
  try:
    source = tokenizer_path or found[first].tokenizer_path
    vocab_size = tokenizers.load(source).vocab_size
  except UserError as error:
    raise UserError(f"config.{'tokenizer.path' if tokenizer_path else first}: {error}") from error
  networks = {field: _network(one, vocab_size) for field, one in found.items()}
  return {"vocab_size": vocab_size, "weights": networks}


def _network(found: weights.Weights, vocab_size: int) -> dict[str, Any]:
  chosen = execution.for_inference("cpu")
  model = execution.model_on(None, found.network, chosen, vocab_size, found.head)
  shapes = jax.tree.leaves(transformer.param_shapes(model))
  return {
    "network": dataclasses.asdict(found.network),
    "head": found.head,
    "num_params": sum(math.prod(shape.shape) for shape in shapes),
  }


def main():
  """Reads the question from stdin and prints the answer, or {"error": LINE} for what the user can mend."""
  logging.set_verbosity(logging.ERROR)  # the run opens the same files again, and warns then
  asked = json.load(sys.stdin)
  try:
    answer = describe(asked["weights"], asked["tokenizer"])
  except UserError as error:
    answer = {"error": one_line(error)}
  print(json.dumps(answer))


if __name__ == "__main__":
  main()
