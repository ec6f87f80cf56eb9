from tally import gaps, merge, total


def test_merge_overlapping():
    assert merge([(1, 4), (2, 6), (8, 9)]) == [(1, 6), (8, 9)]


def test_merge_touching():
    assert merge([(1, 2), (2, 3)]) == [(1, 3)]


def test_merge_contained():
    assert merge([(1, 10), (2, 3), (4, 5)]) == [(1, 10)]


def test_merge_unordered_and_empty():
    assert merge([(5, 6), (1, 2), (3, 3)]) == [(1, 2), (5, 6)]
    assert merge([]) == []


def test_total():
    assert total([(0, 5), (3, 8), (10, 11)]) == 9
    assert total([(0, 10), (1, 2)]) == 10


def test_gaps():
    assert gaps([(2, 3), (5, 6)], 0, 8) == [(0, 2), (3, 5), (6, 8)]


def test_gaps_beyond_the_end():
    assert gaps([(2, 3), (9, 12)], 0, 8) == [(0, 2), (3, 8)]
    assert gaps([(0, 8)], 0, 8) == []
