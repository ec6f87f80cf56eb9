"""Spans of time as people write them: `1h 30m`, `45s`, `-2d`."""

import re

SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_PART = re.compile(r"(\d+)\s*([dhms])")


def parse_span(text):
    """Seconds. Raises ValueError for what is no span."""
    words = text.strip().lower()
    sign = -1 if words.startswith("-") else 1
    words = words.lstrip("+-")
    parts = _PART.findall(words)
    if not parts or _PART.sub("", words).strip():
        raise ValueError(f"{text!r} is no span of time; write it like 1h 30m")
    return sign * sum(int(number) * SECONDS[unit] for number, unit in parts)


def format_span(seconds):
    """The shortest text that parse_span reads back as the same number of seconds."""
    if seconds == 0:
        return "0s"
    sign = "-" if seconds < 0 else ""
    left, parts = abs(seconds), []
    for unit, size in SECONDS.items():
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}")
    return sign + " ".join(parts)
