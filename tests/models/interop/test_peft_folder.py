"""Tests of models/interop/peft_folder.py: what is written is read merged into its base; what is refused, and how."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models
from instructjax.core.errors import UserError
from instructjax.models import adapters, interop
from instructjax.models.interop import huggingface, peft_folder
from tests import tiny

VOCAB = 11
ALL = ("q", "k", "v", "out", "gate", "up", "down")


def random(shapes):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.3, x.shape), jnp.float32), shapes)


def adapted(network, head="lm", targets=ALL):
  cfg = tiny.adapter(rank=2, alpha=3.0, targets=targets)
  return tiny.make_model(network, VOCAB, head).clone(adapter=cfg)


def write(folder, network, head="lm", targets=ALL):
  """Writes a base and an adapter of it; returns (the adapter's folder, model, merged parameters)."""
  model = adapted(network, head, targets)
  bare = adapted(network)
  base, trained = random(models.param_shapes(bare)), random(adapters.trained_shapes(model))
  huggingface.write_folder(folder / "a_base", bare, base, {})
  (folder / "adapter").mkdir()
  peft_folder.write_adapter(folder / "adapter", model, trained, "../a_base")
  return (
    folder / "adapter",
    model,
    adapters.merge(model, adapters.base_of(model, base), trained),
  )


def load(path, model, base=None):
  source = interop.open_weights(path, base)
  found = interop.describe(source)
  assert (found.head, found.vocab_size) == (model.head, VOCAB)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  places = jax.tree.map(lambda _: here, models.param_shapes(model))
  return interop.load_params(source, model, places)


@pytest.mark.parametrize(
  ("network", "head"),
  [
    (tiny.GPT2, "lm"),
    (tiny.LLAMA, "lm"),
    (tiny.LLAMA, "scalar"),
    (tiny.FAMILIES["gemma3"], "scalar"),  # whose classifier is not the language model's name
  ],
)
def test_an_adapter_is_read_merged_into_its_base(tmp_path, network, head):
  path, model, merged = write(tmp_path, network, head)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
  jax.tree.map(close, load(path, model), merged)
  config = json.loads((path / "adapter_config.json").read_text())
  assert config["task_type"] == {"lm": "CAUSAL_LM", "scalar": "SEQ_CLS"}[head]
  assert config["fan_in_fan_out"] == (network is tiny.GPT2)
  (path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
  a, b = jax.tree.leaves(load(path, model)["layers"]), jax.tree.leaves(merged["layers"])
  assert not all(np.allclose(*pair) for pair in zip(a, b))  # alpha / sqrt(rank)


def test_target_modules_name_the_adapted_ones_only(tmp_path):
  names = lambda network, targets: peft_folder._targets(
    model := adapted(network, targets=targets),
    [factor.name for factor in interop.peft_folder.peft_factors.factors(model)],
  )
  assert names(tiny.LLAMA, ("q", "v")) == ["q_proj", "v_proj"]
  assert names(tiny.GPT2, ("out", "up")) == ["attn.c_proj", "c_fc"]  # the mlp has a c_proj too
  assert names(tiny.GPT2, ALL) == ["c_attn", "c_fc", "c_proj"]


def test_the_base_is_the_one_that_is_given(tmp_path):
  path, model, _ = write(tmp_path, tiny.LLAMA)
  shutil.move(tmp_path / "a_base", tmp_path / "moved")
  with pytest.raises(UserError, match="adapter of ../a_base, which is not there; give its base"):
    interop.open_weights(path)
  load(path, model, tmp_path / "moved")
  with pytest.raises(UserError, match="is no adapter, and needs no base"):
    interop.open_weights(tmp_path / "moved", path)
  with pytest.raises(UserError, match="which is an adapter too"):
    interop.open_weights(path, path)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(peft_type="IA3"), "peft_type='IA3' is not supported; known: LORA"),
    (dict(use_dora=True), "use_dora=True is not supported"),
    (dict(alora_invocation_tokens=[3]), "alora_invocation_tokens=[3] is not supported"),
    (dict(bias="all"), "bias='all' is not supported"),
    (dict(init_lora_weights="pissa"), "must not be one that changes the base as well"),
    (dict(r=4), "have rank 2, and adapter_config.json has r=4"),
    (dict(base_model_name_or_path=""), "names no base; give one with --base"),
  ],
)
def test_adapters_of_other_kinds_are_refused(tmp_path, changes, message):
  path, _, _ = write(tmp_path, tiny.LLAMA, targets=("k",))
  config = json.loads((path / "adapter_config.json").read_text())
  (path / "adapter_config.json").write_text(json.dumps(config | changes))
  with pytest.raises(UserError) as error:
    interop.open_weights(path)
  assert message in str(error.value)


def test_an_adapter_of_another_base_is_refused(tmp_path):
  path, _, _ = write(tmp_path, tiny.LLAMA)
  other = tmp_path / "other"
  bare = tiny.make_model(tiny.GPT2, VOCAB)
  huggingface.write_folder(other, bare, random(models.param_shapes(bare)), {})
  with pytest.raises(UserError, match="another base than .*, and there is no such matrix"):
    interop.open_weights(path, other)
  file = path / "adapter_model.safetensors"
  shapes = huggingface.read_shapes(file)
  name = next(name for name in shapes if "k_proj.lora_B" in name)
  shapes[name] = (shapes[name][0] + 1, shapes[name][1])
  tensors = [(n, s, functools.partial(np.zeros, s, np.float32)) for n, s in shapes.items()]
  huggingface.write_safetensors(file, tensors)
  with pytest.raises(UserError, match="adapter of another base .* and the base has"):
    interop.open_weights(path)
  huggingface.write_safetensors(file, [t for t in tensors if t[0] != name])
  with pytest.raises(UserError, match="only one of lora_A and lora_B"):
    interop.open_weights(path)
