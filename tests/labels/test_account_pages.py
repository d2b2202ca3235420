"""Signing in and out, and the admin's page of people."""

import re

import pytest

from tests.labels import app


@pytest.fixture
def database(tmp_path):
  return app.make_project(tmp_path, [], (("ann", "labeler"), ("ada", "admin")))


def test_signing_in_and_out(database):
  browser = app.browser(database)
  assert browser.get("/").url.path == "/sign-in"
  wrong = browser.sign_in("ann", "wrong password")
  assert wrong.status_code == 403 and "do not belong together" in wrong.text
  assert browser.sign_in("ann").url.path == "/work"
  assert browser.get("/sign-in").url.path == "/work"
  assert browser.post("/sign-out", "/work").url.path == "/sign-in"
  assert browser.get("/work").url.path == "/sign-in"


def test_the_sixth_wrong_password_is_not_looked_at(database):
  browser = app.browser(database)
  statuses = [browser.sign_in("ann", "wrong").status_code for _ in range(6)]
  assert statuses == [403] * 5 + [429]
  assert "Try again in 15 minutes" in browser.sign_in("ann").text


def test_ones_own_password(database):
  ann = app.browser(database, "ann")
  change = lambda old, new, again: ann.post("/account", "/account", old=old, new=new, again=again)
  assert "typed in two ways" in change(app.PASSWORD, "a new password", "another").text
  assert "old password is not right" in change("wrong", "a new password", "a new password").text
  assert "is changed" in change(app.PASSWORD, "a new password", "a new password").text
  assert app.browser(database).sign_in("ann", "a new password").url.path == "/work"


def test_the_admin_adds_people_and_shuts_them_out(database):
  ada = app.browser(database, "ada")
  said = ada.post("/people", "/people", do="add", name="bea", role="labeler", cohort="heldout").text
  password = re.search("bea can sign in with the password (\\S+),", said)[1]
  bea = app.browser(database)
  assert bea.sign_in("bea", password).url.path == "/work"
  again = ada.post("/people", "/people", do="add", name="bea", role="labeler")
  assert again.status_code == 400 and "named &#39;bea&#39; already" in again.text
  assert "bea is shut out." in ada.post("/people", "/people", do="shut out", name="bea").text
  assert bea.get("/work").url.path == "/sign-in"
  assert "bea is let in." in ada.post("/people", "/people", do="let in", name="bea").text
  said = ada.post("/people", "/people", do="reset", name="bea").text
  assert bea.sign_in("bea", password).status_code == 403
  assert bea.sign_in("bea", re.search("bea is (\\S+),", said)[1]).url.path == "/work"
  assert "shut yourself out" in ada.post("/people", "/people", do="shut out", name="ada").text
