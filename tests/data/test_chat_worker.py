"""Templates of known families in the worker's environment, which must render them as transformers does.

They are written after the published ones, shortened by their branches for tools. Expected texts are those of
transformers 5.23, made as in test_chat.py, its clock set to the one below.
"""

import io
import json
import resource
import signal
import sys

import pytest

from instructjax.data import chat_worker

CLOCK = "2026-03-01T12:00:00"
LLAMA3_2 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""  # noqa: E501
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""  # noqa: E501
GEMMA = (
  "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not"
  " supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') !="
  " (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate"
  " user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}"
  "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
  "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
SMOLLM2 = (
  "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
  "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] +"
  " '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
  "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL_V3 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""
TALK = [
  {"role": "user", "content": " Hi? "},
  {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHo."},
  {"role": "user", "content": "é\n"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize(
  ("template", "messages", "text"),
  [
    (
      LLAMA3_2,
      [*SYSTEM, *TALK],
      "<s><|start_header_id|>system<|end_header_id|>\n"
      "\n"
      "Cutting Knowledge Date: December 2023\n"
      "Today Date: 01 Mar 2026\n"
      "\n"
      "Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n"
      "\n"
      "Hi?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n"
      "\n"
      "<think>\n"
      "hm\n"
      "</think>\n"
      "\n"
      "Ho.<|eot_id|><|start_header_id|>user<|end_header_id|>\n"
      "\n"
      "é<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n"
      "\n",
    ),
    (
      QWEN3,
      [*SYSTEM, *TALK],
      "<|im_start|>system\n"
      "Be brief.<|im_end|>\n"
      "<|im_start|>user\n"
      " Hi? <|im_end|>\n"
      "<|im_start|>assistant\n"
      "Ho.<|im_end|>\n"
      "<|im_start|>user\n"
      "é\n"
      "<|im_end|>\n"
      "<|im_start|>assistant\n",
    ),
    (
      GEMMA,
      TALK,
      "<s><start_of_turn>user\n"
      "Hi?<end_of_turn>\n"
      "<start_of_turn>model\n"
      "<think>\n"
      "hm\n"
      "</think>\n"
      "\n"
      "Ho.<end_of_turn>\n"
      "<start_of_turn>user\n"
      "é<end_of_turn>\n"
      "<start_of_turn>model\n",
    ),
    (
      SMOLLM2,
      TALK,
      "<|im_start|>system\n"
      "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
      "<|im_start|>user\n"
      " Hi? <|im_end|>\n"
      "<|im_start|>assistant\n"
      "<think>\n"
      "hm\n"
      "</think>\n"
      "\n"
      "Ho.<|im_end|>\n"
      "<|im_start|>user\n"
      "é\n"
      "<|im_end|>\n"
      "<|im_start|>assistant\n",
    ),
    (
      MISTRAL_V3,
      [*SYSTEM, *TALK],
      "<s>[INST]  Hi? [/INST] <think>\nhm\n</think>\n\nHo.</s>[INST] Be brief.\n\né\n[/INST]",
    ),
  ],
  ids=["llama3.2", "qwen3", "gemma", "smollm2", "mistral"],
)
def test_known_families_are_rendered_as_by_transformers(template, messages, text):
  values = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True, "tools": None}
  request = {"template": template, "values": values, "clock": CLOCK, "chats": [messages]}
  compiled = {}
  answer = chat_worker.answer(chat_worker.make_environment(), compiled, request)
  signal.setitimer(signal.ITIMER_PROF, 0)
  assert answer == {"results": [{"text": text}]}
  assert list(compiled) == [template]


def test_only_the_last_templates_stay_compiled():
  compiled, environment = {}, chat_worker.make_environment()
  for i in range(chat_worker._KEPT_TEMPLATES + 2):
    request = {"template": f"{i}", "values": {}, "clock": CLOCK, "chats": [TALK]}
    assert chat_worker.answer(environment, compiled, request) == {"results": [{"text": f"{i}"}]}
  signal.setitimer(signal.ITIMER_PROF, 0)
  assert list(compiled) == [f"{i}" for i in range(2, chat_worker._KEPT_TEMPLATES + 2)]


def test_memory_without_end_ends_the_worker(monkeypatch):
  """In this process there are no limits, so that an operation stands for the one that fails."""

  def fail(*_):
    raise MemoryError

  monkeypatch.setattr(chat_worker, "_render", fail)
  monkeypatch.setattr(chat_worker, "limit", lambda: None)
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"chats": [[], []]}\n')))
  out = io.TextIOWrapper(io.BytesIO())
  monkeypatch.setattr(sys, "stdout", out)
  chat_worker.main()
  assert json.loads(out.buffer.getvalue()) == {"limit": "it needs more than 256 MB of memory"}


def test_the_worker_limits_itself(monkeypatch):
  limits = {}
  monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
  before = signal.getsignal(signal.SIGPROF)
  chat_worker.limit()
  signal.signal(signal.SIGPROF, before)
  assert limits[resource.RLIMIT_CORE] == limits[resource.RLIMIT_FSIZE] == (0, 0)
  low, high = limits[resource.RLIMIT_AS]
  assert low == high > chat_worker.MEMORY_BYTES
