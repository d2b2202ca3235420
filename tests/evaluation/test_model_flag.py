"""Models by name: what a name may be, and what a path alone is named."""

import pytest

from instructjax.core.errors import UserError
from instructjax.evaluation import model_flag


def test_models_have_names_and_a_path_alone_is_named_by_its_last_part():
  values = ["a=runs/x", "b-1.5=hf://O/N", "runs/demo/rm/", "hf://O/M"]
  assert model_flag.parse(values, "a=b") == {
    "a": "runs/x",
    "b-1.5": "hf://O/N",
    "rm": "runs/demo/rm/",
    "M": "hf://O/M",
  }


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ([], "--models must have a value, as in a=b"),
    ([""], "--models='' must be NAME=PATH, as in a=b"),
    ([".."], "--models=.. must be NAME=PATH"),
    (["a="], "--models=a= must be NAME=PATH"),
    (["../a=x"], "--models=../a=x must be NAME=PATH"),  # it becomes a part of a file's name
    (["a b=x"], "--models=a b=x must be NAME=PATH"),
    (["a=x", "runs/a"], "--models names a twice"),
  ],
)
def test_models_that_are_none(values, message):
  with pytest.raises(UserError) as error:
    model_flag.parse(values, "a=b")
  assert message in str(error.value)
