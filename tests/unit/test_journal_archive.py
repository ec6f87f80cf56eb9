"""A journal carried from one database to another, looked at and checked, by the command that users type."""

import json
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sqlalchemy import text
from test_journal import assert_same, judgement, next_state, sample, turn, version

from clawrl import cli
from clawrl.errors import JournalError
from clawrl.journal import archive
from clawrl.journal.store import JournalReader, JournalStore
from clawrl.journal.tables import SCHEMA
from clawrl.types import Erasure, Feedback, Pin, Swap, VersionEvent

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(url, tmp_path):
    """A journal with something of everything, and nothing wrong with it."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    with closing(JournalStore(url)) as opened:
        for id in ("trained", "waits", "unjudged"):
            opened.append(turn(id), next_state(id))
        opened.append(turn("hers", user="eve", kind="side"), Feedback("f", "waits", "ann", None, "shorter", 1.0))
        for id in ("trained", "waits"):
            opened.append(judgement(id), sample(id, advantages=np.ones(3, np.float32)))
        opened.append(version(0), Swap(1, "r", 2.0, None, float("nan"), 3.0), Swap(1, "r", 2.0, None, None, 4.0))
        trained = replace(version(1, "trained", loss=float("nan")), checkpoint=str(checkpoint))
        opened.record_version(trained, VersionEvent(1, "serving", "first", 1.0))
        yield opened


def command(capsys, *arguments: object) -> tuple[int, str]:
    """Exit code and what was printed; errors too."""
    code = cli.main(["journal", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, re.sub(r"\s+", " ", printed.out + printed.err)


def contents(journal: JournalReader) -> dict[str, list[str]]:
    """All rows of all tables, in their order; seq may differ."""
    with journal.database.snapshot() as connection:
        found = {}
        for table in archive.TABLES:
            names = ", ".join(f'"{column.name}"' for column in table.columns if column.name != "seq")
            order = {"consumptions": "sample", "withdrawn": "turn"}.get(table.name, "seq")
            rows = connection.execute(text(f"SELECT {names} FROM {table.name} ORDER BY {order}"))
            found[table.name] = [repr(tuple(row)) for row in rows]
        return found


@pytest.mark.parametrize("target", ["sqlite", "postgresql"])
def test_a_journal_moves_to_another_database_and_lives_on(store, url, target, tmp_path, request, capsys):
    new = f"sqlite:///{tmp_path}/new.sqlite" if target == "sqlite" else request.getfixturevalue("postgres").fresh()
    assert command(capsys, "export", "--journal", url, tmp_path / "out")[0] == 0  # while its writer runs
    code, told = command(capsys, "import", "--journal", new, tmp_path / "out")
    assert code == 0
    assert "turns 4 " in told
    code, told = command(capsys, "import", "--journal", new, tmp_path / "out")
    assert code == 0
    assert set(re.findall(r"[a-z_]+ (\d+)", told)) == {"0"}
    with closing(JournalStore(new)) as moved:
        assert_same(moved.turn("trained"), turn("trained"))
        assert moved.counts() == store.counts()
        assert [found.id for _, found, _ in moved.pairs_to_judge(0, 10)] == ["unjudged"]
        assert [found.id for _, found, _ in moved.samples_to_train(0, 10)] == ["waits"]
        assert_same(tuple(moved.swaps()), tuple(store.swaps()))
        if url.split(":")[0] == new.split(":")[0]:
            assert contents(moved) == contents(store)
        assert archive.check(moved) == []
        moved.append(turn("next"), next_state("next"))
        assert moved.pairs_to_judge(0, 10)[-1][1].id == "next"


def test_an_import_adds_to_what_is_there(store, url, new_database, tmp_path):
    archive.export(store, tmp_path / "out")
    with closing(JournalStore(new_database())) as other:
        other.append(turn("own"), turn("waits", user="already here"))
        assert archive.restore(other, tmp_path / "out")["turns"] == 3
        users = [row.split(", ")[1] for row in contents(other)["turns"]]
        assert users == ["'ann'", "'already here'", "'ann'", "'ann'", "'eve'"]


def test_another_runs_versions_do_not_mix(store, new_database, tmp_path):
    archive.export(store, tmp_path / "out")
    with closing(JournalStore(new_database())) as other:
        other.record_version(version(1, "elsewhere"), None)
        with pytest.raises(JournalError, match="another run's version 1; import into an empty one"):
            archive.restore(other, tmp_path / "out")
        assert other.counts()["turns"] == 0


def test_useless_folders(store, tmp_path):
    full = tmp_path / "out"
    archive.export(store, full)
    with pytest.raises(JournalError, match="is not empty; name a new folder"):
        archive.export(store, full)
    (full / "samples.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(JournalError, match=r"samples\.parquet is no export"):
        archive.restore(store, full)
    pq.write_table(pq.read_table(full / "turns.parquet").replace_schema_metadata({}), full / "samples.parquet")
    with pytest.raises(JournalError, match=f"exported with schema none and this clawrl knows {SCHEMA}"):
        archive.restore(store, full)
    (full / "samples.parquet").unlink()
    with pytest.raises(JournalError, match=r"samples\.parquet is missing"):
        archive.restore(store, full)


def test_the_documented_columns_are_the_files_columns(store, tmp_path):
    archive.export(store, tmp_path / "out")
    documented = (ROOT / "docs" / "journal.md").read_text()
    for table in archive.TABLES:
        columns = ", ".join(
            f"`{field.name}` {field.type}{'?' * field.nullable}"
            for field in pq.read_schema(tmp_path / "out" / f"{table.name}.parquet")
        )
        assert f"- **{table.name}**: {columns}\n" in documented


def test_stats(store, url, capsys):
    code, told = command(capsys, "stats", "--journal", url, "--json")
    found = json.loads(told)
    assert (code, found["turns"], found["users"], found["unjudged"], found["untrained"]) == (0, 4, 2, 1, 1)
    assert found["bytes"] > 10_000
    assert found["oldest"] == turn("t").ended
    assert "oldest 2001-09-09 01:46:40 UTC" in command(capsys, "stats", "--journal", url)[1]


def test_check_of_a_sound_journal(store, url, capsys):
    code, told = command(capsys, "check", "--journal", url)
    assert code == 0
    assert "no problems" in told


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("DELETE FROM turns WHERE id = 'waits'", "1 judgements of turns that are not there"),
        ("DELETE FROM consumptions", "sample trained, which is not marked as consumed"),
        ("DELETE FROM versions WHERE number = 1", "samples were consumed by version 1, which is not there"),
        ("""UPDATE versions SET samples = '["trained"]'""", "trained on twice, by versions 0 and 1"),
        ("UPDATE versions SET checkpoint = '/nowhere' WHERE number = 1", "version 1 has no checkpoint at /nowhere"),
        ("UPDATE consumptions SET version = 0", "marked as consumed by version 0, which did not learn from it"),
        ("DELETE FROM untrained", "1 wrong entries in the list `untrained`"),
        ("UPDATE turns SET messages = '[' WHERE id = 'waits'", "turns seq=2 cannot be read: JSONDecodeError"),
    ],
)
def test_check_finds(store, url, damage, problem, capsys):
    with store.database.writer.begin() as connection:
        connection.exec_driver_sql(damage)
    code, told = command(capsys, "check", "--journal", url)
    assert code == 1
    assert problem in told


def test_only_an_erasure_gives_samples_back(store):
    store.append(sample("erased", user="eve"), sample("other"), turn("erased", user="eve"), turn("other"))
    store.record_version(version(2, "erased", "other"), None)
    rejected = VersionEvent(2, "rejected", "learnt from what was erased", 9.0)
    with store.database.snapshot() as connection:
        assert archive.uses(connection) == archive.Uses({}, {}, {})
    store.erase(Erasure("eve", None, 1, (2,), 1, 9.0), [rejected])
    store.record_version(version(3, "other"), None)
    assert archive.check(store) == []
    with store.database.writer.begin() as connection:
        connection.exec_driver_sql("UPDATE version_events SET at = 8 WHERE state = 'rejected'")
        assert archive.uses(connection).twice == {"other": (2, 3)}


def test_a_pinned_version_needs_its_checkpoint(store):
    store.append(replace(version(2), checkpoint="/gone"))
    assert archive.check(store) == []  # deleted in time
    store.append(Pin(2, True, 1.0))
    assert archive.check(store) == [
        "version 2 has no checkpoint at /gone; restore the folder from a backup, or roll back"
    ]


def test_a_program_that_goes_on_during_the_check_is_not_damage(store, url, tmp_path, monkeypatch):
    """It serves the next version, and deletes the checkpoint of the one that served when the check began."""
    later = tmp_path / "later"
    later.mkdir()
    read_all = archive._unreadable

    def meanwhile(connection):
        yield from read_all(connection)
        monkeypatch.undo()
        store.record_version(replace(version(2), checkpoint=str(later)), VersionEvent(2, "serving", "canary", 5.0))
        (tmp_path / "checkpoint").rmdir()

    monkeypatch.setattr(archive, "_unreadable", meanwhile)
    with closing(JournalReader(url)) as reader:
        assert archive.check(reader) == []
        later.rmdir()
        assert archive.check(reader)[0].startswith(f"version 2 has no checkpoint at {later}")


def test_a_damaged_file(tmp_path, capsys):
    path = tmp_path / "journal.sqlite"
    with closing(JournalStore(f"sqlite:///{path}")) as store:
        for number in range(200):
            store.append(turn(str(number)))
    content = bytearray(path.read_bytes())
    content[-40 * 4096 :] = bytes(40 * 4096)
    path.write_bytes(content)
    code, told = command(capsys, "check", "--run", tmp_path)
    assert code == 1
    assert "malformed; restore it from a backup" in told


def test_no_journal_there(tmp_path, capsys):
    for verb in (["stats"], ["check"], ["export", tmp_path / "out"]):
        code, told = command(capsys, *verb, "--run", tmp_path)
        assert code == 1
        assert "there is no journal" in told
    assert list(tmp_path.iterdir()) == []
