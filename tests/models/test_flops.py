"""FLOPs by the model's definition, counted by hand."""

import pytest

from instructjax.models import flops
from tests import tiny

# The tiny config's layer: queries and two groups of keys and values 16 x 32, out 16 x 16, up and down 16 x 24;
# three LayerNorms. The embedding of 23 tokens also gives the logits.
LAYERS = 16 * 32 + 16 * 16 + 2 * 16 * 24 + 3 * 2 * 16
HEAD = 23 * 16


@pytest.mark.parametrize(
  ("head", "changes", "head_weights"),
  [
    ("lm", {}, HEAD),
    ("lm", dict(tie_embeddings=False), HEAD),  # a matrix of its own; the table is only looked up in
    ("scalar", {}, 16 + 1),
  ],
)
def test_forward(tiny_config, head, changes, head_weights):
  model = tiny.make_model(tiny_config, 23, head, **changes)
  tokens, length = 10, 5
  attention = 2 * length * 16  # 4 S D, of which the causal half
  products = tokens * (2 * LAYERS + attention)
  assert flops.forward(model, tokens, length) == products + tokens * 2 * head_weights
  assert flops.forward(model, tokens, length, 3) == products + 3 * 2 * head_weights
  # Forward, gradient of the inputs, gradient of the weights: a frozen base has no third. Attention's two products have
  # no weights, so their gradients are all needed.
  assert flops.training(model, tokens, length) == 3 * flops.forward(model, tokens, length)
  adapter = tiny.adapter(rank=2, alpha=1.0, targets=("q",))
  frozen = flops.training(model.clone(adapter=adapter), tokens, length)
  assert frozen == 2 * flops.forward(model, tokens, length) + tokens * attention
