"""Table 14 of an evaluation: no name is cut, what is missing is there, and the paper's numbers stand beside."""

import io
import re

from instructjax.core import terminal
from instructjax.report import evaluation, table14

FINDING = {
  "id": "truthful",
  "claim": "PPO-ptx's answers are <true>.",
  "paper": "about twice as often",
  "rule": "PPO-ptx - base lies above 0",
  "measured": {"PPO-ptx − base": 0.1},
  "interval": [[-0.05, 0.25]],
  "holds": None,
  "show": "share",
}
SCORERS = {
  "truth": {"name": "runs/<judge>", "auc": 0.8766},
  "info": {"name": "python:a:b", "auc": None},
}


def cell(value):
  return {"value": value, "interval": [value - 0.1, value + 0.1], "num_items": 50}


def summary(models=("sft", "ppo"), spec="runs/<b>"):
  metric = {
    "key": "accuracy",
    "title": "Accuracy",
    "show": "share",
    "better": 1,
    "is_shown": True,
    "paper": table14.cells("hellaswag", "zero_shot", "accuracy"),
    "models": {name: cell(0.5) for name in models},
    "differences": [
      {
        "a": "sft",
        "b": "ppo",
        "difference": -0.25,
        "interval": [-0.3, -0.2],
        "verdict": "lower",
      },
      {"a": "sft", "b": "x", "difference": 0.0, "interval": [-1, 1], "verdict": "cannot be told"},
    ],
  }
  part = {
    "task": "hellaswag",
    "title": "HellaSwag",
    "prompt": "zero_shot",
    "prompt_title": "0-shot",
    "data": "val.jsonl",
    "num_items": 50,
    "shots": "15 worked examples, the training split",
    "fits": {name: {"cut": 3, "too long": 2} for name in models[:1]},
    "missing": {"true_info": "no scorer (--scorers)"},
    "metrics": [
      metric,
      metric | {"key": "acc", "title": "hidden", "is_shown": False},
      metric | {"key": "f1", "title": "F1", "show": "percent", "paper": None},
    ],
  }
  return {
    "models": dict.fromkeys(models, spec),
    "memory": {"machine_bytes": 1_234_000_000, "device_bytes": None},
    "settings": {
      "bootstrap": 2000,
      "fewest_items": 10,
      "limit": None,
      "seed": 0,
      "scorers": SCORERS,
    },
    "skipped": [{"task": "rte", "reason": "no data"}],
    "parts": [part],
    "findings": [FINDING],
  }


def test_values_have_the_decimals_of_the_paper():
  assert evaluation.shown(-0.12345, "share") == "−0.123"
  assert evaluation.shown(-0.0001, "share") == "0.000"
  assert evaluation.shown(1234567.0, "score") == "1.235e+06"
  assert evaluation.shown(51.966, "percent") == "52.0"
  assert evaluation.between([0, 1], "bits") == "[0.000, 1.000]"


def test_tasks_stand_in_the_papers_order():
  found = summary()
  (part,) = found["parts"]
  found["parts"] = [part | {"task": name, "title": name} for name in ("piqa", "rte", "winogender")]
  titles = dict.fromkeys(
    row[0].partition(",")[0] for row in evaluation.differences_table(found).rows
  )
  assert list(titles) == ["winogender", "rte", "piqa"]


def test_no_name_is_cut_in_a_narrow_terminal():
  models = ("a_model_with_a_very_long_name_indeed", "another_of_these_long_names_of_models")
  out = io.StringIO()
  to = terminal.Console(file=out, width=60)
  terminal.show(evaluation.results_table(summary(models)), to=to)
  text = out.getvalue()
  for name in (*models, "HellaSwag"):
    assert name in text
  assert "…" not in text and "..." not in text


def test_what_is_missing_is_in_the_table():
  rows = evaluation.results_table(summary()).rows
  assert rows[0] == ["HellaSwag, 0-shot: Accuracy", "50", *["0.500 [0.400, 0.600]"] * 2]
  assert [row[0] for row in rows[2:]] == [
    "rte (skipped: no data)",
    "HellaSwag, 0-shot (skipped: true_info: no scorer (--scorers))",
  ]


def test_models_of_other_items_do_not_look_alike():
  found = summary()
  metric = found["parts"][0]["metrics"][0]
  first = next(iter(metric["models"]))
  metric["models"][first] = metric["models"][first] | {"num_items": 9}
  assert evaluation.results_table(found).rows[0][1] == "9/50"
  assert ">9/50<" in evaluation.section(found)


def test_a_scorer_is_named_with_what_it_is_worth():
  assert evaluation.scorer_lines(summary()) == [
    "truth is scored by runs/<judge>, whose AUC on held-out texts is 0.877",
    "info is scored by python:a:b, whose AUC on held-out texts was not measured",
  ]
  assert "runs/&lt;judge&gt;, whose AUC" in evaluation.section(summary())


def test_what_a_reader_must_know_of_a_row_is_said_in_the_terminal_too():
  assert evaluation.note_lines(summary()) == [
    "HellaSwag, 0-shot: 15 worked examples, the training split",
    "HellaSwag, 0-shot: too long, read without their beginning: sft 3",
    "HellaSwag, 0-shot: too long to be asked: sft 2",
  ]


def test_differences_are_told_in_a_word():
  rows = evaluation.differences_table(summary()).rows
  assert rows[0] == [
    "HellaSwag, 0-shot: Accuracy",
    "ppo − sft",
    "−0.250 [−0.300, −0.200]",
    "lower",
  ]
  assert rows[1][-1] == "cannot be told"


def test_findings_are_shown_with_their_rule():
  assert evaluation.findings_table(summary()).rows == [
    [
      "PPO-ptx's answers are <true>.",
      "PPO-ptx − base 0.100 [−0.050, 0.250]. Holds if PPO-ptx − base lies above 0.",
      "cannot be told",
    ]
  ]
  text = evaluation.section(summary())
  assert "are &lt;true&gt;." in text and '<span class="pill open">cannot be told</span>' in text
  assert "Holds if PPO-ptx − base lies above 0. The paper: about twice as often." in text
  found = summary()
  found["findings"] = []
  assert "findings" not in evaluation.section(found)


def test_the_section_has_the_papers_numbers_and_escapes_names(tmp_path):
  text = evaluation.section(summary())
  assert "runs/&lt;b&gt;" in text and "<b>lower</b>" in text and "hidden" not in text
  # The first row's: models, then the paper's four.
  (row,) = re.findall(r"<tr><td>HellaSwag.*?</tr>", text, re.S)[:1]
  cells = re.findall(r'<td class="soft">(.*?)</td>', row)
  assert cells[0] == "0.549/0.673/0.781" and len(cells) == 4
  assert "too long, read without their beginning: sft 3<" in row
  assert "too long to be asked: sft 2<" in row and "15 worked examples" in row
  assert "Of 4\ndifferences 2 can" in text and "rte: no data" in text
  evaluation.write(tmp_path / "index.html", summary())
  page = (tmp_path / "index.html").read_text()
  assert page.lstrip().startswith("<!doctype html>") and "--ink" in page and text in page


def test_memory_is_told():
  found = summary()
  assert evaluation.peak_memory(found) == "1.23 GB of the machine"
  assert "<p>Peak memory: 1.23 GB of the machine.</p>" in evaluation.section(found)
  found["memory"]["device_bytes"] = 9_876_000_000
  assert evaluation.peak_memory(found) == "1.23 GB of the machine, 9.88 GB of a device"


def test_a_runs_report_shows_the_last_evaluation(tmp_path):
  page = tmp_path / "index.html"
  template = evaluation.TEMPLATES.loader.get_source(evaluation.TEMPLATES, "page.html.j2")[0]
  places = re.findall(r"<!-- public sets: \w+ --><!-- end -->", template)
  page.write_text("<nav>{}</nav><p>a</p>{}<p>b</p>".format(*places))
  first = summary()
  assert evaluation.put_into(page, first)
  text = page.read_text()
  assert text.count('<a href="#evaluation">') == text.count('<section id="evaluation">') == 1
  assert (
    text.index("</nav>") < text.index("<p>a</p>") < text.index("HellaSwag") < text.index("<p>b")
  )
  second = summary()
  second["memory"]["machine_bytes"] = 5_550_000_000
  assert evaluation.put_into(page, second)
  again = page.read_text()
  assert again == text.replace("1.23 GB", "5.55 GB")
  page.write_text("<nav></nav>")
  assert not evaluation.put_into(page, first) and page.read_text() == "<nav></nav>"
