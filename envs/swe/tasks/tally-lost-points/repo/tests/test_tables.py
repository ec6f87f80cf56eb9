from tally import render


def test_columns():
    assert render([("a", 1), ("long", 22)]) == "a      1\nlong  22"


def test_nothing():
    assert render([]) == ""
    assert render([], totals=True) == ""


def test_totals():
    assert render([("a", 1), ("b", 2)], totals=True).splitlines()[-1] == "total  3"


def test_spans():
    assert render([("a", 5400)], unit="span") == "a  1h 30m"


def test_totals_of_spans():
    assert render([("a", 5400), ("b", 1800)], totals=True, unit="span").splitlines()[-1] == "total      2h"


def test_rows_may_be_a_generator():
    assert render((name, 1) for name in "ab") == "a  1\nb  1"
