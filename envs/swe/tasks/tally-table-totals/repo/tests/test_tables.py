from tally import render


def test_columns():
    assert render([("a", 1), ("long", 22)]) == "a      1\nlong  22"


def test_nothing():
    assert render([]) == ""


def test_rows_may_be_a_generator():
    assert render((name, 1) for name in "ab") == "a  1\nb  1"
