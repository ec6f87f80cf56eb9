"""The escape list: what must stay inside, tried from inside on every backend."""

import contextlib
import io
import os
import pty
import secrets
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from clawrl.errors import SandboxError
from envs.sandbox import images, mapped
from envs.sandbox.labels import own_label

pytestmark = [pytest.mark.sandbox, pytest.mark.timeout(240)]
MIB = 1 << 20


def python(sandbox, code, *words, **options):
    """Run Python inside."""
    return sandbox.exec(["python3", "-c", code, *map(str, words)], **options)


CONNECT = """
import socket, sys
port, path, name = int(sys.argv[1]), sys.argv[2], sys.argv[3]
tries = [(socket.AF_INET, ("127.0.0.1", port)), (socket.AF_INET, ("8.8.8.8", 53)),
         (socket.AF_INET6, ("::1", port)), (socket.AF_UNIX, path), (socket.AF_UNIX, "\\0" + name)]
for kind, address in tries:
    s = socket.socket(kind)
    s.settimeout(2)
    try:
        s.connect(address); print("reached", address)
    except OSError: pass
try:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW); print("raw socket")
except OSError: pass
print(sorted(line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]))
"""


def test_network(sandbox, shared):
    name = secrets.token_hex(8)
    path = shared.place() / "socket"
    with contextlib.ExitStack() as stack:
        listening = [stack.enter_context(socket.create_server(("127.0.0.1", 0)))]
        for address in (str(path), f"\0{name}"):
            listening.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
            listening[-1].bind(address)
            listening[-1].listen()
        result = python(sandbox, CONNECT, listening[0].getsockname()[1], path, name)
    assert result.output == "['lo']\n"
    own = (
        "import socket; a = socket.create_server(('127.0.0.1', 0)); socket.create_connection(a.getsockname()); print(1)"
    )
    assert python(sandbox, own).output == "1\n", "its own loopback works"


def test_host_files(sandbox, shared, folder):
    name = f"host-{secrets.token_hex(8)}"
    secret = folder / name
    secret.write_text(os.environ["CLAWRL_TEST_SECRET"])
    secret.chmod(0o644)
    escapes = [secret, f"/proc/self/cwd/../../../..{secret}", f"/proc/1/root{secret}", f"/../../..{secret}"]
    for path in escapes:
        assert not sandbox.exec(["cat", str(path)]).ok
    assert sandbox.exec(f"find / -xdev -name '{name}' 2>/dev/null").output == ""
    assert sandbox.exec(f"mkdir -p {folder} && echo inside >{secret} && cat {secret}").output == "inside\n"
    assert secret.read_text() == os.environ["CLAWRL_TEST_SECRET"]
    mounts = sandbox.exec("cat /proc/self/mountinfo").output
    assert " ext4 " not in mounts or "/etc/hosts" in mounts  # docker binds three files of its own
    assert sandbox.exec("chroot / true 2>/dev/null || python3 -c 'import os; os.chroot(\"/\")'").code != 0
    for device in ("b 8 0", "b 254 0", "c 1 1"):
        assert not sandbox.exec(
            f"python3 -c 'import os; os.mknod(\"/tmp/d\", 0o60600, os.makedev(8, 0))' # {device}"
        ).ok


def test_other_sandboxes(sandbox, backend):
    other = backend.open()
    name, port = f"other{secrets.token_hex(8)}", 45678
    other.exec(f"echo x >/dev/shm/{name}; echo x >/tmp/{name}; echo x >/{name}")
    serve = (
        f"import socket, time; a = socket.socket(socket.AF_UNIX); a.bind('\\0{name}'); a.listen()\n"
        f"b = socket.create_server(('0.0.0.0', {port})); time.sleep(60)"
    )
    other.exec(f'setsid python3 -c "{serve}" >/dev/null 2>&1 &')
    deadline = time.monotonic() + 20
    while name not in other.exec("cat /proc/net/unix").output and time.monotonic() < deadline:
        time.sleep(0.05)
    assert name in other.exec("cat /proc/net/unix").output
    assert sandbox.exec(f"find / -xdev -name '{name}' 2>/dev/null; ls /dev/shm").output == ""
    assert name not in sandbox.exec("cat /proc/net/unix; ps -ef; cat /proc/sysvipc/*").output
    assert python(sandbox, CONNECT, port, f"/{name}", name).output == "['lo']\n"
    sandbox.exec("kill -9 -1")
    assert other.exec("ps -ef").output.count("setsid") + other.exec("ps -ef").output.count("python3") >= 1


def test_the_parents_environment_and_secrets(sandbox):
    secret = os.environ["CLAWRL_TEST_SECRET"]
    assert secret not in sandbox.exec("env; cat /proc/*/environ /proc/*/cmdline", max_output=MIB).output
    names = set(sandbox.exec("env | cut -d= -f1").output.split())
    assert names <= {"PATH", "HOME", "LANG", "PWD", "HOSTNAME", "SHLVL", "_", "OLDPWD"}
    keys = "import ctypes; print(ctypes.CDLL(None, use_errno=True).syscall(250, 0, -3, 0))"  # keyctl, session keyring
    assert python(sandbox, keys).output == "-1\n"
    open_files = "for f in /proc/self/fd/*; do readlink $f; done; readlink /proc/self/ns/pid"
    *descriptors, own = sandbox.exec(open_files).output.splitlines()
    assert all(each.startswith(("pipe:", "/proc/", "/dev/null")) or each == own for each in descriptors)
    with sandbox.shell() as shell:
        assert secret not in shell.run("env; export; cat /proc/$$/environ").output


def test_proc(sandbox):
    outside = str(os.getpid())
    pids = [int(name) for name in sandbox.exec("ls /proc").output.split() if name.isdigit()]
    assert len(pids) < 20
    assert "pytest" not in sandbox.exec("cat /proc/*/cmdline | tr '\\0' ' '").output
    assert outside not in sandbox.exec("ls /proc/1/task /proc/self/task").output.split() or int(outside) < 100
    writes = ("sys/kernel/core_pattern", "sysrq-trigger", "sys/vm/drop_caches", "sys/kernel/modprobe", "kcore", "kmem")
    for name in writes:
        before = Path(f"/proc/{name}").read_text() if name == "sys/kernel/core_pattern" else ""
        assert not sandbox.exec(f"echo 1 >/proc/{name}").ok
        assert not before or Path(f"/proc/{name}").read_text() == before
    assert not sandbox.exec("head -c 1 /proc/kcore | grep .").ok
    assert not sandbox.exec("mount -t proc none /mnt || mount --bind /proc /tmp").ok
    sandbox.exec("echo 1 >/sys/fs/cgroup/memory/memory.limit_in_bytes; rmdir /sys/fs/cgroup/*/*")
    assert sandbox.exec("echo fine").output == "fine\n"


PTRACE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
for pid in map(int, sys.argv[1:]):
    try:
        os.kill(pid, 9); print("signalled", pid)
    except OSError: pass
    if libc.ptrace(16, pid, 0, 0) == 0: print("traced", pid)
    try:
        open(f"/proc/{pid}/mem", "rb"); print("memory of", pid)
    except OSError: pass
"""


def test_ptrace_and_signals_to_the_host(sandbox, backend):
    sleepers = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    try:
        pids = [each.pid for each in sleepers if each.pid > 200]
        assert python(sandbox, PTRACE, *pids, os.getppid() if os.getppid() > 200 else 999999).output == ""
        own = backend.open()
        for _ in range(3):
            own.exec("kill -9 -1; kill -STOP -1; kill -9 1; kill -TERM 1", timeout=10)
        time.sleep(0.1)
        assert own.exec("echo alive").output == "alive\n"
        assert all(each.poll() is None for each in sleepers)
    finally:
        for each in sleepers:
            each.kill()
            each.wait()


def test_fork_bomb(backend):
    sandbox = backend.open(pids=40)
    most, stop = [len(psutil.pids())], threading.Event()
    before = most[0]

    def watch():
        while not stop.wait(0.02):
            most.append(len(psutil.pids()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with contextlib.suppress(SandboxError):  # nothing more can be started in it
        result = sandbox.exec("f() { f | f & }; f; sleep 2; true", timeout=4)
        assert result.timed_out or result.code is not None
    stop.set()
    watcher.join()
    assert max(most) - before < 40 + 150, "others work on this machine too; a bomb makes thousands"
    sandbox.reset()
    assert sandbox.exec("echo well").output == "well\n"
    holding = "import os, time\nn = 0\ntry:\n    while os.fork(): n += 1\n    time.sleep(20)\nexcept OSError: print(n)"
    count = int(python(sandbox, holding, timeout=60).output.split()[0])
    assert 10 < count <= 48


def test_memory_bomb(backend):
    sandbox = backend.open(memory=96 * MIB, disk=16 * MIB)
    grow = (
        "import sys\nkept = []\nwhile len(kept) < 1024:\n"
        "    kept.append(bytearray(b'x') * 1048576)\n    sys.stdout.write(f'{len(kept)}\\n'); sys.stdout.flush()"
    )
    result = python(sandbox, grow, timeout=60)
    got = int(next(line for line in reversed(result.output.split()) if line.isdigit()))
    held = backend.name == "docker" and result.timed_out  # near its limit the kernel may read its pages again and again
    assert held or result.code not in (0, None)
    assert 20 < got <= 112
    sandbox.reset()
    assert sandbox.exec("echo well").output == "well\n"


def test_disk_bomb(backend):
    limits = {} if disk_holds(backend) else {"limits": "best_effort"}
    if limits:
        with pytest.raises(SandboxError, match="disk="):
            backend.open(disk=24 * MIB)
    sandbox = backend.open(disk=24 * MIB, **limits)
    for place in ("/tmp/bomb", "/root/bomb", "/usr/bomb"):
        result = sandbox.exec(
            f"dd if=/dev/zero of={place} bs=1M count=200 conv=fsync; stat -c %s {place}; rm -f {place}"
        )
        assert int(result.output.split()[-1]) <= 24 * MIB
    result = sandbox.exec(
        "dd if=/dev/zero of=/dev/shm/bomb bs=1M count=200; stat -c %s /dev/shm/bomb; rm -f /dev/shm/bomb"
    )
    assert int(result.output.split()[-1]) <= 64 * MIB
    assert not sandbox.exec(
        "dd if=/dev/zero of=/dev/bomb bs=1M count=100 && [ $(stat -c %s /dev/bomb) -gt 70000000 ]"
    ).ok
    assert sandbox.exec("echo room again >/tmp/x && cat /tmp/x").output == "room again\n"


def disk_holds(backend) -> bool:
    if backend.name != "docker":
        return True
    from envs.sandbox import containers

    backend.open().close()
    return containers.disk_limits()


def hostile_tar(*entries):
    """(name, content or (kind, link target))…"""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size, member.mode = len(content), 0o4755
                tar.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content
                tar.addfile(member)
    return buffer.getvalue()


HOSTILE = {
    "parent": [("../evil", b"x")],
    "absolute": [("/tmp/evil", b"x")],
    "through a link": [("d", (tarfile.SYMTYPE, "/tmp")), ("d/evil", b"x")],
    "link to the parent": [("d", (tarfile.SYMTYPE, "..")), ("d/evil", b"x")],
    "links that add up": [("a", (tarfile.SYMTYPE, ".")), ("b", (tarfile.SYMTYPE, "a/a/../..")), ("b/evil", b"x")],
    "hard link": [("passwd", (tarfile.LNKTYPE, "/etc/passwd")), ("passwd", b"evil")],
    "device": [("sda", (tarfile.BLKTYPE, ""))],
}


@pytest.mark.parametrize("trick", HOSTILE)
def test_tar_tricks_on_the_way_out(sandbox, shared, trick):
    """A sandbox's tar may be anything; here it is replaced by what prints a hostile archive."""
    place = shared.place()
    (place / "to").mkdir(mode=0o777)
    (place / "to").chmod(0o777)
    passwd = Path("/etc/passwd").read_bytes()
    sandbox.put({"hostile.tar": hostile_tar(*HOSTILE[trick])}, at="/tmp")
    forged = "printf '#!/bin/sh\ncat /tmp/hostile.tar\n' >/usr/bin/tar; chmod +x /usr/bin/tar"
    sandbox.exec(f"mv /usr/bin/tar /usr/bin/tar.real; {forged}")
    try:
        with contextlib.suppress(SandboxError):
            sandbox.get("/x", place / "to")
    finally:
        sandbox.exec("mv /usr/bin/tar.real /usr/bin/tar")
    assert not list(place.glob("evil"))
    assert not Path("/tmp/evil").exists()
    assert Path("/etc/passwd").read_bytes() == passwd
    for path in (place / "to").rglob("*"):
        assert path.resolve().is_relative_to(place / "to"), path
        assert stat.S_ISREG(path.lstat().st_mode) or path.is_dir() or path.is_symlink()
        assert not path.lstat().st_mode & stat.S_ISUID


def test_links_inside_lead_nowhere_outside(sandbox, shared):
    place = shared.place()
    sandbox.exec("ln -sf /etc/passwd /tmp/link; ln -sfn / /tmp/root; ln -sfn /etc /tmp/etc")
    assert SECRET_USER not in sandbox.read_file("/tmp/link").decode()
    assert not list(sandbox.get("/tmp/link", place).parent.glob("link"))
    name = f"evil-{secrets.token_hex(6)}"
    sandbox.put({name: b"x"}, at="/tmp/etc")
    assert sandbox.exec(f"cat /etc/{name}").output == "x"
    assert not Path("/etc", name).exists()
    with pytest.raises(SandboxError, match="leads out"):
        sandbox.put({"../x": b""})


SECRET_USER = "daemon:"  # in this machine's /etc/passwd, not in the image's


@pytest.mark.parametrize("trick", [name for name in HOSTILE if name != "device"])
def test_tar_tricks_of_an_image(home, tmp_path, trick):
    if why := mapped.missing():
        pytest.skip(why)
    passwd = Path("/etc/passwd").read_bytes()
    (tmp_path / "image.tar").write_bytes(hostile_tar(("usr/x", b"x"), *HOSTILE[trick]))
    with contextlib.suppress(SandboxError):
        found = images.find(str(tmp_path / "image.tar"), own_label("tests"), str)
        assert not list((home / found.layers[0]).parent.glob("evil"))
    assert not Path("/tmp/evil").exists()
    assert not list(home.glob("layers/*/evil"))
    assert Path("/etc/passwd").read_bytes() == passwd


def test_setuid(sandbox):
    assert "NoNewPrivs:\t1" in sandbox.exec("cat /proc/self/status").output
    sandbox.exec("cp /usr/bin/bash /tmp/suid; cp $(readlink -f $(which python3)) /tmp/py; chmod 4755 /tmp/suid /tmp/py")
    as_nobody = "setpriv --reuid=65534 --clear-groups /tmp/suid -p -c 'id -u; id -ru; echo $EUID'"
    result = sandbox.exec(as_nobody)
    assert not result.ok or result.output.split() == ["65534"] * 3
    if result.ok:
        assert not sandbox.exec("setpriv --reuid=65534 --clear-groups /tmp/py -c 'import os; os.setuid(0)'").ok


def test_nested_user_namespaces(sandbox):
    assert not sandbox.exec("unshare --user --map-root-user true").ok
    calls = (
        "import ctypes; l = ctypes.CDLL(None); print([l.unshare(flag) for flag in (0x10000000, 0x20000, 0x40000000)])"
    )
    assert python(sandbox, calls).output == "[-1, -1, -1]\n"
    assert not sandbox.exec("echo 10 >/proc/sys/user/max_user_namespaces").ok


INJECT = """
import fcntl, os, sys
names = "/dev/tty /dev/console /dev/tty1 /proc/self/fd/0 /proc/self/fd/1 /dev/pts/0 /dev/pts/1 /proc/1/fd/0"
for name in names.split():
    try:
        descriptor = os.open(name, os.O_RDWR | os.O_NONBLOCK)
    except OSError:
        continue
    for byte in b"echo injected\\n":
        try:
            fcntl.ioctl(descriptor, 0x5412, bytes([byte]))
        except OSError:
            break
sys.stdout.write("\\x1b]0;title\\x07\\x1b[6n")
"""

IN_TERMINAL = """
import fcntl, sys, termios, struct, json
from envs.sandbox import SandboxSpec, open_sandbox
backend, limits, code = sys.argv[1:4]
with open_sandbox(SandboxSpec("base", disk=None, limits=limits), backend, "terminal") as sandbox:
    sandbox.exec(["python3", "-c", code])
    with sandbox.shell() as shell, sandbox.shell(pty=True) as terminal:
        sandbox.put({"inject.py": code.encode()}, at="/tmp")
        shell.run("python3 /tmp/inject.py")
        terminal.run("python3 /tmp/inject.py", 5)
        terminal.read(0.3)
waiting = struct.unpack("i", fcntl.ioctl(0, termios.FIONREAD, b"    "))[0]
print(json.dumps({"injected": waiting}), flush=True)
"""


def test_terminal_injection(backend):
    """Started from a person's terminal: nothing is typed there, and no escape sequence reaches it."""
    if backend.name == "bwrap-user" and os.getuid() == 0:
        pytest.skip("shown with root's rights; the code is the same")
    limits = "enforce" if backend.enforces else "best_effort"
    words = [sys.executable, "-c", IN_TERMINAL, backend.name.removesuffix("-user"), limits, INJECT]
    pid, master = pty.fork()
    if pid == 0:
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        os.execv(words[0], words)
    shown = b""
    with contextlib.suppress(OSError):  # EIO at its end
        while data := os.read(master, 4096):
            shown += data
    os.waitpid(pid, 0)
    os.close(master)
    assert shown.decode().strip() == '{"injected": 0}'


def test_output_flood(sandbox, shared):
    """1 GB to stdout, and a flood in a shell that is stopped for time: cut, in flat memory."""
    before = shared.package.memory()
    most, stop = [before], threading.Event()

    def watch():
        while not stop.wait(0.05):
            most.append(shared.package.memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = sandbox.exec("head -c 1000000000 /dev/zero | tr '\\0' y; echo end", timeout=200)
        with sandbox.shell() as shell:
            flood = shell.run("yes", timeout=1.0)
            assert shell.run("echo well").output == "well\n"
    finally:
        stop.set()
        watcher.join()
    assert (result.code, result.num_bytes, result.truncated) == (0, 1_000_000_004, True)
    assert len(result.output) < 70_000
    assert result.output.endswith("yend\n")
    assert flood.timed_out
    assert len(flood.output) < 70_000
    assert max(most) - before < 40 * MIB


def test_orphaned_daemons(backend):
    number = f"7{secrets.randbelow(10**6):06d}"
    sandbox = backend.open()
    daemon = f"setsid sh -c 'trap \"\" HUP TERM; (sleep {number} &) ; sleep {number}' >/dev/null 2>&1 &"
    for end in (sandbox.reset, sandbox.close):
        assert sandbox.exec(daemon).ok, "a command does not wait for its daemons"
        with sandbox.shell() as shell:
            assert shell.run(daemon).ok
        deadline = time.monotonic() + 10
        while running(number) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert running(number) >= 2
        end()
        assert running(number) == 0


def running(number: str) -> int:
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += path.read_bytes() == f"sleep\0{number}\0".encode()
    return found
