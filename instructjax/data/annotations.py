"""Rankings as annotation tools export them: Argilla's and Label Studio's.

Called by `formats`. Imports `messages`. A row holds one task, which several annotators may have ranked, so each
function returns a list of rows with the keys that `records.parse_record` expects. All functions raise BadRecord.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from instructjax.data.messages import BadRecord, listed

_PROMPTS = ("prompt", "instruction", "question", "query", "input")
_BODIES = ("body", "text", "html", "title")  # of an item of Label Studio's list, best first
_UNSAID = ("discarded", "draft", "pending")  # an annotator's unfinished or withdrawn work


def is_argilla(obj: Mapping[str, Any]) -> bool:
  """Whether a row has the shape of one of Argilla's exports."""
  if isinstance(obj.get("fields"), dict) and isinstance(obj.get("responses"), dict | list):
    return True
  return any(_argilla_flat(obj, key) for key in obj)


def argilla(obj: dict[str, Any], names: Mapping[str, str], where: str) -> list[dict[str, Any]]:
  """The rankings of a record, one for each annotator who has submitted one.

  A ranking question orders names of fields, which hold the answers.

  Args:
    obj: the record, as `to_list` or `to_json` writes it, flat or with `fields`; as `to_datasets` or version 1 did.
    names: the field of the `prompt` and the question of `ranks`, where there are several.
    where: `file:line`, for messages.
  """
  fields = obj["fields"] if isinstance(obj.get("fields"), dict) else obj
  found = {}
  for question, user, value in _argilla_responses(obj):
    order = _order(value)
    if order and question == names.get("ranks", question):
      found.setdefault(question, []).append((user, order))
  if not found:
    raise BadRecord(f"{where}: has no submitted ranking")
  if len(found) > 1:
    raise BadRecord(
      f"{where}: has rankings of several questions ({listed(found)}); choose one: ?format=argilla&ranks=QUESTION"
    )
  ((_, rankings),) = found.items()
  rows = []
  for user, order in rankings:
    if absent := [name for name in order if name not in fields]:
      raise BadRecord(f"{where}: ranks {listed(absent[:1])}, which is no field of the record")
    rows.append(
      {
        "prompt": fields[_prompt_field(fields, order, names, "argilla", where)],
        "responses": [fields[name] for name in order],
        "ranks": _from_1(order.values(), where),
        "labeler": user,
      }
    )
  return rows


def _argilla_flat(obj: Mapping[str, Any], key: str) -> bool:
  value = obj[key]
  if key.endswith(".responses"):
    return isinstance(value, list)
  is_response = lambda item: isinstance(item, dict) and {"user_id", "value"} <= item.keys()
  return isinstance(value, list) and bool(value) and all(map(is_response, value))


def _argilla_responses(obj: dict[str, Any]) -> Iterator[tuple[str, str | None, Any]]:
  """(question, user, value) of each response that was submitted."""
  responses = obj.get("responses") if isinstance(obj.get("fields"), dict) else None
  if isinstance(responses, list):  # one object a user, as Argilla's server sends it
    for response in responses:
      values = response.get("values") if isinstance(response, dict) else None
      if isinstance(values, dict) and response.get("status") not in _UNSAID:
        for question, value in values.items():
          yield (
            question,
            response.get("user_id"),
            value.get("value") if isinstance(value, dict) else value,
          )
    return
  by_question = responses if isinstance(responses, dict) else obj
  for question, given in by_question.items():
    if question.endswith(".responses") and isinstance(given, list):  # columns beside each other
      users, states = (obj.get(f"{question}.{name}") for name in ("users", "status"))
      for i, value in enumerate(given):
        if _at(states, i) not in _UNSAID:
          yield question.removesuffix(".responses"), _at(users, i), value
    elif isinstance(given, list):
      for response in given:
        if isinstance(response, dict) and response.get("status") not in _UNSAID:
          yield question, response.get("user_id"), response.get("value")


def _at(column: Any, index: int) -> Any:
  return column[index] if isinstance(column, list) and index < len(column) else None


def _order(value: Any) -> dict[str, Any]:
  """Name -> rank of a ranking: names in order, names with ranks, or both in columns; {} if it is no ranking."""
  if isinstance(value, dict) and {"rank", "value"} <= value.keys():
    ranks, names = value["rank"], value["value"]
    if isinstance(ranks, list) and isinstance(names, list) and len(ranks) == len(names):
      value = [{"rank": rank, "value": name} for rank, name in zip(ranks, names, strict=True)]
  if not isinstance(value, list) or len(value) < 2:
    return {}
  if all(isinstance(name, str) for name in value):
    order = dict(zip(value, range(1, len(value) + 1), strict=True))
  elif all(isinstance(item, dict) and isinstance(item.get("value"), str) for item in value):
    order = {item["value"]: item.get("rank") for item in value}
  else:
    return {}
  return order if len(order) == len(value) else {}


def _from_1(ranks: Any, where: str) -> list[Any]:
  """Ranks counted from 1, if they are counted from 0."""
  ranks = list(ranks)
  if not all(isinstance(rank, int | float) and not isinstance(rank, bool) for rank in ranks):
    raise BadRecord(f"{where}: a rank must be a number")
  return [rank + 1 for rank in ranks] if min(ranks) == 0 else ranks


def _prompt_field(
  fields: Mapping[str, Any], order: Mapping, names: Mapping[str, str], tool: str, where: str
) -> str:
  if "prompt" in names:
    if names["prompt"] not in fields:
      raise BadRecord(f"{where}: has no field {names['prompt']!r} (fields found: {listed(fields)})")
    return names["prompt"]
  others = [
    name for name, value in fields.items() if name not in order and isinstance(value, str | list)
  ]
  for name in _PROMPTS:
    if name in others:
      return name
  if len(others) != 1:
    raise BadRecord(
      f"{where}: which field is the prompt is not clear ({listed(others) or 'none'});"
      f" name it: ?format={tool}&prompt=FIELD"
    )
  return others[0]


def is_label_studio(obj: Mapping[str, Any]) -> bool:
  """Whether a row has the shape of Label Studio's JSON export, or of its JSON_MIN export of a ranked list."""
  if isinstance(obj.get("data"), dict) and isinstance(obj.get("annotations"), list):
    return True
  items = obj.get("items")
  return (
    isinstance(items, list)
    and bool(items)
    and all(isinstance(item, dict) and "id" in item for item in items)
    and any(isinstance(value, dict) and _ranked_ids(value) for value in obj.values())
  )


def label_studio(obj: dict[str, Any], names: Mapping[str, str], where: str) -> list[dict[str, Any]]:
  """The rankings of a task, one for each annotation that was not cancelled.

  The tag is either Ranker on a List of items, which have an id and a body, or Pairwise on answer1 and answer2.

  Args:
    obj: the task, as exported as JSON or JSON_MIN.
    names: the key of the `prompt` in the task's data, where it is not clear.
    where: `file:line`, for messages.
  """
  if "annotations" in obj:
    data, annotations = obj["data"], obj["annotations"]
  else:
    data = {key: value for key, value in obj.items() if not isinstance(value, dict)}
    results = [
      {"type": "ranker", "value": {"ranker": v}} for v in obj.values() if isinstance(v, dict)
    ]
    annotations = [{"result": results, "completed_by": obj.get("annotator")}]
  rows = []
  for annotation in annotations:
    if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
      continue
    results = annotation.get("result")
    for result in results if isinstance(results, list) else []:
      if not isinstance(result, dict) or not isinstance(result.get("value"), dict):
        continue
      ranked = _label_studio_order(result["value"], data, where)
      if ranked:
        prompt = data[
          _prompt_field(data, {"answer1": 1, "answer2": 2}, names, "label_studio", where)
        ]
        rows.append({"prompt": prompt, **ranked, "labeler": _annotator(annotation)})
  if not rows:
    raise BadRecord(f"{where}: has no finished annotation that ranks answers")
  return rows


def _label_studio_order(value: dict[str, Any], data: dict[str, Any], where: str) -> dict[str, Any]:
  if value.get("selected") in ("left", "right"):
    best, other = ("answer1", "answer2") if value["selected"] == "left" else ("answer2", "answer1")
    if not {best, other} <= data.keys():
      raise BadRecord(f"{where}: a pair must be answer1 and answer2 (keys found: {listed(data)})")
    return {"chosen": data[best], "rejected": data[other]}
  ids = _ranked_ids(value.get("ranker"))
  if ids is None:
    if isinstance(value.get("ranker"), dict):
      raise BadRecord(f"{where}: answers are sorted into several buckets, which have no order")
    return {}
  items = data.get("items")
  if not isinstance(items, list):
    lists = [v for v in data.values() if isinstance(v, list)]
    items = lists[0] if len(lists) == 1 else []
  bodies = {
    str(item["id"]): next((item[key] for key in _BODIES if isinstance(item.get(key), str)), None)
    for item in items
    if isinstance(item, dict) and "id" in item
  }
  if absent := [name for name in ids if name not in bodies]:
    raise BadRecord(f"{where}: ranks item {listed(absent[:1])}, which the task does not hold")
  return {"responses": [bodies[name] for name in ids], "ranks": list(range(1, len(ids) + 1))}


def _ranked_ids(ranker: Any) -> list[str] | None:
  """The ids of a list in order: a list, or the only bucket that holds any; `_` holds what was left unsorted."""
  if isinstance(ranker, dict):
    full = {name: ids for name, ids in ranker.items() if ids}
    if len(full) > 1:
      full.pop("_", None)
    if len(full) != 1:
      return None
    (ranker,) = full.values()
  if not isinstance(ranker, list) or not all(isinstance(item, str | int) for item in ranker):
    return None
  ids = [str(item) for item in ranker]
  return ids if len(ids) > 1 and len(set(ids)) == len(ids) else None


def _annotator(annotation: Mapping[str, Any]) -> Any:
  by = annotation.get("completed_by")
  return (by.get("email") or by.get("id")) if isinstance(by, dict) else by
