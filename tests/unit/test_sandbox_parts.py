"""The parts of envs/sandbox that compute: output, Dockerfiles, limits, filters, labels, tars, what doctor shows."""

import io
import os
import struct
import subprocess
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from clawrl.cli import main
from clawrl.errors import SandboxError
from envs.sandbox import cgroups, dockerfile, labels, probe, seccomp, tars
from envs.sandbox.shells import _certain
from envs.sandbox.streams import HeadTail, LocalProcess, exchange


def test_threads_that_try_limits_at_once_agree():
    alone = cgroups.enforceable.__wrapped__()
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda _: cgroups.enforceable.__wrapped__(), range(64)))
    assert set(found) == {alone}


def test_head_and_tail_are_kept_and_nothing_more():
    kept = HeadTail(10)
    for number in range(100_000):
        kept.add(b"%05d" % number)
    assert kept.num_bytes == 500_000
    assert kept.text() == "00000\n[... 499990 bytes left out ...]\n99999"
    short = HeadTail(10)
    short.add(b"12345678")
    short.add(b"90")
    assert (short.text(), short.truncated) == ("1234567890", False)


@pytest.mark.parametrize(
    ("window", "certain"),
    [
        (b"text", 4),
        (b"text\r", 4),
        (b"text\n", 4),
        (b"text\nabc:", 4),
        (b"text\nabc:12", 4),
        (b"text\nabc:12\r", 4),
        (b"text\nabc:1x", 11),
        (b"text\nother", 10),
        (b"two\n\nab", 4),
    ],
)
def test_only_what_may_be_a_marker_is_held_back(window, certain):
    assert _certain(window, "abc") == certain


def test_dockerfiles_are_read_as_docker_reads_them():
    steps = dockerfile.parse("# c\nFROM a\nrun one \\\n # between\n  two\n\nRUN <<'E' cat\nbody # kept\nE\nCMD x\n")
    assert [(step.line, step.name, step.rest) for step in steps] == [
        (2, "FROM", "a"),
        (3, "RUN", "one two"),
        (7, "RUN", "<<'E' cat\nbody # kept\nE"),
        (10, "CMD", "x"),
    ]
    with pytest.raises(SandboxError, match="line 2: the here-document E has no end"):
        dockerfile.parse("FROM a\nRUN <<E\nx\n")


def test_variables_of_a_dockerfile(tmp_path):
    state = dockerfile._State(tmp_path, env={"A": "1"}, arguments={"A": "2", "B": "3"})
    assert state.expand("$A ${B}x ${C:-d} ${A:+e}${C:+f} \\$A $C.") == "1 3x d e $A ."


def test_limits_in_either_version_of_control_groups():
    limits = {"memory": 1024.0, "pids": 7.0, "cpus": 0.5}
    assert cgroups.settings("1", limits)["cpu"] == [
        ("cpu.cfs_period_us", "100000", True),
        ("cpu.cfs_quota_us", "50000", True),
    ]
    assert cgroups.settings("2", limits) == {
        "memory": [("memory.max", "1024", True), ("memory.swap.max", "0", False)],
        "pids": [("pids.max", "7", True)],
        "cpu": [("cpu.max", "50000 100000", True)],
    }


@pytest.mark.parametrize(("machine", "keyctl", "ioctl", "read"), [("x86_64", 250, 16, 0), ("aarch64", 219, 29, 63)])
def test_the_filter_of_calls(machine, keyctl, ioctl, read):
    audit = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    assert verdict(machine, audit, keyctl) == 0x00050001
    assert verdict(machine, audit, read) == verdict(machine, audit, ioctl, 0x5413) == 0x7FFF0000
    assert verdict(machine, audit, ioctl, 0x5412) == 0x00050001
    assert verdict(machine, 0x40000003, read) == 0x00050026
    assert seccomp.program("riscv64") is None


def verdict(machine: str, audit: int, number: int, request: int = 0) -> int:
    """Run the filter as the kernel does."""
    program = seccomp.program(machine)
    assert program is not None
    lines = [struct.unpack("=HBBI", program[at : at + 8]) for at in range(0, len(program), 8)]
    data, at, value = {0: number, 4: audit, 24: request}, 0, 0
    while True:
        code, true, false, operand = lines[at]
        at += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            value = data[operand]
        else:
            at += true if (value == operand if code == 0x15 else value >= operand) else false


def test_labels_tell_the_dead_from_the_living(tmp_path):
    own = labels.own_label("run")
    assert own.alive()
    assert labels.Label.read(own.words()) == own
    assert labels.Label.read({"clawrl.run": "x"}) is None
    assert not labels.Label("run", own.pid, own.started + 1, own.boot).alive()
    assert not labels.Label("run", own.pid, own.started, "another boot").alive()
    labels.write(tmp_path, own, groups=["/a"])
    assert labels.read(tmp_path) == (own, {"groups": ["/a"]})
    (tmp_path / "label.json").write_text("{")
    assert labels.read(tmp_path) is None


def test_good_files_come_out_of_a_tar(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (("./d/a", b"a"), ("d/b", b"b")):
            member = tarfile.TarInfo(name)
            member.size, member.mode = 1, 0o4755
            tar.addfile(member, io.BytesIO(content))
        for kind, name, target in ((tarfile.SYMTYPE, "d/e/up", "../a"), (tarfile.LNKTYPE, "hard", "./d/a")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    tars.unpack(buffer.getvalue(), tmp_path / "to")
    assert (tmp_path / "to/d/e/up").read_text() == (tmp_path / "to/hard").read_text() == "a"
    assert (tmp_path / "to/d/a").stat().st_mode & 0o7777 == 0o755


def test_doctor_shows_what_was_found(monkeypatch, capsys):
    facts = [probe.Fact("overlay", "missing", "no [overlay]", "mount it"), probe.Fact("backend bwrap", "works", "well")]
    monkeypatch.setattr(probe, "look", lambda: facts)
    assert main(["doctor"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "overlay missing no [overlay]. Remedy: mount it" in shown
    assert main(["doctor", "--json"]) == 0
    facts[1] = probe.Fact("backend bwrap", "missing", "no bwrap")
    assert main(["doctor", "--json"]) == 1


class Hasty(LocalProcess):
    """Ends while it is asked whether it has, right after its last words."""

    def ended(self) -> bool:
        if self.child.poll() is None:
            assert self.child.stdin is not None
            os.write(self.child.stdin.fileno(), b"go\n")
            self.child.wait()
        return True

    def end_descriptor(self) -> None:
        return None


def test_last_words_are_heard_however_late_the_end_is_seen():
    shell = ["sh", "-c", "read go; echo bye"]
    process = Hasty(subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    heard: list[bytes] = []
    until = time.monotonic() + 20
    assert exchange(process, b"", until, lambda _, data: bool(heard.append(data)), close_input=False)
    assert b"".join(heard) == b"bye\n"
    process.close()
