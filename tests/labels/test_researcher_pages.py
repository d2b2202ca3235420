"""The researcher's pages on a small project of which every number is worked out by hand."""

import re

import pytest

from instructjax.labels import work
from tests.labels import app

PEOPLE = (("ann", "labeler"), ("bea", "labeler"), ("rob", "researcher"), ("ada", "admin"))
PAIR = (("good", "model-one"), ("bad", "model-two"))


@pytest.fixture(scope="module")
def database(tmp_path_factory):
  """ann and bea agree on item 1, differ on item 2, and rob is of ann's opinion on item 3, the screening's."""
  items = [
    app.item("one", PAIR, wanted=2),
    app.item("two", PAIR, wanted=2, source="customer"),
    app.item("test", PAIR, is_screening=True),
    app.item("demo", (), "demonstration", is_screening=True),
  ]
  found = app.make_project(tmp_path_factory.mktemp("project"), items, PEOPLE)
  best = {"ann": "good good good", "bea": "good bad bad", "rob": "? ? good"}
  for name, texts in best.items():
    person = app.user(found, name)
    while (number := work.next_item(found, person, 0.0)) is not None:
      if number == 4:
        app.submit(found, person, number)
        continue
      chosen = texts.split()[number - 1]
      ids = {answer.text: answer.id for answer in work.task(found, person, number).answers}
      ranks = [
        1 if answer.text == chosen else 2 for answer in work.task(found, person, number).answers
      ]
      flag = {f"{ids['bad']}.violent": "yes" if name != "bea" else "no"}
      app.submit(found, person, number, ranks, **flag)
  return found


@pytest.fixture(scope="module")
def rob(database):
  return app.browser(database, "rob")


def cells(html) -> list[list[str]]:
  """The rows of all tables of a page, as texts."""
  clean = lambda cell: " ".join(re.sub(r"<[^>]+>", "", cell).split())
  rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
  return [
    [clean(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)]
    for row in rows
  ]


def test_overview(rob):
  rows = cells(rob.get("/").text)
  assert ["ranking", "2", "4", "4"] in rows and [
    "ranking, screening",
    "1",
    "everybody",
    "2",
  ] in rows
  assert ["RM", "1", "1", "0", "0"] in rows and ["SFT", "0", "0", "0", "0"] in rows
  # "good" of model-one is first in ann's three, bea's one of three and rob's one: 5 of 7.
  (wins,) = [row for row in rows if row[0] == "model-one"]
  assert wins[1] == "model-two" and wins[2].startswith("71% ") and wins[3] == "7"
  (ann,) = [row for row in rows if row[0] == "ann"]
  assert ann[1:3] == ["4", "0"]


def test_agreement(rob):
  """Pairs decided alike: ann and bea 1 of 3 (items 1, 2, 3), ann and rob 1 of 1, bea and rob 0 of 1: 2 of 5."""
  html = rob.get("/agreement").text
  assert "<strong>40% " in html and "(5 pairs in 3 items)" in html
  rows = cells(html)
  pairs = {
    tuple(row[:2]): row[2].split()[0] for row in rows if len(row) == 4 and row[1] in ("bea", "rob")
  }
  assert pairs == {("ann", "bea"): "33%", ("ann", "rob"): "100%", ("bea", "rob"): "0%"}
  (ann,) = [row for row in rows if row[0] == "ann" and len(row) == 4 and "to" in row[1]]
  assert ann[1].startswith("50% ") and ann[2] == "4"


def test_screening_and_grading(rob):
  """bea flags one of two answers as rob does, and ranks the pair the other way round."""
  html = rob.get("/screening").text
  by_name = {row[0]: row[1:] for row in cells(html)}
  assert [cell.split()[0] for cell in by_name["ann"][:3]] == ["100%", "100%", "–"]
  assert [cell.split()[0] for cell in by_name["bea"][:3]] == ["50%", "0%", "–"]
  assert by_name["ann"][4:] == ["no", "open"]  # the demonstration is not graded yet
  numbers = re.findall(r'name="submission" value="(\d+)"', html)
  assert len(numbers) == 2
  for number in numbers:
    rob.post("/screening", "/screening", submission=number, grade="6")
  by_name = {row[0]: row[1:] for row in cells(rob.get("/screening").text)}
  assert by_name["ann"][2].startswith("6.00") and by_name["ann"][4:] == ["yes", "open"]
  assert by_name["bea"][4] == "no"
  for wrong in ({"submission": numbers[0], "grade": "8"}, {"submission": "1", "grade": "5"}):
    assert rob.post("/screening", "/account", **wrong).status_code == 400


def test_disagreements_and_a_second_opinion(database, rob):
  html = rob.get("/disagreements").text
  assert re.findall(r"Item (\d)</a>: (\d+)%", html) == [("2", "100"), ("3", "67")]
  review = rob.get("/review/2").text
  assert "from model-one" in review and "ann: rank" in review and "bea: rank" in review
  assert rob.get("/review/99").status_code == 404
  assert rob.post("/review/99/take", "/account").status_code == 404
  taken = rob.post("/review/2/take", "/review/2")
  assert taken.url.path == "/items/2" and "model-one" not in taken.text


def test_the_survey(database):
  ann = app.browser(database, "ann")
  said = ann.post(
    "/survey", "/survey", **{"subject-0": "2", "subject-1": "0", "subject-2": "9"}
  ).text
  assert "Your answers are kept." in said and said.count(" checked") == 2
  rows = {row[0]: row for row in cells(app.browser(database, "ada").get("/screening").text)}
  assert rows["ann"][4] == "Race and ethnicity"
