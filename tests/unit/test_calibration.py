"""A judge against what people said: figures counted by hand, and the command over a real journal."""

import json
from contextlib import closing
from dataclasses import replace

import pytest
from test_journal import judgement, turn

from clawrl.algorithms.calibration import Calibration, Verdict, calibrate
from clawrl.cli import main
from clawrl.commands.judge import verdicts
from clawrl.journal.store import JournalStore
from clawrl.types import Feedback


def test_figures_by_hand():
    """Two bins: at confidence 1.0 one of two is right (gap 1/2), at 0.6 both are (gap 0.4): (2·0.5 + 2·0.4) / 4."""
    found = calibrate(
        [
            Verdict(1, 1.0, 1),
            Verdict(-1, 1.0, 1),
            Verdict(1, 0.6, 1),
            Verdict(-1, 0.6, -1),
            Verdict(0, 0.6, -1),
            Verdict(None, 0.0, -1),
        ]
    )
    assert (found.approved, found.refused) == (3, 3)
    assert found.coverage == pytest.approx(4 / 6)
    assert found.accuracy == pytest.approx(3 / 4)
    assert found.ece == pytest.approx((2 * 0.5 + 2 * 0.4) / 4)


def test_nothing_to_measure_is_no_figure():
    assert calibrate([]) == Calibration(0, 0, None, None, None)
    assert calibrate([Verdict(0, 1.0, 1)]) == Calibration(1, 0, 0.0, None, None)


def thumbs(turn: str, score, text: str | None = None, at: float = 1.0) -> Feedback:
    return Feedback(f"{turn}-{score}-{at}", turn, "ann", score, text, at)


def voted(turn: str, *votes: int | None):
    return replace(judgement(turn), votes=votes, score=-1)


def test_the_votes_count_against_the_latest_thumb_and_words_leave_a_turn_out():
    labelled = [
        (voted("a", 1, 1, -1), thumbs("a", -1)),
        (voted("a", 1, 1, -1), thumbs("a", 1, at=2.0)),
        (voted("b", -1, None), thumbs("b", -1)),
        (voted("c", 1), thumbs("c", 1, "too long")),
        (voted("d", 1), thumbs("d", 0)),
        (voted("e"), thumbs("e", 1)),  # judged by the thumb alone
        (voted("f", 1, -1), thumbs("f", 1)),
    ]
    assert verdicts(labelled) == [Verdict(1, 2 / 3, 1), Verdict(-1, 1 / 2, -1), Verdict(0, 0.0, 1)]


def test_the_command_tells_and_refuses_where_there_are_no_labels(tmp_path, capsys):
    url = f"sqlite:///{tmp_path / 'journal.sqlite'}"
    with closing(JournalStore(url)) as store:
        store.append(*(turn(id) for id in "ab"), voted("a", 1, 1, 1), voted("b", 1, 1, -1))
    assert main(["judge", "--journal", url]) == 1
    assert "no judged turn has a thumb" in capsys.readouterr().err
    with closing(JournalStore(url)) as store:
        store.append(thumbs("a", 1), thumbs("b", -1))
    assert main(["judge", "--run", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["approved"], told["refused"], told["coverage"], told["accuracy"]) == (1, 1, 1.0, 0.5)
    assert main(["judge", "--run", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "1 thumbs up, 1 down" in shown
    assert "0.500" in shown
