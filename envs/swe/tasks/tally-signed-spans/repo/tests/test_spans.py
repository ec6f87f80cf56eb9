import pytest

from tally import format_span, parse_span


@pytest.mark.parametrize(
    ("text", "seconds"), [("45s", 45), ("1h30m", 5400), ("1h 30m", 5400), ("2d", 172800), (" 1M ", 60), ("1 h", 3600)]
)
def test_parse(text, seconds):
    assert parse_span(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1h x", "5", "h"])
def test_what_is_no_span(text):
    with pytest.raises(ValueError, match="no span"):
        parse_span(text)


@pytest.mark.parametrize("seconds", [0, 1, 59, 60, 3661, 86400, 90061])
def test_round_trip(seconds):
    assert parse_span(format_span(seconds)) == seconds


def test_format():
    assert format_span(5400) == "1h 30m"
