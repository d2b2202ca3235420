"""FLOPs that a model takes by its definition, whatever a program does. Called by the stages and launch's planner."""

import math

import jax

from instructjax.models import transformer


def forward(
  model: transformer.Model, tokens: float, length: int, outputs: float | None = None
) -> float:
  """What the matrix products of a forward pass take; a backward pass takes twice as much again.

  2 N a token, and attention's causal half: 2 S D a token and layer. A table that tokens are looked up in
  multiplies nothing, unless it gives the logits too.

  Args:
    model: the definition.
    tokens: that go through the layers.
    length: S, columns of a row.
    outputs: tokens whose logits are taken; all of them if not given.
  """
  cfg, shapes = model.network, transformer.param_shapes(model)
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  head = count(shapes.get("head", {}))
  layers = count(shapes) - count(shapes["embedding"]) - head
  if model.head == "lm" and cfg.tie_embeddings:
    head = count(shapes["embedding"]["token_VD"])
  attention = 2 * cfg.num_layers * length * cfg.num_heads * cfg.head_dim
  outputs = tokens if outputs is None else outputs
  return tokens * (2.0 * layers + attention) + outputs * 2.0 * head
