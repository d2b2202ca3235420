"""The FLOPs that a model needs by its definition, for MFU: recomputation and padding do not count.

Called by the stages and by launch's planner.
"""

import math

import jax

from instructjax.models import transformer


def training(
  model: transformer.Model, tokens: float, length: int, outputs: float | None = None
) -> float:
  """FLOPs of a forward and a backward pass, arguments as for `forward`.

  The backward pass takes twice the forward pass: the gradient of a product's input, and that of its weights. A frozen
  base has the first only, but attention has both: it multiplies inputs with inputs. An adapter's own products are
  narrow, and are not counted.
  """
  whole = forward(model, tokens, length, outputs)
  return 3 * whole if model.adapter is None else 2 * whole + tokens * _attention(model, length)


def forward(
  model: transformer.Model, tokens: float, length: int, outputs: float | None = None
) -> float:
  """FLOPs of the matrix products of a forward pass. A backward pass takes twice as many.

  A token takes 2 FLOPs for each weight of the layers. Attention adds 2 S H K a layer: two products of 2 S H K, of which
  the causal mask leaves half. The embedding is a lookup and costs nothing, unless it is also the head.

  Args:
    model: the network.
    tokens: number of tokens that go through the layers.
    length: S, the columns of a row.
    outputs: number of tokens whose logits are computed; None for all.
  """
  cfg, shapes = model.network, transformer.param_shapes(model)
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  head = count(shapes.get("head", {}))
  layers = count(shapes) - count(shapes["embedding"]) - head
  if model.head == "lm" and cfg.tie_embeddings:
    head = count(shapes["embedding"]["token_VD"])
  outputs = tokens if outputs is None else outputs
  return tokens * (2.0 * layers + _attention(model, length)) + outputs * 2.0 * head


def _attention(model: transformer.Model, length: int) -> int:
  """FLOPs of a token in the attention of all layers, forward."""
  cfg = model.network
  return 2 * cfg.num_layers * length * cfg.num_heads * cfg.head_dim
