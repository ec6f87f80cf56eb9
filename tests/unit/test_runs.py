"""Which run a start goes on with, and that only one process has it."""

import json
import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from test_journal import sample

from clawrl.config import Config
from clawrl.errors import ConfigError
from clawrl.journal.store import JournalStore
from clawrl.main import System, check, open_run
from clawrl.types import Erasure, VersionEvent, WeightVersion
from jobs import free_port


def config(root: Path, **changed) -> Config:
    return Config.model_validate({"run_root": str(root), **changed})


def opened(root: Path, **changed) -> Path:
    """The folder of a run that was opened and left again."""
    folder, lock = open_run(config(root, **changed))
    lock.close()
    return folder


def write_versions(folder: Path, known: int, newest: int) -> None:
    """A run whose journal knows so many versions, and whose folder has one of the newest number."""
    with closing(JournalStore(f"sqlite:///{folder / 'journal.sqlite'}")) as journal:
        for number in range(1, known + 1):
            version = WeightVersion(number, number - 1, "full", None, (), {}, 0.0)
            journal.record_version(version, VersionEvent(number, "candidate", "", 0.0))
    (folder / "versions" / str(newest)).mkdir(parents=True)


def test_latest_makes_the_first_run_and_goes_on_with_the_newest(tmp_path):
    first = opened(tmp_path)
    assert opened(tmp_path) == first
    second = opened(tmp_path, run="new")
    assert second != first
    assert opened(tmp_path) == second == (tmp_path / "latest").resolve()


def test_a_named_run_becomes_the_latest(tmp_path):
    first, _ = opened(tmp_path, run="new"), opened(tmp_path, run="new")
    assert opened(tmp_path, run=first.name) == first == (tmp_path / "latest").resolve()


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"run='yesterday': .*yesterday does not exist; set run=new or run=latest"):
        open_run(config(tmp_path, run="yesterday"))


def test_a_run_has_one_process(tmp_path):
    _, lock = open_run(config(tmp_path))
    with pytest.raises(ConfigError, match="is in use by another clawrl; stop it or set run=new"):
        open_run(config(tmp_path))
    lock.close()
    open_run(config(tmp_path))[1].close()


def test_a_run_keeps_the_model_it_began_with(tmp_path):
    folder, lock = open_run(config(tmp_path))
    lock.close()
    (folder / "run.json").write_text(json.dumps({"model": "/another/model"}))
    with pytest.raises(ConfigError, match=r"began with policy\.model='/another/model'"):
        open_run(config(tmp_path))


def test_what_all_said_does_not_become_each_users_policy(tmp_path):
    opened(tmp_path, lora={"rank": 8, "policy_scope": "group"})
    opened(tmp_path, lora={"rank": 8, "policy_scope": "hierarchy"})
    with pytest.raises(ConfigError, match=r"began with lora\.policy_scope=group: .*set run=new"):
        open_run(config(tmp_path, lora={"rank": 8, "policy_scope": "user"}))
    opened(tmp_path, run="new", lora={"rank": 8, "policy_scope": "user"})
    opened(tmp_path, lora={"rank": 8, "policy_scope": "user"})


def test_a_run_keeps_the_form_of_its_adapters(tmp_path):
    opened(tmp_path, lora={"rank": 8})
    opened(tmp_path, lora={"rank": 8, "in_batch": 9})
    with pytest.raises(ConfigError, match=r"began with lora=\{'rank': 8, .*set run=new for \{'rank': 16"):
        open_run(config(tmp_path, lora={"rank": 16}))
    with pytest.raises(ConfigError, match="set run=new for none"):
        open_run(config(tmp_path))
    first = opened(tmp_path, run="new")
    (first / "run.json").write_text(json.dumps({"model": "clawrl:tiny"}))  # of a time when there were no adapters
    assert opened(tmp_path) == first


def test_layers_that_the_model_does_not_have(tmp_path):
    lora = {"targets": ["q_proj", "qkv"]}
    with pytest.raises(ConfigError, match=r"lora\.targets: model 'clawrl:tiny' has no layer 'qkv'; it has .*q_proj"):
        check(config(tmp_path, lora=lora, gateway={"port": free_port()}))


@pytest.mark.parametrize(("known", "newest"), [(0, 0), (3, 3), (3, 4), (3, 1)])
def test_a_run_goes_on_with_its_journal(tmp_path, known, newest):
    """A crash may have left one version more than was recorded."""
    write_versions(opened(tmp_path), known, newest)
    opened(tmp_path)


@pytest.mark.parametrize("first", [sample("trained"), Erasure("ann", None, 1, (), None, 1.0)])
def test_a_first_version_that_was_not_recorded_comes_from_a_journal_that_was_used(tmp_path, first):
    write_versions(opened(tmp_path), known=0, newest=1)
    with pytest.raises(ConfigError, match=r"has version 1 and journal\.url knows 0"):
        open_run(config(tmp_path))
    with closing(JournalStore(f"sqlite:///{tmp_path / 'latest' / 'journal.sqlite'}")) as journal:
        (journal.erase if isinstance(first, Erasure) else journal.append)(first)
    opened(tmp_path)


@pytest.mark.parametrize("run", ["latest", "new"])
def test_checkpoints_that_the_journal_does_not_know_are_not_numbered_anew(tmp_path, run):
    write_versions(opened(tmp_path / "runs"), known=3, newest=3)
    empty = {"journal": {"url": f"sqlite:///{tmp_path / 'empty.sqlite'}"}}
    if run == "new":
        opened(tmp_path / "runs", run=run, **empty)
        return
    with pytest.raises(ConfigError, match=r"has version 3 and journal\.url knows 0, .*`clawrl journal import`"):
        open_run(config(tmp_path / "runs", **empty))
    opened(tmp_path / "runs")  # as it was, and nobody holds it


def test_a_new_run_with_the_journal_of_another_leaves_everything_as_it_was(tmp_path):
    first = opened(tmp_path)
    write_versions(first, known=2, newest=2)
    with pytest.raises(ConfigError, match="holds 2 versions of another run"):
        open_run(config(tmp_path, run="new", journal={"url": f"sqlite:///{first / 'journal.sqlite'}"}))
    assert [path.name for path in tmp_path.iterdir() if path.name != "latest"] == [first.name]
    assert opened(tmp_path) == first


def test_a_database_that_cannot_be_used_is_told_first(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ConfigError, match=r"journal\.url"):
        check(config(tmp_path / "runs", gateway={"port": port}, journal={"url": "sqlite:////nowhere/at/all.sqlite"}))
    assert not (tmp_path / "runs").exists()


def test_a_first_run_that_is_refused_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"journal\.url"):
        open_run(config(tmp_path, journal={"url": "sqlite:////nowhere/at/all.sqlite"}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["newer", "no database"])
def test_a_journal_that_cannot_be_used_is_told_before_anything_starts(tmp_path, damage):
    journal = opened(tmp_path) / "journal.sqlite"
    if damage == "newer":
        with closing(sqlite3.connect(journal)) as connection, connection:
            connection.execute("UPDATE meta SET value = '99' WHERE name = 'schema'")
    else:
        journal.write_bytes(b"not a database at all, and long enough to be looked at" * 100)
    with pytest.raises(ConfigError, match="schema 99" if damage == "newer" else "name another file"):
        open_run(config(tmp_path))


def test_the_gateway_may_listen_on_ipv6(tmp_path):
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
        port = probe.getsockname()[1]
        probe.listen()
        changed = config(tmp_path, gateway={"host": "::1", "port": port})
        with pytest.raises(ConfigError, match=f"gateway.port={port} on ::1 cannot be bound"):
            check(changed)
    check(changed)
    assert System(changed, tmp_path, owns_ray=False).url == f"http://[::1]:{port}/v1"
