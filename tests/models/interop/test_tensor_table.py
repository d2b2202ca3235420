"""Exports and imports refuse what they do not know: the table and the network must agree.

Each test breaks one side: the network has a parameter more, a table a row or a name more or less, a
file a tensor more. Every format is tried in both directions.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from instructjax.core.errors import UserError
from instructjax.models import interop, transformer
from instructjax.models.interop import gguf_names, tensor_table, transfer
from tests import tiny

VOCAB = 19
LEAF = "layers/attention/query_scale_K"
FORMATS = ["hf", "hf scalar", "gguf"]


class Wider(transformer.Transformer):
  """The network of a new switch that nobody told the tables of: one more parameter."""

  @nn.compact
  def __call__(self):
    super().__call__()
    init = nn.with_logical_partitioning(nn.initializers.ones, ("layers", "head_dim"))
    self.param(LEAF, init, (self.network.num_layers, self.network.head_dim), jnp.float32)


@pytest.fixture(params=FORMATS)
def kind(request) -> str:
  return request.param


@pytest.fixture
def network(kind, llama, random_params):
  """network(cls=Transformer, **changes): a small Llama with the head of `kind`, and parameters."""

  def one(cls=transformer.Transformer, **changes):
    head = "scalar" if kind == "hf scalar" else "lm"
    model = tiny.make_model(llama, VOCAB, head, num_layers=2, **changes)
    model = cls(model.network, model.execution, VOCAB, head)
    return model, random_params(model)

  return one


@pytest.fixture
def export(kind, tmp_path):
  """export(model, params, name="model") -> path of what was written."""

  def one(model, params, name="model"):
    path = tmp_path / (f"{name}.gguf" if kind == "gguf" else name)
    if kind == "gguf":
      tokens = {"tokenizer.ggml.tokens": [f"<{i}>" for i in range(VOCAB)]}
      interop.write_file(path, model, params, tokens)
    else:
      interop.write_folder(path, model, params, {})
    return path

  return one


def load(path, model, one_device):
  return interop.load_params(interop.open_weights(path), model, one_device(model))


def refusal(call) -> str:
  """The fault of the tables that a call ends with; no mistake of the user's."""
  with pytest.raises(ValueError) as caught:
    call()
  assert not isinstance(caught.value, UserError)
  return str(caught.value)


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_export_of_one_parameter_more(layers, network, export, tmp_path):
  message = refusal(lambda: export(*network(Wider, layers=layers)))
  # 2 layers of 4 numbers.
  assert f"parameter {LEAF} has 8 numbers and the table's rows hold 0 of them" in message
  assert not list(tmp_path.iterdir()), "nothing is written"


def test_import_into_one_parameter_more(network, export, one_device):
  path = export(*network())
  message = refusal(lambda: load(path, network(Wider)[0], one_device))
  assert f"parameter {LEAF} has 8 numbers" in message


def test_table_that_fills_a_parameter_in_part(network, export, one_device, monkeypatch, tmp_path):
  """Without the row of the values, a third of the fused weights would be whatever memory held."""
  model, params = network()
  path = export(model, params)
  rows = tensor_table._llama
  without_values = lambda *args: tuple(row for row in rows(*args) if "v_proj" not in row.theirs)
  monkeypatch.setattr(tensor_table, "_llama", without_values)
  # 2 layers x width 16 x 2 groups x (2 queries + key + value) x 4; a quarter of it is values.
  message = "layers/attention/w_qkv_DGQK has 1024 numbers and the table's rows hold 768 of them"
  assert message in refusal(lambda: load(path, model, one_device))
  assert message in refusal(lambda: export(model, params, "other"))
  assert list(tmp_path.iterdir()) == [path]


def test_row_of_no_parameter(network, export, one_device, monkeypatch):
  model, params = network()
  path = export(model, params)
  rows = tensor_table._llama
  more = tensor_table.Row(LEAF, "layers.{}.self_attn.q_norm.weight", "K", "K")
  monkeypatch.setattr(tensor_table, "_llama", lambda *args: (*rows(*args), more))
  message = (
    f"the row of model.layers.0.self_attn.q_norm.weight fills {LEAF}, which this network does"
  )
  assert message in refusal(lambda: load(path, model, one_device))
  assert message in refusal(lambda: export(model, params, "other"))


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_parameters_of_another_network(layers, network, export):
  model, _ = network(layers=layers)
  _, wider = network(Wider, layers=layers)
  path = {"unroll": "layers/0/attention/query_scale_K", "scan": LEAF}[layers]
  shape = {"unroll": "(4,)", "scan": "(2, 4)"}[layers]
  message = f"export: parameter {path} is {shape}, and the network has it absent"
  assert refusal(lambda: export(model, wider)) == message
  _, larger = network(d_mlp=25, layers=layers)
  assert "mlp/w_down_FD is " in refusal(lambda: export(model, larger))


@pytest.mark.parametrize("kind", ["hf", "hf scalar"], indirect=True)
def test_tensor_that_nothing_reads(network, export, one_device):
  model, params = network()
  path = export(model, params)
  tensors = safetensors.numpy.load_file(path / "model.safetensors")
  name = "model.layers.1.self_attn.q_norm.weight"
  tensors[name] = np.ones(4, np.float32)
  safetensors.numpy.save_file(tensors, path / "model.safetensors")
  with pytest.raises(UserError, match=f"has, and this model has no place for, tensor {name};"):
    load(path, model, one_device)


@pytest.mark.parametrize("kind", ["hf", "hf scalar"], indirect=True)
def test_tensor_that_is_missing(network, export, one_device):
  model, params = network()
  path = export(model, params)
  tensors = safetensors.numpy.load_file(path / "model.safetensors")
  head = "score.weight" if model.head == "scalar" else "lm_head.weight"
  del tensors[head]
  safetensors.numpy.save_file(tensors, path / "model.safetensors")
  with pytest.raises(UserError, match=f"lacks tensor {head}; the config must fit"):
    load(path, model, one_device)


# --- GGUF's names -----------------------------------------------------------------------------------


def renamed_table(monkeypatch, **changes):
  """The names of architecture llama with `changes`; None takes a name away."""
  llama = gguf_names.ARCHITECTURES["llama"]
  layer = {ours: theirs for ours, theirs in (llama.layer | changes).items() if theirs}
  architecture = dataclasses.replace(llama, layer=layer)
  monkeypatch.setitem(gguf_names.ARCHITECTURES, "llama", architecture)


@pytest.mark.parametrize("kind", ["gguf"], indirect=True)
def test_tensor_without_a_name_in_gguf(network, export, one_device, monkeypatch, tmp_path):
  model, params = network()
  path = export(model, params)
  renamed_table(monkeypatch, ffn_gate=None)
  with pytest.raises(UserError, match="'blk.0.ffn_gate.weight' of shape .* is none of archit"):
    load(path, model, one_device)
  path.unlink()
  message = refusal(lambda: export(model, params))
  assert "tensor model.layers.0.mlp.gate_proj.weight has no name of GGUF's" in message
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["gguf"], indirect=True)
def test_name_of_no_tensor_in_gguf(network, export, monkeypatch, tmp_path):
  model, params = network()
  renamed_table(monkeypatch, attn_q_norm="self_attn.q_norm")
  assert "attn_q_norm is the name of no tensor" in refusal(lambda: export(model, params))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["gguf"], indirect=True)
def test_gguf_file_that_lacks_a_tensor(network, export, one_device):
  """A file with a bias less, read with the config of the network that has it."""
  path = export(*network())
  model, _ = network(qkv_bias=True)
  with pytest.raises(
    UserError, match="lacks tensor model.layers.0.self_attn.q_proj.bias and 5 more"
  ):
    load(path, model, one_device)


# --- the table by hand --------------------------------------------------------------------------------


@pytest.mark.parametrize("head, names", [("lm", 1 + 2 * 9 + 2), ("scalar", 1 + 2 * 9 + 2)])
def test_rows_follow_the_switches(head, names, llama):
  """Embedding, two layers of 9 tensors, final norm, head; biases: 3 of q, k, v, then 4 of the rest."""
  model = lambda **changes: tiny.make_model(llama, VOCAB, head, num_layers=2, **changes)
  count = lambda **changes: len(tensor_table.tensors(model(**changes)))
  assert count() == names
  assert count(qkv_bias=True) == names + 2 * 3
  assert count(use_bias=True) == count(use_bias=True, qkv_bias=True) == names + 2 * 7
  assert count(tie_embeddings=True) == names - (head == "lm")
  # Two norms of heads, and two after the branches, in each layer.
  assert count(qk_norm=True) == count(norm="rmsnorm_1p", sandwich_norm=True) == names + 2 * 2
  # Two norms, qkv, the output and the MLP's two matrices, each with a bias: 12 a layer.
  neox = dict(norm="layernorm", mlp="gelu_exact", use_bias=True, num_kv_heads=4)
  assert count(**neox) == 1 + 2 * 12 + 3


def test_gpt_neox_has_a_head_s_query_key_and_value_together(make):
  """Rows of query_key_value are, for each of 4 heads of 4: its query, its key, its value."""
  model, params = make(tiny.FAMILIES["gpt_neox"])
  exported = {name: made() for name, _, made in transfer.named_tensors(model, params)}
  layer = params["layers"][2]["attention"]
  w = exported["gpt_neox.layers.2.attention.query_key_value.weight"]
  b = exported["gpt_neox.layers.2.attention.query_key_value.bias"]
  assert (w.shape, b.shape) == ((48, 16), (48,))
  for head in range(4):
    for part in range(3):
      rows = slice(12 * head + 4 * part, 12 * head + 4 * part + 4)
      np.testing.assert_array_equal(w[rows].T, layer["w_qkv_DGQK"][:, head, part])
      np.testing.assert_array_equal(b[rows], layer["b_qkv_GQK"][head, part])
  np.testing.assert_array_equal(exported["embed_out.weight"], params["head"]["w_VD"])
