"""The dataclasses that travel between the parts: every field is a child of the pytree, and none can be set."""

import dataclasses

import jax
import numpy as np
import pytest

from instructjax.core import structs

PYTREES = [
  structs.PackedBatch,
  structs.RankedBatch,
  structs.PromptBatch,
  structs.Rollout,
  structs.Samples,
  structs.TrainState,
  structs.PPOState,
]


@pytest.mark.parametrize("cls", PYTREES, ids=lambda cls: cls.__name__)
def test_every_field_is_a_child_and_frozen(cls):
  names = [field.name for field in dataclasses.fields(cls)]
  one = cls(*range(len(names)))
  assert jax.tree.leaves(one) == list(range(len(names)))  # in the order of the fields
  assert jax.tree.map(lambda x: x + 1, one) == cls(*range(1, len(names) + 1))
  with pytest.raises(dataclasses.FrozenInstanceError):
    setattr(one, names[0], 5)


def test_the_prompt_is_what_stands_before_the_response():
  token_BL, response_BR = np.zeros((2, 7), np.int32), np.ones((2, 4), bool)
  rollout = structs.Rollout(token_BL, token_BL >= 0, response_BR, None, None, None)
  assert rollout.prompt_length == 3
