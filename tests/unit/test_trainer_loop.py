"""When the trainer goes on and when it gives up, and what it asks for; without Ray."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError

from clawrl.config import GateSection, LearningSection, TrainerSection, VersionsSection
from clawrl.errors import ClawrlError, JournalError
from clawrl.training import rank, trainer
from clawrl.training.trainer import TrainLoop, reason, run_trainer
from clawrl.training.weights import Head
from clawrl.types import Batch

TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1, in y\n    write()\nOSError: no disk\nbuy one'


class Asked:
    """A handle: each call takes the next of `answers[name]`, the last one again and again; exceptions are raised."""

    def __init__(self, **answers: list[Any]) -> None:
        self._answers, self.asked, self.told = answers, [], []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.asked.append(name)
            self.told += arguments
            answers = self._answers[name]
            return answers.pop(0) if len(answers) > 1 else answers[0]

        return SimpleNamespace(remote=call)


def get(answer: Any) -> Any:
    if isinstance(answer, list):
        return [get(each) for each in answer]
    if isinstance(answer, Exception):
        raise answer
    return answer


@pytest.fixture
def fits(monkeypatch) -> list[Exception | None]:
    """What ends the controllers, one after the other; None: the buffer's end."""
    ends: list[Exception | None] = []
    monkeypatch.setattr(trainer.ray, "get", get)
    monkeypatch.setattr(trainer.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(trainer, "_fit", lambda *_: get(ends.pop(0)))
    return ends


def loop(store: Asked, journal: Any = None, **gate: Any) -> TrainLoop:
    settings = TrainerSection(max_failures=1)
    return TrainLoop(
        settings, LearningSection(), VersionsSection(), "model", None, store, journal, GateSection.model_validate(gate)
    )


def test_a_store_that_cannot_answer_now_does_not_end_training(fits):
    away = JournalError("away")
    store = Asked(latest=[away, away, Head(0, 1), away, away, away, Head(0, 1)], trainer_failed=[None])
    fits += [RuntimeError("a rank"), None]
    run_trainer(loop(store), "folder")
    assert fits == []


def test_failures_without_a_version_end_training(fits):
    fits += [RuntimeError("first"), OSError("second"), None]
    store = Asked(latest=[Head(0, 1)], trainer_failed=[None])
    with pytest.raises(ClawrlError, match="failed, 2 in a row without a version: OSError: second"):
        run_trainer(loop(store), "folder")
    assert store.told[0] == "1 in a row without a version: RuntimeError: first"
    assert len(store.told) == 2, "who asks how it is hears of the last one too"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (WorkerGroupError("…", {1: OSError(TRACEBACK), 0: OSError(TRACEBACK)}), "OSError: no disk"),
        (WorkerGroupError("…", {0: OSError("closed"), 1: OSError(TRACEBACK)}), "closed; OSError: no disk"),
        (ControllerError(RuntimeError("no room\nmore")), "RuntimeError: no room"),
        (RuntimeError(), "RuntimeError: RuntimeError"),
        (RuntimeError("x" * 1000), "RuntimeError: " + "x" * 386),
    ],
)
def test_a_failure_is_told_on_a_line(error, said):
    assert reason(error) == said


def test_failures_with_versions_between_them_do_not(fits):
    fits += [RuntimeError("a rank")] * 4 + [None]
    heads = [Head(number, number + 1) for number in range(6)]
    run_trainer(loop(Asked(latest=heads, trainer_failed=[None])), "folder")
    assert fits == []


def test_a_store_that_is_gone_for_good_does(fits):
    fits.append(RuntimeError("a rank"))
    with pytest.raises(ActorDiedError):
        run_trainer(loop(Asked(latest=[Head(0, 1), ActorDiedError()])), "folder")


@pytest.mark.parametrize(("gate", "asks"), [({}, True), ({"held_out_share": 0}, False), ({"enabled": False}, False)])
def test_held_out_turns_are_asked_for_where_some_are_held_out(fits, gate, asks):
    journal = Asked(held_out=[[("sample", 1)]])
    worker: Any = rank._Rank.__new__(rank._Rank)
    worker._loop, worker._told = loop(Asked(), journal, **gate), {}
    worker._store = Asked(heads=[{"": 0}], latest=[Head(0, 1)])
    worker._buffer = Asked(take=[Batch(1, ())], release=[None], advance=[None])
    order = worker._decide()
    assert (order.kind, list(order.held_out)) == ("train", [("sample", 1)] if asks else [])
    assert journal.asked == ["held_out"] * asks
