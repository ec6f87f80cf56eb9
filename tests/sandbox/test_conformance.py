"""What every backend must do alike: commands, shells, terminals, files, snapshots, images, and clearing up."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from clawrl.errors import ConfigError, SandboxError
from envs.sandbox import SandboxSpec, labels, open_sandbox

pytestmark = [pytest.mark.sandbox, pytest.mark.timeout(180)]
MIB = 1 << 20


def test_exec_gives_status_and_output(sandbox):
    result = sandbox.exec("echo one; echo two >&2; exit 7")
    assert (result.code, result.output, result.errors, result.ok) == (7, "one\ntwo\n", "", False)
    apart = sandbox.exec("echo one; echo two >&2", merge=False)
    assert (apart.output, apart.errors, apart.ok) == ("one\n", "two\n", True)
    assert sandbox.exec(["printf", "%s|", "a b", "$HOME"]).output == "a b|$HOME|"
    assert sandbox.exec("kill -9 $$").code == 137
    assert sandbox.exec(["no-such-program"]).code == 127
    assert sandbox.exec("printf '\\377x'").output == "\ufffdx"


def test_exec_takes_stdin_directory_and_variables(sandbox):
    data = os.urandom(3 * MIB)
    result = sandbox.exec("sha256sum", stdin=data)
    assert result.output.split()[0] == __import__("hashlib").sha256(data).hexdigest()
    assert sandbox.exec("cat").output == ""
    result = sandbox.exec('echo "$A $PWD"', env={"A": "x y'\n"}, cwd="/usr/lib")
    assert result.output == "x y'\n /usr/lib\n"
    with pytest.raises(SandboxError, match="no process can have"):
        sandbox.exec("true", env={"A=B": "1"})


def test_a_program_that_stays_is_spoken_to(sandbox):
    process = sandbox.start(["sh", "-c", "read line; echo got $line; echo bad >&2; exit 3"])
    assert not process.ended()
    process.send(b"hello\n")
    assert _heard(process) == ({1: b"got hello\n", 2: b"bad\n"}, 3)
    assert _heard(sandbox.start(["no-such-program"]))[1] == 127
    with pytest.raises(SandboxError, match="empty"):
        sandbox.start([])


def _heard(process) -> tuple[dict[int, bytes], int | None]:
    """(stdout and stderr, exit status)."""
    heard = {1: b"", 2: b""}
    deadline = time.monotonic() + 20
    while (process.outputs() or not process.ended()) and time.monotonic() < deadline:
        for descriptor in process.outputs():
            for stream, data in process.receive(descriptor):
                heard[stream] += data
        time.sleep(0.01)
    code = process.code()
    process.close()
    return heard, code


def test_a_command_that_takes_too_long_is_killed_with_its_descendants(sandbox):
    started = time.monotonic()
    result = sandbox.exec("(sleep 300 & sleep 300); sleep 300", timeout=0.5)
    assert (result.code, result.timed_out) == (None, True)
    assert time.monotonic() - started < 100
    assert sandbox.exec("pgrep -fc '[s]leep 300'").output.strip() == "0"


def test_long_output_keeps_head_and_tail(sandbox):
    result = sandbox.exec("seq 1 100000", max_output=2000)
    assert result.truncated
    assert result.num_bytes == 588895
    assert len(result.output) < 2100
    assert result.output.startswith("1\n2\n")
    assert result.output.endswith("99999\n100000\n")
    assert "586895 bytes left out" in result.output


def test_shell_keeps_its_state(sandbox):
    with sandbox.shell() as shell:
        shell.run("cd /usr && X=5 && f() { echo f-$1; }")
        assert shell.run('echo "$PWD $X"; f 3').output == "/usr 5\nf-3\n"
        assert shell.run("printf 'no newline'").output == "no newline"
        assert shell.run("echo out; echo err >&2").output == "out\nerr\n"
        assert shell.run("cat <<'END'\na 'b' \"c\" $X\nEND").output == "a 'b' \"c\" $X\n"
        assert shell.run("(exit 9)").code == 9
        assert shell.run("if").code != 0
        assert shell.run("cat").output == ""
        assert shell.run("echo still here").output == "still here\n"
        with pytest.raises(SandboxError, match="pty"):
            shell.send("x")
        ended = shell.run("echo bye; exit 3")
        assert (ended.code, ended.output, shell.alive) == (3, "bye\n", False)
        with pytest.raises(SandboxError, match="ended"):
            shell.run("true")


def test_shell_goes_on_after_a_command_was_killed(sandbox):
    with sandbox.shell() as shell:
        shell.run("X=before")
        result = shell.run("echo started; sleep 300", timeout=0.5)
        assert (result.code, result.timed_out) == (None, True)
        assert result.output.startswith("started\n")
        assert shell.run("echo $X").output == "before\n"


def test_markers_cannot_be_foreseen(sandbox):
    with sandbox.shell() as shell:
        result = shell.run("printf '\\n000000000000000000000000:0\\n'; echo more")
        assert result.output == "\n000000000000000000000000:0\nmore\n"


def test_terminal_takes_keys(sandbox):
    with sandbox.shell(pty=True, rows=33, columns=77) as shell:
        assert shell.run("stty size").output == "33 77\n"
        shell.resize(20, 50)
        assert shell.run("stty size").output == "20 50\n"
        result = shell.run("echo waiting; sleep 300", timeout=1.0)
        assert (result.timed_out, shell.busy) == (True, True)
        with pytest.raises(SandboxError, match="still runs"):
            shell.run("true")
        shell.send("\x03")
        shell.read(5.0)
        assert not shell.busy
        shell.run("python3 -q", timeout=2.0)
        shell.send("print(6 * 7)\n")
        shown, deadline = "", time.monotonic() + 10
        while "42" not in shown and time.monotonic() < deadline:
            shown += shell.read(0.3)
        assert "42" in shown
        shell.send("\x04")
        shell.read(5.0)
        assert not shell.busy
        assert shell.run(f"printf %s '{'x' * 6000}' | wc -c").output.strip() == "6000"
        assert shell.run("for i in 1 2\ndo\n\techo $i\ndone").output == "1\n2\n"


def test_files_go_in_and_come_out(sandbox, shared):
    place = shared.place()
    (place / "in/deep").mkdir(parents=True)
    (place / "in/deep/run.sh").write_text("#!/bin/sh\necho ran\n")
    (place / "in/deep/run.sh").chmod(0o755)
    (place / "in/link").symlink_to("deep/run.sh")
    content = bytes(range(256)) * 5000
    sandbox.put({"a b/x.bin": content, "tree": place / "in"}, at="/put")
    assert sandbox.exec("/put/tree/link && stat -c %U /put/tree").output == "ran\nroot\n"
    assert sandbox.read_file("/put/a b/x.bin", 10 * MIB) == content
    assert sandbox.read_file("/put/a b/x.bin", 100) == content[:100]
    out = sandbox.get("/put/tree", place / "out")
    assert (out / "link").read_text() == (out / "deep/run.sh").read_text() == "#!/bin/sh\necho ran\n"
    assert os.access(out / "deep/run.sh", os.X_OK)
    assert sandbox.get("/put/a b/x.bin", place / "out").read_bytes() == content
    for path in ("/put/nothing", "/put"):
        with pytest.raises(SandboxError, match="not a readable file"):
            sandbox.read_file(path)
    with pytest.raises(SandboxError, match="could not be read"):
        sandbox.get_tar("/put/nothing")
    with pytest.raises(SandboxError, match="max_bytes"):
        sandbox.get_tar("/put", 1000)


def test_reset_goes_back_to_the_image(backend):
    sandbox = backend.open(workdir="/work/here")
    shell = sandbox.shell()
    sandbox.exec("echo x >/made; rm /etc/hosts; mkdir /usr/lib/new; sleep 300 & echo y >/tmp/t")
    assert sandbox.exec("cat /made /tmp/t; pwd").output == "x\ny\n/work/here\n"
    sandbox.reset()
    assert not shell.alive
    result = sandbox.exec("ls /made /tmp/t /usr/lib/new; cat /etc/hosts; pgrep -fc '[s]leep 300'; pwd", merge=False)
    assert "localhost" in result.output
    assert result.output.endswith("0\n/work/here\n")


def test_snapshot_and_fork_copy_the_files(backend):
    first = backend.open()
    first.exec("echo one >/made; rm -r /usr/lib/git-core /etc/nsswitch.conf; ln -s x /l")
    first.exec("mkdir /etc/nsswitch.conf; touch /etc/nsswitch.conf/g")
    image = first.snapshot()
    second = first.fork()
    try:
        first.exec("echo two >/made")
        seen = "cat /made; ls /usr/lib/git-core /etc/nsswitch.conf; readlink /l"
        for each in (second, backend.open(image)):
            result = each.exec(seen, merge=False)
            assert result.output == "one\n/etc/nsswitch.conf:\ng\nx\n"
        second.exec("echo three >/made")
        assert first.exec("cat /made").output == "two\n"
        second.reset()
        assert second.exec("cat /made").output == "one\n"
        third = backend.open(second.snapshot())
        assert third.exec(seen, merge=False).output == "one\n/etc/nsswitch.conf:\ng\nx\n"
        third.close()
    finally:
        second.close()
    backend.close()
    backend.package.remove_snapshot(image)
    with pytest.raises(SandboxError):
        backend.open(image)


def test_a_closed_sandbox_says_so(backend):
    sandbox = backend.open()
    shell = sandbox.shell()
    sandbox.close()
    sandbox.close()
    assert not shell.alive
    for act in (lambda: sandbox.exec("true"), sandbox.shell, sandbox.reset):
        with pytest.raises(SandboxError, match="closed"):
            act()


def test_limits_that_cannot_be_held_are_errors(backend):
    if backend.enforces:
        assert backend.open().unenforced == ()
        return
    with pytest.raises(SandboxError, match=r"memory=.*plain user.*best_effort"):
        backend.open(limits="enforce")
    assert len(backend.open().unenforced) == 2
    assert backend.open(limits="enforce", memory=None, cpus=None).unenforced == ()


def test_processor_time_is_limited(backend):
    if not backend.enforces:
        pytest.skip("no processor limit for plain users (and it says so)")
    sandbox = backend.open(cpus=0.3)
    busy = "import time; e = time.time() + 2\nwhile time.time() < e: pass\nprint(time.process_time())"
    assert float(sandbox.exec(["python3", "-c", busy]).output) < 1.2


DOCKERFILE = """# syntax comment
ARG BASE=base
FROM $BASE
ENV NAME="a b" OTHER=c
ENV OLD style value
WORKDIR /srv/app
COPY src/ ./lib/
COPY one.txt two.txt /data/
COPY --chmod=0755 run /usr/local/bin/run
ADD packed.tar.gz /packed
RUN echo "$NAME-$OTHER-$OLD" >made && \\
    # a comment between
    ls lib | sort >>made
RUN <<END
cd /data
cat one.txt two.txt >both
END
RUN ["touch", "exec form"]
CMD ["nothing"]
"""


def dockerfile_folder(place: Path) -> Path:
    (place / "src/sub").mkdir(parents=True)
    (place / "src/sub/x").write_text("x")
    (place / "src/y").write_text("y")
    for name in ("one.txt", "two.txt"):
        (place / name).write_text(name)
    (place / "run").write_text("#!/bin/sh\necho run $NAME\n")
    with tarfile.open(place / "packed.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("inner")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"inner"))
    (place / "Dockerfile").write_text(DOCKERFILE)
    return place


def test_dockerfile_folders_are_built_without_network(backend):
    folder = dockerfile_folder(backend.place())
    sandbox = backend.open(str(folder))
    told = sandbox.exec("pwd; cat made; cat /data/both; run; cat /packed/inner lib/sub/x; ls")
    expected = "/srv/app\na b-c-style value\nsub\ny\none.txttwo.txtrun a b\ninnerxexec form\nlib\nmade\n"
    assert told.output == expected
    started = time.monotonic()
    again = backend.open(str(folder))
    cached = time.monotonic() - started
    assert again.exec("cat made").output == "a b-c-style value\nsub\ny\n"
    (folder / "one.txt").write_text("changed")
    assert backend.open(str(folder)).exec("cat /data/both").output == "changedtwo.txt"
    assert cached < 10


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("USER app", "line 3: USER app.*root"),
        ("FROM base", "line 3: FROM base.*stages"),
        ("COPY --from=x a b", "line 3: COPY.*--from"),
        ("ADD https://example.org/x /x", "line 3: ADD.*no network"),
        ("RUN --mount=type=cache,target=/x true", "line 3: RUN.*options"),
        ("COPY nothing /x", "line 3: COPY nothing.*no nothing beside it"),
        ("COPY ../x /x", "line 3: COPY.*outside"),
        ("RUN echo why; false", "(?s)line 3: RUN.*exit status 1.*why"),
        ("FETCH x", "line 3: FETCH.*no such instruction"),
    ],
)
def test_what_a_dockerfile_may_not_do_is_named(backend, step, said):
    place = backend.place()
    (place / "Dockerfile").write_text(f"FROM base\n\n{step}\n")
    with pytest.raises(SandboxError, match=said):
        backend.open(str(place))


def test_images_are_tars_and_folders_too(backend):
    """A root file system as a tar and as a folder, with the same content twice: unpacked once."""
    base = backend.open()
    place = backend.place()
    base.exec("mkdir -p /small/bin /small/etc; cd /small; echo tar >etc/which; ln -s ../usr/bin bin/x")
    (place / "root.tar").write_bytes(base.get_tar("/usr", 200 * MIB))
    with tarfile.open(place / "root.tar", "a") as tar:
        for name, target in (("bin", "usr/bin"), ("lib", "usr/lib"), ("lib64", "usr/lib64"), ("sbin", "usr/sbin")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
        member = tarfile.TarInfo("etc/which")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"tar"))
    sandbox = backend.open(str(place / "root.tar"))
    assert sandbox.exec("cat /etc/which; echo x >/etc/new; stat -c %u /etc/which").output == "tar0\n"
    (place / "not.tar").write_text("this is no tar")
    with pytest.raises(SandboxError):
        backend.open(str(place / "not.tar"))
    (place / "empty").mkdir()
    with pytest.raises(SandboxError, match="neither a Dockerfile nor bin or usr"):
        backend.open(str(place / "empty"))


def test_an_image_that_is_not_there_is_named(backend):
    with pytest.raises(SandboxError, match=r"no-such-image:1"):
        backend.open("no-such-image:1")


def test_host_is_an_image_where_it_can_be(backend):
    if backend.name == "docker":
        with pytest.raises(SandboxError, match="use bwrap"):
            backend.open("host")
        return
    sandbox = backend.open("host")
    assert (
        sandbox.exec("python3 -c 'print(6 * 7)'; echo x >/root/x && echo x >/tmp/y && cat /root/x").output == "42\nx\n"
    )
    assert not sandbox.exec("touch /usr/bin/x").ok


def test_auto_takes_what_works_and_says_why_not(home, backend_of, monkeypatch):
    backend_of("unshare")
    limits = "enforce" if os.getuid() == 0 else "best_effort"
    with open_sandbox(SandboxSpec("base", limits=limits)) as sandbox:
        assert sandbox.backend in ("bwrap", "unshare")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere")
    with pytest.raises(SandboxError, match=r"no-such-image:1.*docker cannot be asked.*set DOCKER_HOST"):
        open_sandbox(SandboxSpec("no-such-image:1", limits=limits))


@pytest.mark.parametrize("wrong", [{"memory": 10}, {"cpus": 0}, {"network": "all"}, {"image": ""}, {"workdir": "x"}])
def test_a_wrong_spec_is_refused(wrong):
    with pytest.raises(ConfigError):
        SandboxSpec(**wrong)


def test_an_unknown_backend_is_refused(home):
    with pytest.raises(ConfigError, match="bwrap"):
        open_sandbox(SandboxSpec(), "podman")


def test_process_needs_the_word(home):
    with pytest.raises(SandboxError, match="best_effort"):
        open_sandbox(SandboxSpec(), "process")
    with open_sandbox(SandboxSpec(limits="best_effort"), "process") as sandbox:
        assert "network=none" in sandbox.unenforced
        sandbox.put({"a/b": b"x"})
        assert sandbox.exec("cat a/b; echo $CLAWRL_TEST_SECRET").output == "x\n"
        with sandbox.shell(pty=True) as shell:
            assert shell.run("pwd").output.startswith("/")
        with pytest.raises(SandboxError, match="on this machine itself"):
            sandbox.put({"x": b""}, at="/etc")
        child = sandbox.fork()
        assert child.exec("cat a/b").output == "x"
        child.close()
        sandbox.reset()
        assert sandbox.exec("ls").output == ""


KILLED = """
import json, os, sys, time
from envs.sandbox import SandboxSpec, open_sandbox
backend, run = sys.argv[1:3]
opened = [open_sandbox(SandboxSpec("base", disk=64 << 20, limits=sys.argv[3]), backend, run) for _ in range(2)]
opened[0].exec("setsid sleep 98765 >/dev/null 2>&1 &")
opened[0].snapshot()
print(json.dumps([each.id for each in opened]), flush=True)
time.sleep(600)
"""


def test_after_kill_9_the_next_start_leaves_nothing(backend):
    """Its own run's only: what another run's killed process left stays for that run."""
    if backend.name == "bwrap-user" and os.getuid() == 0:
        pytest.skip("shown with root's rights; the code is the same")
    killed, other = f"killed-{backend.name}", f"other-{backend.name}"
    left = {}
    for run in (killed, other):
        limits = "enforce" if backend.enforces else "best_effort"
        words = [sys.executable, "-c", KILLED, backend.name.removesuffix("-user"), run, limits]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            left[run] = json.loads(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
    assert traces(left[killed])
    alive = backend.open(run=killed)  # the first start of this run in this process
    assert traces(left[killed]) == []
    assert traces(left[other])
    assert alive.exec("true").ok
    removed = backend.package.reconcile(other)
    assert len(removed) == 3
    assert traces(left[other]) == []
    assert [line for line in processes() if "sleep 98765" in line] == []


def processes() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
        except OSError:
            continue
    return found


def traces(ids: list[str]) -> list[str]:
    """Folders, mounts, control groups and containers that carry these sandboxes' names."""
    found = [str(path) for id in ids for path in labels.home().glob(f"*/{id}")]
    found += [line for line in Path("/proc/self/mounts").read_text().splitlines() if any(id in line for id in ids)]
    found += [str(path) for id in ids for path in Path("/sys/fs/cgroup").glob(f"**/clawrl-{id}")]
    if os.environ.get("DOCKER_HOST"):
        import docker

        names = [str(each.name) for each in docker.from_env().containers.list(all=True)]
        found += [name for name in names if any(id in name for id in ids)]
    return found
