"""Which run a start goes on with, and that only one process has it."""

import json
from pathlib import Path

import pytest

from clawrl import observe
from clawrl.config import Config
from clawrl.errors import ConfigError
from clawrl.main import open_run


def config(root: Path, **changed) -> Config:
    return Config.model_validate({"run_root": str(root), **changed})


def test_latest_makes_the_first_run_and_goes_on_with_the_newest(tmp_path):
    first = observe.open_run(tmp_path, "latest")
    assert observe.open_run(tmp_path, "latest") == first
    second = observe.open_run(tmp_path, "new")
    assert second != first
    assert observe.open_run(tmp_path, "latest") == second == (tmp_path / "latest").resolve()


def test_a_named_run_becomes_the_latest(tmp_path):
    first, _ = observe.open_run(tmp_path, "new"), observe.open_run(tmp_path, "new")
    assert observe.open_run(tmp_path, first.name) == first == (tmp_path / "latest").resolve()


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
