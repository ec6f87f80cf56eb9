"""The verdict on a patch, in a fresh sandbox: base tree, the patch without what does not count, the tests, a report.

    patch ─► git apply --index ─► tests and configuration put back ─► [test.patch] ─► eval.sh ─► log
    log ─► swebench's parser and get_eval_report ─► FULL 1, PARTIAL 2 · (share of FAIL_TO_PASS) − 1, NO −1

Knows swebench's harness (its own code reads the log) and one sandbox that nobody else has touched. Ignores agents.

The code under test runs in the process of its tests, so a patch that lies to the test runner from within the sources
cannot be told from one that is right; only the runner's files and the exit status are safe from it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from clawrl.errors import EnvError
from envs.sandbox import ExecResult, Sandbox
from envs.swe.patches import not_counting
from envs.swe.task import REPO, SweTask, files_of

MAX_PATCH = 4 << 20
MAX_LOG = 16 << 20
GIT_S = 120.0

Status = Literal["resolved", "partial", "unresolved", "no_patch", "bad_patch", "no_report", "timeout"]
"""Of a run of the tests: swebench's three; nothing submitted, or nothing that git takes; no results, or not in time."""

APPLY = f"""
cd {REPO} && git config core.fileMode false && git update-index -q --refresh
git apply --index --whitespace=nowarn /tmp/patch.diff >/dev/null || exit 3
git diff --cached --name-only --no-renames -z HEAD
"""
RESTORE = f"""
cd {REPO}
git --literal-pathspecs restore --source=HEAD --staged --worktree --pathspec-from-file=- --pathspec-file-nul
"""
TESTS = f"cd {REPO} && git reset -q && git apply --whitespace=nowarn /tmp/test.diff"
"""For an eval.sh that does not bring the tests' patch with it."""


@dataclass(frozen=True, slots=True)
class Report:
    """How a patch fared; counts are of tests.

    not_counted   changed files that were put back before the tests ran
    log           the end of what the tests said, for people
    """

    status: Status
    fail_to_pass: tuple[int, int] = (0, 0)  # passed, of
    pass_to_pass: tuple[int, int] = (0, 0)
    not_counted: tuple[str, ...] = ()
    log: str = ""

    @property
    def outcome(self) -> float:
        """In [-1, 1]. What breaks a test that passed before earns nothing, however much else it mends."""
        if self.status == "resolved":
            return 1.0
        passed, all = self.fail_to_pass
        return 2 * passed / all - 1 if self.status == "partial" else -1.0

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def judge(task: SweTask, patch: bytes, sandbox: Sandbox) -> Report:
    """Apply a patch and run the tests. Raises EnvError if the tests' own patch does not apply, SandboxError."""
    if not patch.strip():
        return Report("no_patch")
    sandbox.put({"tmp/patch.diff": patch})
    applied = sandbox.exec(APPLY, GIT_S, merge=False, max_output=MAX_PATCH)
    if not applied.ok:
        return Report("bad_patch", log=applied.errors[-300:])
    changed = [name for name in applied.output.split("\0") if name]
    dropped = not_counting(changed, files_of(task.gold_patch), files_of(task.test_patch))
    if len(dropped) == len(changed):
        return Report("no_patch", not_counted=tuple(dropped))
    if dropped:
        _demand(task, sandbox, RESTORE, "\0".join(dropped).encode())
    ran = run_tests(task, sandbox)
    said, put_back = ran.output[-2000:], tuple(dropped)
    if ran.timed_out:
        return Report("timeout", not_counted=put_back, log=said)
    tests = tests_status(spec_of(task), ran.output)
    if tests is None:
        return Report("no_report", not_counted=put_back, log=said)
    return report_of(tests, put_back, said)


def _demand(task: SweTask, sandbox: Sandbox, script: str, stdin: bytes = b"") -> None:
    done = sandbox.exec(script, GIT_S, stdin=stdin)
    if not done.ok:
        raise EnvError(f"task {task.id}: its tests could not be put in place: {done.output[-300:]}")


def run_tests(task: SweTask, sandbox: Sandbox) -> ExecResult:
    """Bring the tests in and run them on the tree as it is. Raises EnvError if they cannot be brought in."""
    sandbox.put({"eval.sh": spec_of(task).eval_script.encode()})
    if not task.brings_tests and task.test_patch.strip():
        sandbox.put({"tmp/test.diff": task.test_patch.encode()})
        _demand(task, sandbox, TESTS)
    return sandbox.exec(["bash", "/eval.sh"], task.eval_s, cwd=REPO, max_output=MAX_LOG)


def report_of(tests: Mapping[str, Mapping[str, list[str]]], dropped: tuple[str, ...] = (), log: str = "") -> Report:
    """From swebench's `tests_status`: FAIL_TO_PASS and PASS_TO_PASS → success and failure → names."""
    from swebench.harness.grading import get_resolution_status

    words: dict[str, Status] = {"RESOLVED_FULL": "resolved", "RESOLVED_PARTIAL": "partial"}
    status = words.get(get_resolution_status(tests), "unresolved")  # type: ignore[arg-type]
    found = [tests[name] for name in ("FAIL_TO_PASS", "PASS_TO_PASS")]
    fail, kept = ((len(each["success"]), len(each["success"]) + len(each["failure"])) for each in found)
    return Report(status, fail, kept, dropped, log)


def spec_of(task: SweTask) -> Any:
    """swebench's TestSpec; its eval script notes the exit status of the tests. Raises EnvError without swebench."""
    os.environ.setdefault("PYTHON_DOTENV_DISABLED", "1")  # swebench would read a .env file from a folder above
    try:
        from swebench.harness.log_parsers import PARSER_REGISTRY
        from swebench.harness.utils import make_test_spec
    except ImportError as error:
        raise EnvError(f"swebench cannot be imported ({error}); install clawrl[swe]") from error
    if task.row["log_parser"] not in PARSER_REGISTRY:
        known = ", ".join(sorted(PARSER_REGISTRY)[:3])
        raise EnvError(f"task {task.id}: log_parser {task.row['log_parser']!r} is unknown; use one of {known} …")
    return make_test_spec(dict(task.row))


def tests_status(spec: Any, log: str) -> Mapping[str, Mapping[str, list[str]]] | None:
    """What swebench reads from a log; None if it finds no results it trusts (no marks, no tests, a lying runner)."""
    from swebench.harness.grading import get_eval_report

    prediction = {"instance_id": spec.instance_id, "model_name_or_path": "agent", "model_patch": "given"}
    with _file(log) as name:
        report = get_eval_report(spec, prediction, name, include_tests_status=True)
    return report[spec.instance_id].get("tests_status")


def statuses(spec: Any, log: str) -> dict[str, str]:
    """Test → PASSED, FAILED, ERROR, SKIPPED or XFAIL, as swebench reads a log; empty if it does not trust it."""
    from swebench.harness.grading import get_logs_eval

    with _file(log) as name:
        return get_logs_eval(spec, name)[0]


@contextmanager
def _file(log: str) -> Iterator[str]:
    """swebench reads logs from files."""
    with tempfile.NamedTemporaryFile("w", suffix=".log", encoding="utf-8", errors="replace") as file:
        file.write(log)
        file.flush()
        yield file.name
