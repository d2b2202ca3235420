"""The application in a browser with scripts: chromium, driven by Playwright. Skipped where either is absent."""

import contextlib
import os
import threading
import time
import urllib.parse

import pytest
import uvicorn

from instructjax.labels import playground, schema, serving, trainings
from tests.labels import app

CHROMIUM = "/usr/bin/chromium"
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is in the test extra")
if not os.access(CHROMIUM, os.X_OK):
  pytest.skip(f"no {CHROMIUM}", allow_module_level=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """(address, database) of a running server."""
  items = [
    app.item(),
    app.item("Write a line.", (), "demonstration"),
    app.item("t", (("word " * 60, "m"), ("x" * 200, "m")), kind="toxicity"),
  ]
  people = (("ann", "labeler"), ("una", "user"), ("rob", "researcher"))
  database = app.make_project(tmp_path_factory.mktemp("project"), items, people)
  play = playground.Playground(playground.Model(str.upper), lambda text: text.replace("7", "[N]"))
  trainings.register(
    database, trainings.Training("a", "run/rm", 0.7, 0.6, 0.8, 9, 1.0), 0, 9.0, 9.0
  )
  application = serving.make(database, ["127.0.0.1"], play=play)
  config = uvicorn.Config(application, port=0, log_level="error")
  server, socket = uvicorn.Server(config), None
  socket = config.bind_socket()
  thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
  thread.start()
  yield f"http://127.0.0.1:{socket.getsockname()[1]}", database
  server.should_exit = True
  thread.join()
  socket.close()


@pytest.fixture(scope="module")
def page(site):
  with playwright.sync_playwright() as started:
    chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    found = context.new_page()
    found.set_default_timeout(10_000)
    wrong = []
    found.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    found.on("pageerror", lambda error: wrong.append(str(error)))
    yield found
    chromium.close()
  expected = (
    "Failed to load resource: net::ERR_INTERNET_DISCONNECTED",
    "Failed to load resource: the server responded with a status of 503",
  )
  assert [
    text for text in wrong if not text.startswith(expected)
  ] == []  # no breach of the CSP either


def ranks(page) -> dict[str, str]:
  """Beginning of an answer's text -> its rank in the form."""
  return page.evaluate(
    "Object.fromEntries([...document.querySelectorAll('#ranks select')].map(s => [s.dataset.text, s.value]))"
  )


def card(page, text):
  return page.locator(".one", has_text=text)


def drag(page, text, rank):
  """Moves a card into a rank with the mouse."""
  zone = page.locator(f'.zone[data-rank="{rank}"]')
  zone.scroll_into_view_if_needed()
  start, end = card(page, text).bounding_box(), zone.bounding_box()
  page.mouse.move(start["x"] + 20, start["y"] + 15)
  page.mouse.down()
  page.mouse.move(end["x"] + end["width"] - 30, end["y"] + end["height"] / 2, steps=4)
  page.mouse.up()


def _says(page, text):
  playwright.expect(page.locator("#saved")).to_have_text(text)


def test_a_labelers_day(site, page):
  """One story, in order: each step begins where the last one ended."""
  address, database = site
  page.goto(address)
  page.get_by_label("Name").fill("ann")
  page.get_by_label("Password").fill(app.PASSWORD)
  page.keyboard.press("Enter")
  page.get_by_role("link", name="Begin").click()
  _rank_by_mouse_and_keyboard(page)
  _load_the_page_anew(page)
  _lose_the_network(page)
  _lose_the_database(page)
  _reload_while_a_draft_is_on_its_way(page)
  _type_while_a_draft_is_on_its_way(page)
  _lose_the_network_with_a_clock_that_is_slow(page)
  _send_by_keyboard_alone(page)
  _demonstrate(page)
  with database.read() as connection:
    payloads = connection.execute(schema.submissions.select()).all()
  assert len(payloads) == 2 and '"text": "A line."' in payloads[1].payload
  assert all(row.seconds > 0 for row in payloads)
  _fits_a_telephone(page)
  page.get_by_role("button", name="Sign out").click()
  assert page.url.endswith("/sign-in")
  assert page.evaluate("Object.keys(localStorage).length") == 0


def _rank_by_mouse_and_keyboard(page):
  playwright.expect(page.get_by_role("group", name="Rank 1 (best)")).to_have_count(1)
  drag(page, "Blue.", 1)
  assert ranks(page) == {"Blue.": "1", "Green, or so.": "", "No.": ""}
  card(page, "Green").focus()
  page.keyboard.press("1")  # a tie
  assert page.locator("#told").inner_text().endswith("tied with " + _letter(page, "Blue."))
  card(page, "No.").focus()
  page.keyboard.press("ArrowUp")  # from below: to the last rank
  assert ranks(page) == {"Blue.": "1", "Green, or so.": "1", "No.": "3"}
  page.keyboard.press("ArrowUp")
  page.keyboard.press("u")
  assert ranks(page)["No."] == "3"
  drag(page, "Blue.", 2)
  page.get_by_role("button", name="Undo").click()
  assert ranks(page) == {"Blue.": "1", "Green, or so.": "1", "No.": "3"}
  assert card(page, "No.").get_attribute("aria-label").endswith("Rank 3")


def _letter(page, text) -> str:
  return card(page, text).locator("b").inner_text().removeprefix("Output ")


def _load_the_page_anew(page):
  """Seconds of work are counted on, by the tab and from the server's draft."""
  _says(page, "Draft saved")
  page.evaluate(
    "sessionStorage.setItem('seconds', JSON.stringify([500, JSON.parse(sessionStorage.seconds)[1]]))"
  )
  page.reload()
  with page.expect_response("**/draft") as answer:
    page.locator("textarea").first.fill("a note")
  sent = urllib.parse.parse_qs(answer.value.request.post_data)
  assert 500 <= int(sent["seconds"][0]) < 600
  page.evaluate("sessionStorage.clear()")
  page.reload()
  assert 500 <= int(page.locator("#work").get_attribute("data-seconds")) < 600


def _lose_the_network(page):
  """What is filled in without a network is there again after the page is loaded anew, and gets to the server."""
  _says(page, "Draft saved")
  page.context.set_offline(True)
  page.locator("textarea").first.fill("typed in a tunnel")
  _says(page, "No network: kept in this browser")
  page.get_by_role("button", name="Send").click()
  assert page.url.endswith("/items/1")
  page.context.set_offline(False)
  with contextlib.suppress(playwright.Error):
    page.reload()
  playwright.expect(page.locator("textarea").first).to_have_value("typed in a tunnel")
  assert ranks(page) == {"Blue.": "1", "Green, or so.": "1", "No.": "3"}
  _says(page, "Draft saved")
  page.evaluate("localStorage.clear()")
  page.reload()  # now from the server's draft
  assert page.locator("textarea").first.input_value() == "typed in a tunnel"


def _lose_the_database(page):
  """The draft that the server did not take is sent again."""
  page.reload()
  page.route("**/draft", lambda route: route.fulfill(status=503))
  page.locator("textarea").first.fill("typed while the database was away")
  _says(page, "The server has a problem: kept in this browser")
  page.unroute("**/draft")
  page.evaluate("window.dispatchEvent(new Event('online'))")  # rather than wait for 5 s
  _says(page, "Draft saved")
  page.evaluate("localStorage.clear()")
  page.reload()
  playwright.expect(page.locator("textarea").first).to_have_value(
    "typed while the database was away"
  )


def _reload_while_a_draft_is_on_its_way(page):
  """The server makes the page before it has the draft, and the browser hears of the draft before it has the page."""

  def late(route):
    if route.request.method != "GET":
      return route.fallback()
    made = route.fetch()
    time.sleep(1.5)  # the draft is sent after .8 s
    return route.fulfill(response=made)

  page.route("**/items/1", late)
  page.locator("textarea").first.fill("typed at the last moment")
  page.reload()
  page.unroute("**/items/1")
  playwright.expect(page.locator("textarea").first).to_have_value("typed at the last moment")


def _type_while_a_draft_is_on_its_way(page):
  """A draft that takes long does not arrive after the next one, and take its place."""
  held = []

  def hold_the_first(route):
    if held:
      return route.fallback()
    return held.append(route)

  page.reload()
  page.route("**/draft", hold_the_first)
  with page.expect_request("**/draft"):
    page.locator("textarea").first.fill("typed first")
  page.locator("textarea").first.fill("typed next")
  page.wait_for_timeout(1100)  # a draft is sent after .8 s
  with page.expect_response(lambda answer: "typed+next" in (answer.request.post_data or "")):
    held[0].continue_()
  page.unroute("**/draft")
  page.evaluate("localStorage.clear()")
  page.reload()  # from the server's draft
  playwright.expect(page.locator("textarea").first).to_have_value("typed next")


def _lose_the_network_with_a_clock_that_is_slow(page):
  """What this browser kept is newer than the server's draft, whatever its clock says."""
  other = page.context.new_page()
  other.add_init_script("const now = Date.now; Date.now = () => now() - 3600000;")
  other.goto(page.url)
  other.route("**/draft", lambda route: route.abort())
  other.locator("textarea").first.fill("kept here")
  _says(other, "No network: kept in this browser")
  other.reload()
  playwright.expect(other.locator("textarea").first).to_have_value("kept here")
  other.close()


def _send_by_keyboard_alone(page):
  """Rates each output and sends the form without a mouse."""
  for output in page.locator(".output").all():
    output.locator("input[type=radio]").first.focus()
    for _ in range(4):
      page.keyboard.press("ArrowRight")
    assert output.locator(".scale :checked").get_attribute("value") == "5"
    output.get_by_role("button", name="No to all that is left").focus()
    page.keyboard.press("Enter")
    assert output.locator(".field :checked").count() == 11
  page.get_by_role("button", name="Send").focus()
  page.keyboard.press("Enter")
  page.wait_for_url("**/items/2")


def _demonstrate(page):
  page.get_by_label("Your answer").fill("A line.")
  page.get_by_role("button", name="Send").click()
  page.wait_for_url("**/items/3")


def _fits_a_telephone(page):
  """At 390 pixels nothing is wider than the page; labelers at work see the same form."""
  page.set_viewport_size({"width": 390, "height": 844})
  for path in ("/work", "/items/3", "/items/1", "/history", "/account"):
    page.goto(page.url.partition("/items")[0].partition("/history")[0].partition("/work")[0] + path)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
  page.set_viewport_size({"width": 1280, "height": 900})


def _sign_in(page, address, name):
  page.goto(f"{address}/sign-in")
  page.get_by_label("Name").fill(name)
  page.get_by_label("Password").fill(app.PASSWORD)
  page.keyboard.press("Enter")
  page.get_by_role("button", name="Sign out").wait_for()


def _fits(page) -> bool:
  page.set_viewport_size({"width": 390, "height": 844})
  found = page.evaluate("document.documentElement.scrollWidth") <= 390
  page.set_viewport_size({"width": 1280, "height": 900})
  return found


def test_a_user_in_the_playground(site, page):
  address, database = site
  _sign_in(page, address, "una")
  page.get_by_label("Your prompt").fill("say 7 </textarea><script>x</script>")
  page.get_by_role("button", name="Ask").click()
  playwright.expect(page.get_by_text("Nothing was kept.")).to_be_visible()
  assert page.get_by_label("Your prompt").input_value() == "say 7 </textarea><script>x</script>"
  page.get_by_label("Keep this prompt for training models").check()
  page.get_by_role("button", name="Ask").click()
  playwright.expect(page.get_by_text("This was kept of your prompt:")).to_be_visible()
  assert _fits(page)
  page.get_by_role("button", name="Take back: say [N]").click()
  playwright.expect(page.get_by_text("No prompt.")).to_be_visible()
  with database.read() as connection:
    assert not connection.execute(schema.prompts.select()).all()
  page.get_by_role("button", name="Sign out").click()


def test_the_plot_of_trainings(site, page):
  _sign_in(page, site[0], "rob")
  page.get_by_role("link", name="Trainings").click()
  playwright.expect(page.get_by_role("img", name="run/rm 70%")).to_be_visible()
  assert page.locator(".plot circle").count() == 1 and _fits(page)
  page.get_by_role("button", name="Sign out").click()


def test_a_drag_on_a_touch_screen_does_not_scroll(page, site):
  assert "touch-action: none" in page.request.get(f"{site[0]}/static/label.css").text()
