"""`clawrl train-judge`: a reward model from people's thumbs, for `judge.reward_model`.

    journal ─► thumbs ─┬─ four fifths of the sessions ─► frozen model's features ─► head ─┬─► FOLDER
                       └─ one fifth, held out ─────────────────────────────────► figures ─┘

Knows which labels are fitted to and which measure, and how the figures are shown. Ignores how features and heads come
about (`serving.reward_model`, `algorithms.reward`). Shows no word of what was said.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from clawrl.algorithms.calibration import Verdict, calibrate
from clawrl.commands.client import add_journal, add_json, journal_of, new_folder
from clawrl.commands.judge import add_figures
from clawrl.config import lasting_name
from clawrl.errors import ClawrlError

if TYPE_CHECKING:
    from clawrl.journal.store import JournalReader
    from clawrl.serving.reward_model import About, HeldOut

FEWEST = 20
"""Labels of either kind without which nothing is fitted."""
HELD_OUT_SHARE = 0.2
"""Sessions whose labels only measure; the gate's held-out sessions (`gate.held_out_share`, if no more) are of them."""
FOLDS = 5
PAGE = 200
TELL_EVERY_S = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class Label:
    """What somebody said of a reply, and the tokens it is made of."""

    session: str
    prompt_ids: np.ndarray  # i32[P]
    completion_ids: np.ndarray  # i32[T]
    score: int  # -1 or +1


def add(commands: Any) -> None:
    """Register the command."""
    about = "train a reward model from thumbs up and down, which then votes instead of the judge's prompts"
    parser = commands.add_parser("train-judge", help=about, description=about)
    parser.add_argument(
        "out", type=Path, metavar="FOLDER", help="made if need be, never overwritten; for judge.reward_model"
    )
    parser.add_argument(
        "--model", default="clawrl:tiny", help="frozen base, with the policy's tokenizer (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="where it reads replies, such as cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU for it (default: %(default)s)")
    add_journal(parser)
    add_json(parser)
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    folder = new_folder(options.out)
    with journal_of(options) as journal:
        labels = list(_labels(journal))
    fitted, held_out = parts(labels)
    import torch  # torch and transformers load only when needed

    from clawrl.serving import reward_model

    torch.set_num_threads(max(1, options.threads))
    about, head = _fitted(options.model, reward_model.Features(options.model, options.device), fitted, held_out)
    reward_model.write(folder, about, head)
    if options.json:
        print(json.dumps(asdict(about), indent=2))
    else:
        Console().print(_table(about))
        print(f"the reward model is in {folder}; judge by it with judge.reward_model={folder}", file=sys.stderr)
    return 0


def _labels(journal: JournalReader) -> Iterator[Label]:
    """Those of replies whose tokens are kept."""
    after = 0
    while page := journal.scored_turns(after, PAGE):
        after = page[-1][0]
        for _, turn, score in page:
            if len(turn.capture.completion_ids):
                yield Label(turn.session, turn.capture.prompt_ids, turn.capture.completion_ids, score)


def parts(labels: Sequence[Label]) -> tuple[list[Label], list[Label]]:
    """(fitted to, held out), whole sessions each. Raises ClawrlError if there are too few, or too few sessions."""
    approved, refused = _counts(labels)
    if min(approved, refused) < FEWEST:
        raise ClawrlError(
            f"{approved} thumbs up and {refused} down of replies whose tokens are kept; {FEWEST} of either are needed, "
            "which people give by POST /v1/feedback (score)"
        )
    from clawrl.rollout.samples import is_held_out

    held_out = [label for label in labels if is_held_out(label.session, HELD_OUT_SHARE)]
    fitted = [label for label in labels if not is_held_out(label.session, HELD_OUT_SHARE)]
    if not held_out or min(_counts(fitted)) == 0:
        raise ClawrlError(
            f"the labels come from {len({label.session for label in labels})} sessions, of which a fifth is held out: "
            f"{len(held_out)} labels, which leaves {_counts(fitted)[0]} thumbs up and {_counts(fitted)[1]} down; "
            "gather some of more sessions (POST /v1/feedback)"
        )
    return fitted, held_out


def _counts(labels: Sequence[Label]) -> tuple[int, int]:
    approved = sum(label.score > 0 for label in labels)
    return approved, len(labels) - approved


def _fitted(model: str, features: Any, fitted: Sequence[Label], held_out: Sequence[Label]) -> tuple[About, Any]:
    """The head, and what is told of it."""
    from clawrl.algorithms import reward
    from clawrl.serving.reward_model import About

    seen = _read(features, [*fitted, *held_out])
    rows, scores = seen[: len(fitted)], np.array([label.score for label in fitted])
    say(f"fitting to {len(fitted)} labels")
    l2 = reward.choose_l2(rows, scores, np.array([_fold(label.session) for label in fitted]))
    head = reward.fit(rows, scores, l2)
    figures = _measured(head, seen[len(fitted) :], held_out, guess=1 if scores.sum() >= 0 else -1)
    made = datetime.now(UTC).isoformat(timespec="seconds")
    return About(lasting_name(model), features.size, *_counts(fitted), figures, reward.MARGIN, l2, made), head


def _fold(session: str) -> int:
    """Another number than whether it is held out."""
    return int.from_bytes(hashlib.sha256(f"fold of {session}".encode()).digest()[:8]) % FOLDS


def _read(features: Any, labels: Sequence[Label]) -> np.ndarray:
    """f32[n, H]; tells how far it is."""
    rows, told = [], time.monotonic()
    for label in labels:
        rows.append(features(label.prompt_ids, label.completion_ids))
        if time.monotonic() - told > TELL_EVERY_S:
            told = time.monotonic()
            say(f"read {len(rows)} of {len(labels)} replies")
    return np.stack(rows)


def _measured(head: Any, rows: np.ndarray, labels: Sequence[Label], guess: int) -> HeldOut:
    from clawrl.algorithms import reward
    from clawrl.serving.reward_model import HeldOut

    chances, scores = reward.probability(head, rows), np.array([label.score for label in labels])
    found = calibrate(
        [
            Verdict(reward.verdict(chance, reward.MARGIN), max(chance, 1 - chance), label.score)
            for chance, label in zip(chances.tolist(), labels, strict=True)
        ]
    )
    return HeldOut(
        approved=found.approved,
        refused=found.refused,
        coverage=found.coverage,
        accuracy=found.accuracy,
        accuracy_of_all=float((np.where(chances > 0.5, 1, -1) == scores).mean()),
        majority=float((scores == guess).mean()),
        ece=found.ece,
        auc=reward.auc(chances, scores),
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _table(about: About) -> Table:
    found = about.held_out
    table = Table(box=None, show_header=False)
    table.add_row("fitted to", f"{about.approved} thumbs up, {about.refused} down")
    add_figures(
        table,
        ("held out", found.approved, found.refused),
        ("coverage", found.coverage, "of those held out it takes a side"),
        ("accuracy", found.accuracy, "of these it takes the people's side"),
        ("accuracy of all", found.accuracy_of_all, "the same, if it never abstained"),
        ("majority", found.majority, "that of always guessing the more frequent label"),
        ("calibration error", found.ece, "mean gap between its probability and its accuracy"),
        ("AUC", found.auc, "how often an approved reply stands above a refused one"),
    )
    return table
