"""Figures as text of the page: the same twice, in the page's ink, and none where there is nothing to show."""

from instructjax.report import figures, panels


def test_figures_are_the_same_twice_and_take_the_page_s_ink():
  draw = [lambda ax: bool(ax.plot([0, 1], [1, 0], label="a"))]
  first = figures.svg(draw, "a line", columns=1)
  assert first == figures.svg(draw, "a line", columns=1)
  assert "<dc:date>" not in first  # which would differ from run to run
  assert 'aria-label="a line"' in first and panels.INK not in first and "currentColor" in first
  assert figures.svg([lambda ax: False], "nothing", columns=2) == ""


def test_labels_are_text_and_no_formulas():
  def draw(ax):
    ax.set_title("50% $x_$ \\frac{")
    return bool(ax.plot([0, 1], [1, 0], label="$x_$")) and bool(ax.legend())

  drawn = figures.svg([draw], "a line", columns=1)
  assert "50% $x_$ \\frac{" in drawn and ">$x_$<" in drawn
