"""Intervals [start, end) on a line, as pairs of numbers."""


def merge(intervals):
    """The same points with as few intervals as possible, in order; those that touch become one."""
    merged = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def total(intervals):
    """The length that they cover, each point counted once."""
    return sum(end - start for start, end in merge(intervals))


def gaps(intervals, start, end):
    """What of [start, end) they leave open."""
    open_, at = [], start
    for low, high in merge(intervals):
        if low >= end:
            break
        if low > at:
            open_.append((at, low))
        at = max(at, high)
    if at < end:
        open_.append((at, end))
    return open_
