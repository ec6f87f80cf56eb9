"""What is particular to one database of the journal: SQLite's files, broken ones too, and PostgreSQL's outages."""

import resource
import signal
import sqlite3
import stat
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import event
from test_journal import assert_same, judgement, next_state, sample, turn, version

from clawrl.errors import JournalError
from clawrl.journal import database
from clawrl.journal.store import JournalReader, JournalStore
from clawrl.types import VersionEvent


def rows(path: Path, query: str) -> list[tuple]:
    """What another program sees."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


class TestSqlite:
    @pytest.fixture
    def path(self, tmp_path) -> Path:
        return tmp_path / "journal.sqlite"

    @pytest.fixture
    def store(self, path):
        with closing(JournalStore(f"sqlite:///{path}")) as opened:
            yield opened

    def test_the_sqlite3_command_reads_it(self, store, path):
        store.append(turn("t"), judgement("t"))
        assert rows(path, 'SELECT json_extract(reply, "$.role") FROM turns') == [("assistant",)]
        assert rows(path, "SELECT typeof(score), json_extract(votes, '$[0]') FROM judgements") == [("integer", 1)]

    def test_durability_settings(self, store, path):
        store.append(turn("t"))
        with store.database.writer.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_full_disk(self, store, path):
        store.append(turn("before"))
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = path.with_name("journal.sqlite-wal").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 8192, unlimited[1]))
        try:
            with pytest.raises(JournalError, match="disk"):
                store.append(turn("too much", reply={"role": "assistant", "content": "x" * 10**6}))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        store.append(turn("after"))
        assert [store.turn(id) is not None for id in ("before", "too much", "after")] == [True, False, True]
        assert rows(path, "PRAGMA integrity_check") == [("ok",)]

    @pytest.mark.parametrize(
        ("look_up", "plans"),
        [
            ("open_turn('ann', 'c')", ["SEARCH turns USING INDEX turns_conversation_user_kind_seq"]),
            ("last_turn('ann', 's')", ["SEARCH turns USING INDEX turns_user_session_kind_seq"]),
            ("continued('ann', ['c'], 's')", ["SEARCH turns USING INDEX turns_conversation_user_kind_seq"]),
            ("owners('s')", ["SEARCH turns USING COVERING INDEX turns_session_user"]),
            ("turn('t')", ["SEARCH turns USING INDEX turns_id"]),
            (
                "pairs_to_judge(0, 8)",
                [
                    "SEARCH unjudged USING INTEGER PRIMARY KEY",
                    "SEARCH next_states USING INTEGER PRIMARY KEY",
                    "SEARCH turns USING INDEX turns_id",
                ],
            ),
            (
                "samples_to_train(0, 8)",
                [
                    "SEARCH untrained USING INTEGER PRIMARY KEY",
                    "SEARCH samples USING INTEGER PRIMARY KEY",
                    "SEARCH consumptions USING COVERING INDEX sqlite_autoindex_consumptions_1",
                ],
            ),
        ],
    )
    def test_look_ups_stay_on_their_index(self, store, path, look_up, plans):
        statements = []
        event.listen(store.database.reader, "before_cursor_execute", lambda *args: statements.append(args[2:4]))
        eval(f"store.{look_up}")
        [(statement, parameters)] = statements
        with closing(sqlite3.connect(path)) as connection:
            found = [step[3] for step in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
        assert len(found) == len(plans)
        assert all(step.startswith(f"{plan} ") for step, plan in zip(found, plans, strict=True))

    def test_a_refused_database_stays_as_it_is(self, path):
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("CREATE TABLE meta (name TEXT, value TEXT)")
            connection.execute("INSERT INTO meta VALUES ('schema', '99')")
        before = path.read_bytes()
        with pytest.raises(JournalError, match="schema 99"):
            JournalStore(f"sqlite:///{path}")
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]

    def test_no_database_at_all(self, path):
        path.write_text("all work and no play " * 100)
        with pytest.raises(JournalError, match="not a database; name another file"):
            JournalStore(f"sqlite:///{path}")

    def test_missing_folder(self, tmp_path):
        with pytest.raises(JournalError, match=r"nowhere/journal.sqlite cannot be opened: .*make its folder first"):
            JournalStore(f"sqlite:///{tmp_path}/nowhere/journal.sqlite")
        assert not (tmp_path / "nowhere").exists()

    def test_read_only(self, store, path):
        store.append(turn("t"))
        store.close()
        with pytest.raises(JournalError, match="readonly database; give this user write access"):
            JournalStore(f"sqlite:///file:{path}?mode=ro&uri=true")

    def test_unwritable_folder(self):
        with pytest.raises(JournalError, match="cannot be opened"):
            JournalStore("sqlite:////proc/journal.sqlite")

    @pytest.mark.parametrize("damage", ["truncated", "overwritten"])
    def test_a_torn_log_loses_only_what_was_not_acknowledged(self, store, path, damage):
        log = path.with_name("journal.sqlite-wal")
        for number in range(5):
            store.append(turn(str(number)))
        acknowledged = log.stat().st_size
        store.append(turn("in flight"))
        whole = log.read_bytes()
        files = {path: path.read_bytes(), log: whole[: acknowledged + 2000]}
        if damage == "overwritten":  # the pages were allocated, and hold something else
            files[log] += bytes(len(whole) - acknowledged - 2000)
        store.close()
        for file, content in files.items():
            file.write_bytes(content)
        path.with_name("journal.sqlite-shm").unlink(missing_ok=True)
        with closing(JournalStore(f"sqlite:///{path}")) as again:
            assert [again.turn(id) is not None for id in [*"01234", "in flight"]] == [True] * 5 + [False]
            again.append(turn("in flight"))
            assert again.database.problems() == []

    def test_a_corrupt_file_is_refused(self, store, path):
        for number in range(50):
            store.append(turn(str(number)))
        store.close()
        content = bytearray(path.read_bytes())
        content[4096 * 1 + 8 : 4096 * 12] = b"\xff" * (4096 * 11 - 8)
        content[108:3000] = b"\xff" * 2892
        path.write_bytes(content)
        for opener in (JournalStore, JournalReader):
            with pytest.raises(JournalError, match="malformed; restore it from a backup"):
                opener(f"sqlite:///{path}")
        assert path.read_bytes() == content

    def test_the_space_of_deleted_turns_is_given_back(self, store, path):
        for number in range(100):
            store.append(turn(str(number), ended=0.0, reply={"content": "x" * 5000}))
        assert store.expire(1.0, 0, 1000) == 100
        free = rows(path, "PRAGMA freelist_count")[0][0]
        store.shrink()
        assert free > 100
        assert rows(path, "PRAGMA freelist_count")[0][0] < free / 2


class TestPostgres:
    @pytest.fixture
    def store(self, postgres):
        with closing(JournalStore(postgres.fresh())) as opened:
            yield opened

    def test_durability_settings(self, store):
        with store.database.writer.connect() as connection:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"

    def test_appends_and_reads_wait_for_a_restart(self, store, postgres):
        store.append(turn("before"))
        for number in (signal.SIGINT, signal.SIGQUIT):
            postgres.stop(number)
            restarting = threading.Timer(0.5, postgres.start)
            restarting.start()
            try:
                if number == signal.SIGINT:
                    store.append(turn("after"), VersionEvent(1, "candidate", "trained", 1.0))
                assert_same(store.turn("after"), turn("after"))
            finally:
                restarting.join()
        assert (store.counts()["turns"], len(store.version_events())) == (2, 1)

    def test_a_commit_whose_answer_was_lost_is_not_made_twice(self, store):
        """The server commits, and the connection breaks before it says so."""
        broken = []

        def break_once(connection) -> None:
            if not broken:
                broken.append(True)
                raw = connection.connection.driver_connection
                raw.commit()
                raw.close()

        event.listen(store.database.writer, "commit", break_once)
        store.append(VersionEvent(1, "candidate", "trained", 1.0))
        assert broken
        assert len(store.version_events()) == 1

    def test_a_transaction_that_broke_before_its_commit_is_made_again(self, store):
        broken = []

        def break_once(connection) -> None:
            if not broken:
                broken.append(True)
                connection.connection.driver_connection.close()

        event.listen(store.database.writer, "commit", break_once)
        store.append(VersionEvent(1, "candidate", "trained", 1.0))
        assert broken
        assert len(store.version_events()) == 1

    def test_a_long_outage_is_an_error_for_all_at_once(self, store, postgres, monkeypatch):
        monkeypatch.setattr(database, "OUTAGE_S", 0.3)
        postgres.stop()
        try:
            started = time.monotonic()
            outcomes = store.commit([store.appending(turn(str(number))) for number in range(20)])
            assert time.monotonic() - started < 5
            assert all(isinstance(outcome, JournalError) for outcome in outcomes)
            with pytest.raises(JournalError, match="cannot be read"):
                store.turn("1")
        finally:
            postgres.start()
        assert store.turn("1") is None
        store.append(turn("1"), next_state("1"), judgement("1"), sample("1"), version(0))

    @pytest.mark.parametrize(
        ("url", "remedy"),
        [
            ("postgresql://clawrl:secret@127.0.0.1:9/journal", "start PostgreSQL, or correct host and port"),
            ("{server}&dbname=nowhere", "create it first"),
            ("{server}&options=-cdefault_transaction_read_only%3Don", "connect to the primary server"),
        ],
    )
    def test_refusals_name_the_remedy(self, postgres, url, remedy):
        with pytest.raises(JournalError, match=remedy) as caught:
            JournalStore(url.format(server=postgres.fresh().split("&")[0]))
        assert "secret" not in str(caught.value)

    def test_errors_repeat_no_words_of_users(self, store):
        twice = "INSERT INTO meta VALUES ('secret', 'a'), ('secret', 'b')"
        with pytest.raises(JournalError) as caught:
            store.write(lambda connection: connection.exec_driver_sql(twice))
        assert "secret" not in str(caught.value)
