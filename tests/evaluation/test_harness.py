"""The adapter of lm-evaluation-harness, on local files, beside the harness's own backend for transformers."""

import json

import pytest

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")  # of the harness and what it imports

from lm_eval import evaluator  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from instructjax.core.errors import UserError  # noqa: E402
from instructjax.evaluation import harness  # noqa: E402
from tests.evaluation import small_models  # noqa: E402

TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [
  {"question": "who sat on the hill?", "choices": ["the cat", "the sea", "a mat"], "gold": 0},
  {"question": "what is by the sea?", "choices": ["a hill", "hello world"], "gold": 0},
  {"question": "what is a test?", "choices": ["this", "sand and sea", "letters"], "gold": 2},
]
CHOICE = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: {target}
{more}
"""
KINDS = {
  "choices": dict(
    kind="multiple_choice", text="{{question}}", target="gold", more='doc_to_choice: "{{choices}}"'
  ),
  "rolling": dict(
    kind="loglikelihood_rolling",
    text="",
    target="'{{question}}'",
    more="metric_list: [{metric: word_perplexity}]",
  ),
  "answers": dict(
    kind="generate_until",
    text="{{question}}",
    target="'{{choices[0]}}'",
    more='generation_kwargs: {until: ["\\n", "the "], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]',
  ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A folder of transformers: a random network, with a vocabulary and a chat template of its own."""
  pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  import tokenizers
  import torch

  folder = tmp_path_factory.mktemp("model")
  words = tokenizers.Tokenizer(tokenizers.models.BPE())
  words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  words.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<|im_start|>", "<|im_end|>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  words.train_from_iterator(small_models.TEXTS, trainer)
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=words,
    bos_token="<|im_start|>",
    eos_token="<|im_end|>",
    pad_token="<|im_end|>",
  )
  fast.chat_template = TEMPLATE
  fast.save_pretrained(folder)
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=len(fast),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    bos_token_id=fast.bos_token_id,
    eos_token_id=fast.eos_token_id,
  )
  transformers.LlamaForCausalLM(config).save_pretrained(folder)
  return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tasks")
  data = folder / "rows.jsonl"
  data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  for task, how in KINDS.items():
    (folder / f"{task}.yaml").write_text(CHOICE.format(task=f"small_{task}", data=data, **how))
  return folder


def run(model, arguments, tasks, **options):
  found = evaluator.simple_evaluate(
    model=model,
    model_args=arguments,
    tasks=[f"small_{task}" for task in KINDS],
    task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    bootstrap_iters=0,
    **options,
  )
  return {
    (task, sample["doc_id"]): sample["resps"]
    for task, samples in found["samples"].items()
    for sample in samples
  }


def require_equal(ours, theirs):
  assert ours.keys() == theirs.keys() and len(ours) == 3 * len(ROWS)
  for key, mine in ours.items():
    for (one,), (other,) in zip(mine, theirs[key]):
      if key[0] == "small_answers":
        assert one == other
      elif key[0] == "small_rolling":
        assert one == pytest.approx(other, abs=1e-4)
      else:
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] == other[1]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("shots", [0, 1])
def test_every_request_is_answered_as_by_transformers(checkpoint, tasks, chat, shots):
  options = dict(apply_chat_template=chat, num_fewshot=shots)
  ours = run("instructjax", f"checkpoint={checkpoint}", tasks, **options)
  theirs = run("hf", f"pretrained={checkpoint},dtype=float32", tasks, device="cpu", **options)
  require_equal(ours, theirs)


def test_answers_come_from_the_cache_of_requests(checkpoint, tasks, tmp_path, monkeypatch):
  options = dict(use_cache=str(tmp_path / "cache"))
  first = run("instructjax", f"checkpoint={checkpoint}", tasks, **options)
  for name in ("log_probs", "rolling", "generate"):
    monkeypatch.delattr(harness.language_model, name)
  assert run("instructjax", f"checkpoint={checkpoint}", tasks, **options) == first


def test_sampled_answers_that_are_asked_for_twice_differ(checkpoint):
  model = harness.InstructJax(checkpoint=str(checkpoint))
  arguments = ("the cat", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12})
  asked = [Instance("generate_until", {}, arguments, index) for index in range(2)]
  one, other = model.generate_until(asked)
  assert one != other
  assert model.generate_until(asked) == [one, other]


def test_the_beginning_of_an_answer_goes_on_in_the_assistants_turn(checkpoint):
  model = harness.InstructJax(checkpoint=str(checkpoint))
  chat = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "the"}]
  text = model.apply_chat_template(chat, add_generation_prompt=False)
  assert text == "<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\nthe"
  assert model.chat_template(True) == TEMPLATE and model.chat_template(False) is None


@pytest.mark.parametrize(
  "options, wrong", [({"top_k": 5}, "top_k=5"), ({"num_beams": 4}, "num_beams"), ({"x": 1}, "x=1")]
)
def test_options_that_would_be_ignored_are_refused(options, wrong):
  with pytest.raises(UserError, match=wrong):
    harness._request("a", options, 8, 0)


def test_options_of_a_generation():
  request = harness._request("a", {"until": "b", "do_sample": False, "temperature": 1.0}, 8, 3)
  assert (request.stops, request.temperature, request.max_new_tokens) == (("b",), 0.0, 8)
  request = harness._request("a", {"until": ["b"], "do_sample": True, "max_new_tokens": 4}, 8, 3)
  assert (request.temperature, request.max_new_tokens, request.seed) == (1.0, 4, 3)


def test_a_wrong_model_argument_is_refused():
  with pytest.raises(UserError, match="no pretrained"):
    harness.InstructJax(checkpoint="x", pretrained="y")
  with pytest.raises(UserError, match="checkpoint must have a value"):
    harness.InstructJax()
