"""Runs of an evaluation over a Ray cluster: each a task that starts a program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

JOB = """
import os, pathlib, sys, time
name, port, root = sys.argv[1:]
folder = pathlib.Path(root.partition("=")[2])
(folder.parent / f"{name}-began").touch()
assert port.startswith("gateway.port="), port
assert not [each for each in os.environ if each.startswith("RAY_") and each != "RAY_USAGE_STATS_ENABLED"], os.environ
if name == "broken":
    sys.exit("out of luck")
until = time.monotonic() + 60
while not all((folder.parent / f"{each}-began").exists() for each in ("one", "two")):
    assert time.monotonic() < until, "the other did not begin while this one ran"
    time.sleep(0.05)
(folder / "latest").mkdir()
(folder / "latest" / "report.json").write_text(f'{{"port": {port.partition("=")[2]}}}')
"""
PROGRAM = """
import json, sys
from pathlib import Path
from jobs.eval.runs import Run, result_of, side_by_side
root = Path(sys.argv[1])
runs = [Run(root / name, "lonely_job", (name,), name) for name in ("broken", "one", "two")]
found = dict(side_by_side(runs, {"CPU": 1}))
kept = [result_of(run.folder) for run in runs]
print(json.dumps([found[number] for number in range(3)] + [kept], default=str))
"""


def test_runs_are_made_side_by_side_and_one_that_fails_loses_only_itself(tmp_path: Path):
    (tmp_path / "lonely_job.py").write_text(JOB)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr
    *outcomes, kept = json.loads(done.stdout.splitlines()[-1])
    broken, one, two = outcomes
    assert broken.endswith("exit code 1: out of luck")
    assert one["report"]["port"] != two["report"]["port"]
    assert kept == [None, one, two]
