"""The notebooks, executed from the first cell to the last as a reader would, without a screen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
CELL_S = 300


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the notebooks keep and look for runs; what Jupyter writes goes to a folder beside it."""
    folder = tmp_path_factory.mktemp("notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLAWRL_RUNS", str(folder / "runs"))
        for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(folder / "jupyter"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH", "")]))
        yield folder / "runs"


@pytest.fixture(scope="module")
def first_look(runs: Path) -> list[str]:
    return executed("first_look", runs)


def executed(name: str, runs: Path) -> list[str]:
    """The outputs of each code cell as one text; the executed notebook is left beside the runs."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    try:
        NotebookClient(notebook, timeout=CELL_S, kernel_name="python3", resources=resources).execute()
    finally:
        nbformat.write(notebook, runs.parent / f"{name}.ipynb")
    return ["".join(map(_text, cell.outputs)) for cell in notebook.cells if cell.cell_type == "code"]


def _text(output: Any) -> str:
    if output.output_type == "stream":
        return output.text
    shown = output.get("data", {})
    return next(
        (shown[kind] for kind in ("text/html", "text/markdown", "image/png", "text/plain") if kind in shown), ""
    )


def test_a_first_look_shows_a_reply_that_changes(first_look: list[str]):
    start, reply, capture, judged, advantages, _talks, versions, again, share, _stop = first_look
    assert "serving http://127.0.0.1" in start
    assert "**" in reply, "the built-in model's first reply has markup"
    assert "versions (VersionSpan(version=0" in capture
    assert "score -1" in judged
    assert "rgba(46,125,79" in advantages
    assert "rgba(179,38,30" in advantages
    assert "version 3: 16 turns" in versions
    assert "version 3 serves after a pause" in versions
    after = again.partition("after: ")[2]
    assert "**" not in after
    assert "21" in after
    assert float(share.split()[2]) > 0.4, share


def test_the_evidence_is_read_from_findings_and_from_a_run(first_look: list[str], runs: Path):
    opened, compared, pairs, _curves, versions, learnt = executed("evidence", runs)
    assert "docs/results" in opened
    assert compared.count("iVBOR") >= 1, "a picture of the gains"
    assert "difference, paired by seed" in pairs
    assert "| 1 | 0 | 16 |" in versions
    assert "learnt from {'local': 16}" in learnt
    assert "day-" in learnt
