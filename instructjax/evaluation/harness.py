"""The adapter of EleutherAI's lm-evaluation-harness, which runs any of its tasks on a model of this project.

Called by commands/lm_eval.py. Importing this module makes the harness know the model `instructjax`; it needs the extra
`eval`. Contexts are encoded as the harness's own backend for transformers does it: control tokens in them are
recognised, since a context may come from a chat template.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import lm_eval.models  # noqa: F401  (the harness forgets its own models if another one is registered first)
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from instructjax.core import places
from instructjax.core.config import MeshConfig
from instructjax.core.errors import UserError
from instructjax.data.controls import Rendered
from instructjax.evaluation import language_model
from instructjax.evaluation.language_model import Request, Scored
from instructjax.parallel import sharding

# Options of a generation that change nothing at these values, and are refused at others.
_IDLE: dict[str, tuple[Any, ...]] = {
  "num_beams": (1,),
  "top_k": (0, None),
  "repetition_penalty": (1.0,),
  "typical_p": (1.0,),
  "min_p": (0.0, None),
  "num_return_sequences": (1,),
  "do_sample": (True, False),
  "use_cache": (True, False),
}
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("instructjax")
class InstructJax(LM):
  """`--model instructjax --model_args checkpoint=PATH`.

  Model arguments:
    checkpoint: a finished stage's folder, a Hugging Face folder, a GGUF file or hf://ORG/NAME.
    base: of an adapter, where its base lies.
    dtype: 'auto', 'float32' or 'bfloat16'.
    max_length: most tokens read at once; 0 for the network's own limit.
    max_gen_toks: most tokens of an answer, where a task does not say.
    fsdp, tensor: sizes of these axes of the mesh; the other devices split the rows.
    prefix_token_id: the token before a text that has nothing before it.
    seed: of sampled answers.
  """

  def __init__(
    self,
    checkpoint: str = "",
    base: str = "",
    dtype: language_model.Dtype = "auto",
    max_length: int = 0,
    max_gen_toks: int = 256,
    fsdp: int = 1,
    tensor: int = 1,
    prefix_token_id: int | None = None,
    seed: int = 0,
    batch_size: Any = None,
    max_batch_size: Any = None,
    device: Any = None,
    **unknown,
  ):
    """Opens the model.

    Batch sizes and the device are the harness's own flags. They are not needed: rows are batched by what a device does
    best, and devices are those of JAX.

    Raises:
      UserError: an argument is unknown, or the model cannot be opened.
    """
    super().__init__()
    if unknown:
      raise UserError(
        f"--model_args has no {', '.join(unknown)}; there are checkpoint, base, dtype, max_length, max_gen_toks, fsdp,"
        " tensor, prefix_token_id and seed"
      )
    del batch_size, max_batch_size, device
    path = places.require(checkpoint, "--model_args=checkpoint", places.WEIGHTS)
    mesh = sharding.make_mesh(MeshConfig(slice=1, data=-1, fsdp=fsdp, tensor=tensor))
    self.opened = language_model.open_model(
      path, mesh, dtype=dtype, max_length=max_length, base=base
    )
    if prefix_token_id is not None:
      self.opened = language_model.with_first_id(self.opened, prefix_token_id)
    self._most, self._seed = max_gen_toks, seed
    self._device = jax.devices()[0].platform

  @property
  def tokenizer_name(self) -> str:
    """What the harness tells its caches of built requests apart by."""
    return f"instructjax-{self.opened.tokenizer.fingerprint}"

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """The source of the model's chat template, which the harness puts into its results; None if it is not asked for."""
    return self.opened.tokenizer.chats.special.chat_template if chat_template else None

  def apply_chat_template(
    self, chat_history: Sequence[Mapping], add_generation_prompt: bool = True
  ) -> str:
    """The text of a chat; without a generation prompt its last message is the beginning of the answer.

    Raises:
      UserError: there is no template, or it refuses the chat.
    """
    chats = self.opened.tokenizer.chats
    if add_generation_prompt:
      return str(chats.render_one(chat_history))
    *before, last = chat_history
    return chats.render_one(before) + last["content"]

  def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """(log-probability in nats, whether it is the greedy answer) of each continuation."""
    asked = [request.args for request in requests]

    def told(index: int, result: Scored):
      self.cache_hook.add_partial("loglikelihood", asked[index], _pair(result))

    pairs = [(Rendered(context), continuation) for context, continuation in asked]
    return [_pair(result) for result in language_model.log_probs(self.opened, pairs, told)]

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """Log-probability in nats of each text, in windows if it is long."""
    asked = [request.args for request in requests]

    def told(index: int, result: Scored):
      self.cache_hook.add_partial("loglikelihood_rolling", asked[index], result.log_prob)

    texts = [text for (text,) in asked]
    return [result.log_prob for result in language_model.rolling(self.opened, texts, told)]

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """The answer to each context, up to the first stop text.

    Raises:
      UserError: an option of the generation is not known.
    """
    asked = [request.args for request in requests]
    # A task that asks several times for a sampled answer gets several.
    times: collections.Counter = collections.Counter()
    wanted = []
    for context, options in asked:
      wanted.append(_request(context, options, self._most, self._seed + times[context]))
      times[context] += 1

    def told(index: int, answer: str):
      self.cache_hook.add_partial("generate_until", asked[index], answer)

    return language_model.generate(self.opened, wanted, told)


def _pair(result: Scored) -> tuple[float, bool]:
  return result.log_prob, result.is_greedy


def _request(context: str, options: Mapping[str, Any], most: int, seed: int) -> Request:
  """A request with the harness's options of a generation.

  Raises:
    UserError: an option is not known, or has a value that is not.
  """
  known = {"until", "temperature", "top_p", *_LENGTHS, *_IDLE}
  for name, value in options.items():
    if name not in known or (name in _IDLE and value not in _IDLE[name]):
      raise UserError(
        f"generation option {name}={value!r} is not known; leave it out of --gen_kwargs"
      )
  until = options.get("until") or ()
  temperature = float(options.get("temperature") or 0.0)
  if options.get("do_sample") is False:
    temperature = 0.0
  elif options.get("do_sample") and "temperature" not in options:
    temperature = 1.0
  lengths = [options[name] for name in _LENGTHS if options.get(name) is not None]
  return Request(
    prompt=Rendered(context),
    stops=(until,) if isinstance(until, str) else tuple(until),
    max_new_tokens=int(lengths[0] if lengths else most),
    temperature=temperature,
    seed=seed,
    top_p=float(options.get("top_p") or 1.0),
  )
