"""Forgetting: which versions an erasure rejects, and `clawrl forget` on a stopped run's own files."""

import json
from contextlib import closing
from pathlib import Path

import pytest
from echo_door import Local
from test_journal import next_state, sample, turn

from clawrl import cli
from clawrl.config import VersionsSection
from clawrl.errors import ClawrlError
from clawrl.journal import database
from clawrl.journal.actor import Journal
from clawrl.journal.erasure import Content
from clawrl.journal.store import JournalReader, JournalStore
from clawrl.training.forgetting import owner, plan
from clawrl.training.versions import Registry
from clawrl.training.weights import WeightStore
from clawrl.types import Pin, VersionEvent, WeightVersion

LINE = [WeightVersion(n, n - 1, "full", f"/gone/{n}", (), {}, float(n)) for n in range(1, 7)]
WORDS = rb"Gr\u00fc\u00dfe"  # as JSON has them
SERVED = [
    *(VersionEvent(n, "serving", "canary", 1.0) for n in range(1, 7)),
    *(VersionEvent(n, "retired", "overtaken", 1.0) for n in range(6)),
]


def planned(*learnt: int, on_disk: range | tuple[int, ...] = range(1, 7), retrain=True, pinned=(), events=()):
    content = Content(turns=5, samples=4, versions=learnt, pinned=pinned)
    events = [*SERVED, *events]
    found = plan("ann", None, content, LINE, events, retrain=retrain, on_disk=on_disk, at=9.0)
    registry = Registry(LINE, [*events, *found.events])
    return found, registry


def test_training_goes_on_before_the_first_that_learnt_from_it():
    found, registry = planned(3, 5)
    assert (registry.head(), registry.serving(), found.erasure.restored) == (2, 2, 2)
    assert [event.version for event in found.events if event.state == "rejected"] == [3, 4, 5, 6]
    assert found.checkpoints == (3, 4, 5, 6)
    assert found.erasure.versions == (3, 5)


def test_without_a_checkpoint_it_goes_further_back():
    found, registry = planned(5, on_disk=(2, 5, 6))
    assert (registry.head(), registry.desired(), found.checkpoints) == (2, 2, (5, 6))
    _, registry = planned(5, on_disk=(5, 6))
    assert (registry.head(), registry.desired()) == (0, 0), "the model as configured is always there"


def test_without_retraining_nothing_is_rejected():
    found, registry = planned(3, retrain=False)
    assert (registry.head(), found.erasure.restored, found.events, found.checkpoints) == (6, None, (), ())
    assert found.erasure.versions == (3,)


@pytest.mark.parametrize("session", [None, "one"])
def test_a_users_own_policy_goes_with_all_that_they_said(session):
    """2 is Ann's, from everyone's 1; 3 is Ben's. Who erases one session keeps theirs, unless they retrain."""
    line = [WeightVersion(n, 1, "lora", None, (), {}, 1.0, scope) for n, scope in ((2, "ann"), (3, "ben"))]
    content = Content(turns=5, samples=4, versions=(2,), pinned=())
    found = plan("ann", session, content, [LINE[0], *line], [], retrain=False, on_disk=(1, 2, 3), at=9.0)
    gone = [event.version for event in found.events if event.state == "rejected"]
    assert (gone, found.checkpoints) == (([2], (2,)) if session is None else ([], ()))
    assert found.erasure.restored is None, "everyone's is as it was"


def test_where_nothing_was_learnt_nothing_is_rejected():
    found, registry = planned(on_disk=())
    assert (registry.head(), found.erasure.restored, found.checkpoints) == (6, None, ())


def test_versions_rejected_before_go_too_but_restore_nothing():
    found, registry = planned(5, events=[VersionEvent(n, "rejected", "gate", 2.0) for n in (5, 6)])
    assert (registry.head(), found.erasure.restored, found.checkpoints) == (4, None, (5, 6))


def test_pinned_ones_are_told_and_unpinned():
    found, _ = planned(5, pinned=(1, 5))
    assert found.pinned == (5,)
    assert found.records()[-1] == Pin(5, False, 9.0)
    assert found.told(done=False)["pinned"] == [5]


def test_whose_content_is_meant():
    assert owner("ann", "s", []) == "ann"
    assert owner(None, "s", ["bob"]) == "bob"
    for user, session, owners, told in (
        (None, None, [], "neither user nor session was given"),
        (None, "s", [], "recorded of nobody"),
        (None, "s", ["ann", "bob"], "of 2 users; name one too"),
        (7, None, [], "user=7 is not text"),
    ):
        with pytest.raises(ClawrlError, match=told):
            owner(user, session, owners)


@pytest.fixture
def run(tmp_path) -> Path:
    """A stopped run of two versions: the second learnt from Ann's turn in session s, and from Bob's."""
    with closing(JournalStore(f"sqlite:///{tmp_path}/journal.sqlite")) as store:
        store.append(turn("a"), next_state("a"), sample("a"), sample("b", user="bob"), sample("c", user="bob"))
        for number, learnt in ((1, "c"), (2, "ab")):
            folder = tmp_path / "versions" / str(number)
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(b"weights")
            version = WeightVersion(number, number - 1, "full", f"/elsewhere/{number}", tuple(learnt), {}, 1.0)
            store.record_version(version, VersionEvent(number, "serving", "canary", 1.0))
        store.append(VersionEvent(0, "retired", "overtaken", 1.0), VersionEvent(1, "retired", "overtaken", 1.0))
    return tmp_path


def forget(run: Path, capsys, *options: str) -> dict:
    assert cli.main(["forget", "--run", str(run), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_stopped_run_forgets(run, capsys):
    told = forget(run, capsys, "--session", "s", "--retrain", "--yes")
    assert {key: told[key] for key in ("user", "turns", "versions", "restored", "rejected", "checkpoints", "done")} == {
        "user": "ann", "turns": 1, "versions": [2], "restored": 1, "rejected": [2], "checkpoints": [2], "done": True,
    }  # fmt: skip
    assert [path.name for path in (run / "versions").iterdir()] == ["1"]
    with closing(JournalStore(f"sqlite:///{run}/journal.sqlite")) as store:
        assert store.turn("a") is None
        assert [sample.id for _, sample, _ in store.samples_to_train(0, 9)] == ["b"]
        assert Registry(store.versions(), store.version_events()).head() == 1
        assert [found.restored for found in store.erasures()] == [1]
    assert WORDS not in (run / "journal.sqlite").read_bytes()


def test_without_yes_it_only_tells(run, capsys):
    assert not forget(run, capsys, "--user", "ann", "--retrain")["done"]
    with closing(JournalStore(f"sqlite:///{run}/journal.sqlite")) as store:
        assert store.turn("a") is not None
        assert store.erasures() == []
    assert (run / "versions" / "2").is_dir()
    assert cli.main(["forget", "--run", str(run), "--user", "ann", "--retrain"]) == 0
    told = capsys.readouterr().out
    assert "would erase 1 turns and 1 samples of user 'ann'" in told
    assert "would reject: 2; training goes on from 1" in told
    assert "nothing was changed; add --yes" in told


def test_by_its_journal_alone(run, capsys):
    arguments = ["forget", "--journal", f"sqlite:///{run}/journal.sqlite", "--user", "ann", "--retrain", "--yes"]
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["restored"] == 0, "its checkpoints are not where the journal says"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--user", "ann"], "no clawrl answers at http://127.0.0.1:9"),
        (["--user", "ann", "--run", "/nowhere"], "there is no journal /nowhere/journal.sqlite"),
    ],
)
def test_a_useless_place_is_told(options, told, capsys):
    assert cli.main(["forget", "--url", "http://127.0.0.1:9", *options]) == 1
    assert told in capsys.readouterr().err.replace("\n", " ")


def test_a_run_in_use_is_left_alone(run, capsys, monkeypatch):
    monkeypatch.setattr(database, "_LOCK_WAIT_S", 0.1)
    with closing(JournalStore(f"sqlite:///{run}/journal.sqlite")):
        assert cli.main(["forget", "--run", str(run), "--user", "ann", "--yes"]) == 1
    assert "another process writes to this journal" in capsys.readouterr().err.replace("\n", " ")


def test_a_scrub_that_fails_loses_nothing_and_can_be_repeated(run, capsys, monkeypatch):
    monkeypatch.setattr(database, "_LOCK_WAIT_S", 0.1)
    url = f"sqlite:///{run}/journal.sqlite"
    with closing(JournalReader(url)) as reader, reader.database.snapshot() as looking:
        looking.exec_driver_sql("SELECT 1 FROM turns").all()  # holds the write-ahead log
        assert cli.main(["forget", "--run", str(run), "--user", "ann", "--retrain", "--yes"]) == 0
        shown = capsys.readouterr().out
        assert WORDS in (run / "journal.sqlite").read_bytes()
    assert "erased 1 turns" in shown
    assert "erased; free pages not overwritten yet: a reader holds the write-ahead log" in shown
    assert shown.rstrip().endswith("; run again")
    assert [path.name for path in (run / "versions").iterdir()] == ["1"]
    assert forget(run, capsys, "--user", "ann", "--yes")["unwiped"] is None
    assert not any(WORDS in path.read_bytes() for path in run.glob("journal.sqlite*"))


async def test_a_running_store_and_its_journal_agree_when_a_scrub_fails(run, monkeypatch):
    monkeypatch.setattr(database, "_LOCK_WAIT_S", 0.1)
    url = f"sqlite:///{run}/journal.sqlite"
    journal = Journal(url)
    weights = WeightStore(VersionsSection(), Local(journal), str(run), "clawrl:tiny")
    monkeypatch.setattr(weights, "_reject_damaged", _nothing)  # these checkpoints are too small to be whole
    try:
        with closing(JournalReader(url)) as reader, reader.database.snapshot() as looking:
            looking.exec_driver_sql("SELECT 1 FROM turns").all()
            told = await weights.forget(user="ann", retrain=True, yes=True)
        assert "a reader holds the write-ahead log" in told["unwiped"]
        assert (told["restored"], (await weights.latest()).number) == (1, 1)
        assert [path.name for path in (run / "versions").iterdir()] == ["1"]
        assert Registry(await journal.versions(), await journal.version_events()).head() == 1
        assert (await weights.forget(user="ann", yes=True))["unwiped"] is None
    finally:
        await journal.close()


async def _nothing(_: Registry) -> None: ...


def test_what_expired_is_told(run, capsys):
    assert forget(run, capsys, "--user", "ann")["unknown"] == 0
    with closing(JournalStore(f"sqlite:///{run}/journal.sqlite")) as store:
        store.append(turn("b", user="bob", ended=1.0))
        store.expire(2.0, 0, 10)
    assert forget(run, capsys, "--user", "ann")["unknown"] == 1
    assert cli.main(["forget", "--run", str(run), "--user", "ann"]) == 0
    assert "1 samples that versions learnt from are older than journal.keep_days" in capsys.readouterr().out
