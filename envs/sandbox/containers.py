"""`docker`: sandboxes as containers, through docker's SDK and the daemon that its environment names (DOCKER_HOST).

Exec and shells speak over the daemon's hijacked streams; files go through the container's own tar, as everywhere.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import docker
import requests
from docker import errors

from clawrl.errors import SandboxError
from envs.sandbox import dockerfile, hostroot, images, labels
from envs.sandbox.labels import Label
from envs.sandbox.running import RunningSandbox
from envs.sandbox.shells import Resize
from envs.sandbox.spec import SandboxSpec
from envs.sandbox.streams import CHUNK, Process, wait_for_one

SNAPSHOTS = "clawrl-snapshot:"
LAYERS = "clawrl-layer:"
TIMEOUT = 120
LATE, FIRST_LATE, KILLING = 2.0, 20.0, 30.0
"""Seconds without output after a command's end that say that only its daemons hold the stream (of none at all: that it
got lost), and seconds that ending a process may take."""

CAPABILITIES = "CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE".split()
FIRST = "trap '' HUP INT TERM; while :; do sleep 86400 & wait $!; done"
"""Pid 1: buries orphans; nobody inside can end it."""

KILL = r"""
below() { for stat in /proc/[0-9]*/stat; do
  read -r line <"$stat" 2>/dev/null || continue
  rest=${line##*) }; rest=${rest#* }
  case " $found " in *" ${rest%% *} "*) case " $found " in *" ${line%% *} "*) ;; *)
    kill -STOP "${line%% *}" 2>/dev/null && found="$found ${line%% *}" && new=1 ;;
  esac ;; esac
done; }
found=$1 new=1
[ "$2" = all ] && kill -STOP "$1"
while [ $new = 1 ]; do new=0; below; done
[ "$2" = all ] || found=${found#"$1"}
kill -KILL $found 2>/dev/null; :
"""
"""$1 a pid, $2 whether it too; walks /proc, since images need not have ps."""

_clients = threading.local()
_facts: dict[str, Any] = {}


def client() -> Any:
    """This thread's connection to the daemon. Raises SandboxError with what would help."""
    key = (os.getpid(), os.environ.get("DOCKER_HOST"))
    if getattr(_clients, "key", None) != key:
        try:
            found = docker.from_env(timeout=TIMEOUT)
            found.ping()
        except (errors.DockerException, OSError):
            where = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
            raise SandboxError(f"no docker daemon answers at {where}: start it, or set DOCKER_HOST") from None
        _clients.client, _clients.key = found, key
    return _clients.client


def _asking(what: str, act: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A call to the daemon; its refusal becomes ours."""
    try:
        return act(*arguments, **options)
    except errors.APIError as error:
        raise SandboxError(f"{what}: docker says {error.explanation or error}") from None
    except (errors.DockerException, requests.RequestException, OSError) as error:
        raise SandboxError(f"{what}: {error}") from None


def refusal(spec: SandboxSpec) -> str | None:
    """Why docker cannot serve a spec; None if it can. An image it lacks is pulled only when it is opened."""
    try:
        client()
        if spec.image == "host":
            return "image host is the machine's own files, which a container does not have; use bwrap, or image base"
        unenforced(spec)
    except SandboxError as error:
        return str(error)
    if _is_local(spec.image):
        return None
    return None if _has(spec.image) or _pulled(spec.image) else (
        f"docker has no image {spec.image!r} and cannot pull it; load it there, or name a rootfs tar or folder"
    )  # fmt: skip


def _is_local(image: str) -> bool:
    return image == "base" or images.local_path(image) is not None


def _has(image: str) -> bool:
    try:
        client().api.inspect_image(image)
    except errors.ImageNotFound:
        return False
    except errors.APIError as error:
        raise SandboxError(f"docker does not take {image!r} for an image: {error.explanation}") from None
    return True


def _pulled(image: str) -> bool:
    try:
        client().images.pull(image)
    except (errors.DockerException, requests.RequestException):
        return False
    return True


def unenforced(spec: SandboxSpec) -> tuple[str, ...]:
    """The limits that this daemon cannot hold. Raises SandboxError if they must be."""
    facts = _daemon()
    found = []
    for name, fact in (("memory", "MemoryLimit"), ("pids", "PidsLimit"), ("cpus", "CpuCfsQuota")):
        if getattr(spec, name) is not None and not facts.get(fact):
            found.append(f"{name}={getattr(spec, name)} does not hold (the daemon reports no {fact})")
    if spec.disk is not None and not disk_limits():
        found.append(
            f"disk={spec.disk} holds per file only (docker limits a container's disk on overlay2 over xfs mounted "
            "with pquota, btrfs or zfs)"
        )
    if found and spec.limits == "enforce":
        raise SandboxError(f"{'; '.join(found)}. Leave the limit out (None), or say limits='best_effort'")
    return tuple(found)


def _daemon() -> dict[str, Any]:
    key = os.environ.get("DOCKER_HOST", "")
    if key not in _facts:
        _facts[key] = _asking("docker info", client().info)
    return _facts[key]


def disk_limits() -> bool:
    """Whether the daemon can limit what a container writes; tried by making one if its storage might."""
    facts = _daemon()
    if "disk" not in facts:
        backing = dict(each for each in facts.get("DriverStatus", []) if len(each) == 2)
        might = facts.get("Driver") in ("btrfs", "zfs") or backing.get("Backing Filesystem", "").startswith("xfs")
        facts["disk"] = might and _quota_works()
    return facts["disk"]


def _quota_works() -> bool:
    api = client().api
    for image in api.images(quiet=True)[:1]:
        config = api.create_host_config(storage_opt={"size": "100g"})
        try:
            made = api.create_container(image, ["/none"], host_config=config)
        except errors.APIError:
            return False
        api.remove_container(made["Id"], force=True)
        return True
    return True  # no image to try with: the first container tells


def resolve(image: str, label: Label) -> str:
    """A docker image for an image name: local files are imported under the hash of their content."""
    if image == "base":
        return _imported(images.base_key(), hostroot.tar)
    path = images.local_path(image)
    if path is None:
        if not _has(image):
            _asking(f"image {image} could not be pulled", client().images.pull, image)
        return image
    if path.is_file():
        return _imported(f"tar-{images.file_hash(path)}", lambda take: _with_file(path, take))
    if (path / "Dockerfile").is_file():
        return dockerfile.build(path, _Images(label))
    return _imported(f"folder-{images.folder_hash(path)}", lambda take: images.packed(path, take))


def _with_file(path: Path, take: Callable[[IO[bytes]], None]) -> None:
    with path.open("rb") as file:
        take(file)


def _imported(key: str, give: Callable[[Callable[[IO[bytes]], None]], None]) -> str:
    """The image of that key; `give` calls what it is given with the tar to import."""
    tag = f"{LAYERS}{key}"
    if not _has(tag):
        name, _, version = tag.partition(":")

        def take(stream: IO[bytes]) -> None:
            parameters = {"fromSrc": "-", "repo": name, "tag": version, "changes": ['CMD ["/bin/sh"]']}
            api = client().api
            answer = _asking(
                f"image {tag} could not be imported", api._post, api._url("/images/create"), data=stream,
                params=parameters, timeout=None, headers={"Content-Type": "application/tar"},
            )  # fmt: skip
            _asking(f"image {tag} could not be imported", api._result, answer)

        give(take)
        if not _has(tag):
            raise SandboxError(f"image {tag} could not be imported: is it a root file system?")
    return tag


def inspect_image(name: str) -> tuple[str, dict[str, Any]]:
    """(id, env, workdir, user and size) of an image that docker has. Raises SandboxError if it has none."""
    try:
        there = _has(name) or _pulled(name)
    except SandboxError as error:
        raise SandboxError(
            f"image {name!r} is neither host, base, a file or folder, nor in {labels.home()}/images, "
            f"and docker cannot be asked for it ({error})"
        ) from None
    if not there:
        raise SandboxError(f"image {name!r} is no file or folder, and docker neither has it nor can pull it")
    found = _asking(f"image {name}", client().api.inspect_image, name)
    config = found["Config"] or {}
    env = dict(each.split("=", 1) for each in config.get("Env") or [])
    facts = {"env": env, "workdir": config.get("WorkingDir") or None, "user": config.get("User") or ""}
    facts["size"] = found.get("Size", 0)
    return found["Id"].removeprefix("sha256:")[:24], facts


def export(name: str, take: Callable[[IO[bytes]], None]) -> None:
    """Hand the files of an image on, as one tar."""
    api = client().api
    made = _asking(f"image {name}", api.create_container, name, ["/bin/sh"])
    try:
        with api._get(api._url("/containers/{0}/export", made["Id"]), stream=True) as answer:
            answer.raise_for_status()
            take(answer.raw)
    finally:
        api.remove_container(made["Id"], force=True)


class DockerSandbox(RunningSandbox):
    """One container that waits, and execs in it."""

    backend = "docker"

    def __init__(self, spec: SandboxSpec, label: Label) -> None:
        super().__init__(spec, labels.new_id())
        self.label, self.unenforced = label, unenforced(spec)
        self.image = resolve(spec.image, label)
        self._config = inspect_image(self.image)[1]
        self._environment = {**self._environment, **self._config["env"], **spec.env}
        self._workdir = spec.workdir or self._config["workdir"] or "/"
        self._lock, self._closed, self._container = threading.RLock(), False, ""
        self._up()

    def _up(self) -> None:
        api, spec = client().api, self.spec
        options: dict[str, Any] = {
            "network_mode": spec.network, "cap_drop": ["ALL"], "cap_add": CAPABILITIES,
            "security_opt": ["no-new-privileges"], "log_config": {"Type": "none"}, "ipc_mode": "private",
            "ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}], "shm_size": 64 << 20,
        }  # fmt: skip
        facts = _daemon()
        if spec.memory is not None and facts.get("MemoryLimit"):
            options |= {"mem_limit": spec.memory, "memswap_limit": spec.memory}
        if spec.pids is not None and facts.get("PidsLimit"):
            options["pids_limit"] = spec.pids + 4
        if spec.cpus is not None and facts.get("CpuCfsQuota"):
            options["nano_cpus"] = int(spec.cpus * 1e9)
        if spec.disk is not None and disk_limits():
            # btrfs counts all that a container sees, overlay only what it wrote
            shared = self._config["size"] if facts.get("Driver") == "btrfs" else 0
            options["storage_opt"] = {"size": str(spec.disk + shared)}
        elif spec.disk is not None:
            options["ulimits"].append({"Name": "fsize", "Soft": spec.disk, "Hard": spec.disk})
        with self._lock:
            made = _asking(
                f"a container of {self.image} could not be made", api.create_container, self.image,
                entrypoint=["/bin/sh", "-c", FIRST], command=[], name=f"clawrl-{self.id}-{labels.new_id()}",
                hostname="sandbox", labels=self.label.words(), working_dir="/", user="0",
                host_config=api.create_host_config(**options),
            )  # fmt: skip
            self._container = made["Id"]
            try:
                _asking("the container could not be started", api.start, self._container)
                self._make_workdir()
            except BaseException:
                self.close()
                raise

    def reset(self) -> None:
        with self._lock:
            if self._closed:
                raise SandboxError(f"sandbox {self.id} is closed; open another")
            self._down()
            self._up()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._down()

    def _down(self) -> None:
        self._close_shells()
        if self._container:
            with suppress(errors.NotFound):
                _asking("the container could not be removed", _remove, self._container)
            self._container = ""

    def snapshot(self) -> str:
        tag = labels.new_id()
        changes = "\n".join(f'LABEL {name}="{value}"' for name, value in self.label.words().items())
        _asking(
            "the snapshot could not be taken", client().api.commit, self._container, SNAPSHOTS.rstrip(":"), tag,
            changes=changes,
        )  # fmt: skip
        return f"{SNAPSHOTS}{tag}"

    def fork(self) -> DockerSandbox:
        return DockerSandbox(replace(self.spec, image=self.snapshot()), self.label)

    def _start(self, command, env, cwd, *, merge: bool) -> DockerProcess:
        return DockerProcess(self, command, env, cwd, terminal=False, merge=merge)

    def _terminal(self, command, env, cwd, rows: int, columns: int) -> tuple[Process, Resize]:
        process = DockerProcess(self, command, env, cwd, terminal=True, merge=True)

        def resize(rows: int, columns: int) -> None:
            with suppress(SandboxError):
                _asking("resize", client().api.exec_resize, process.exec_id, rows, columns)

        resize(rows, columns)
        return process, resize

    def broken(self, error: SandboxError) -> SandboxError:
        """What to say when docker refuses an exec."""
        if self._closed:
            return SandboxError(f"sandbox {self.id} is closed; open another")
        return SandboxError(f"sandbox {self.id} could not start a process ({error}); reset it")


def _remove(container: str) -> None:
    with suppress(errors.NotFound):
        client().api.remove_container(container, force=True, v=True)


class DockerProcess(Process):
    """One exec. Its first line on stdout is its pid inside, by which it can be ended."""

    def __init__(
        self, sandbox: DockerSandbox, command: Sequence[str], env: Mapping[str, str], cwd: str, *,
        terminal: bool, merge: bool,
    ) -> None:  # fmt: skip
        self._sandbox, self._terminal, self._merge = sandbox, terminal, merge
        words = ["/bin/sh", "-c", f'echo "$$"; exec "$@"{" 2>&1" if merge else ""}', "sh", *command]
        api = client().api
        try:
            made = _asking(
                "exec", api.exec_create, sandbox._container, words, stdin=True, stdout=True, stderr=True,
                tty=terminal, environment=dict(env), workdir=cwd,
            )  # fmt: skip
            self.exec_id = made["Id"]
            answer = _asking("exec", api.exec_start, self.exec_id, tty=terminal, socket=True)
        except SandboxError as error:
            raise sandbox.broken(error) from None
        self._answer = answer
        self._socket: socket.socket = getattr(answer, "_sock", answer)
        self._socket.setblocking(False)
        self._buffer, self._first, self.inner = b"", b"", None
        self._reading, self._writing, self._code = True, True, None
        self._looked, self._late = 0.0, 0.0

    def outputs(self):
        return (self._socket.fileno(),) if self._reading else ()

    def input(self) -> int | None:
        return self._socket.fileno() if self._writing and self._reading else None

    def receive(self, descriptor: int) -> list[tuple[int, bytes]]:
        try:
            data = self._socket.recv(CHUNK)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self._reading = False
            return []
        self._late = time.monotonic()
        pieces = [(1, data)] if self._terminal else self._frames(data)
        if self.inner is None:
            pieces = [piece for each in pieces for piece in self._without_pid(each)]
        return [(1 if self._merge else stream, piece) for stream, piece in pieces]

    def _frames(self, data: bytes) -> list[tuple[int, bytes]]:
        """Docker's multiplexed stream: eight bytes of stream and length, then so many bytes."""
        self._buffer += data
        found = []
        while len(self._buffer) >= 8:
            stream, size = struct.unpack(">BxxxL", self._buffer[:8])
            if len(self._buffer) < 8 + size:
                break
            found.append((stream, self._buffer[8 : 8 + size]))
            self._buffer = self._buffer[8 + size :]
        return found

    def _without_pid(self, piece: tuple[int, bytes]) -> list[tuple[int, bytes]]:
        stream, data = piece
        if stream != 1 or self.inner is not None:
            return [piece]
        self._first += data
        line, newline, rest = self._first.partition(b"\n")
        if not newline:
            return []
        self.inner = int(line) if line.strip().isdigit() else 0
        return [(1, rest)] if self.inner else [(1, self._first)]

    def send(self, data: bytes) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    def close_input(self) -> None:
        if self._writing and not self._terminal:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
        self._writing = False

    def ended(self) -> bool:
        if self._code is None and (not self._reading or time.monotonic() - self._looked > 0.2):
            self._looked = time.monotonic()
            try:
                found = _asking("exec", client().api.exec_inspect, self.exec_id)
            except SandboxError:
                self._code = -1
                return True
            if not found["Running"] and found["ExitCode"] is not None:
                self._code = found["ExitCode"]
                self._late = time.monotonic()
        patience = FIRST_LATE if self.inner is None else LATE
        return self._code is not None and (not self._reading or time.monotonic() > self._late + patience)

    def code(self) -> int | None:
        if self._code == -1:
            raise self._sandbox.broken(SandboxError("it has gone"))
        if self._code is not None and self.inner is None:
            raise self._sandbox.broken(SandboxError(self._first.decode("utf-8", "replace").strip() or "no process"))
        return self._code

    def kill(self) -> None:
        """The daemon tells no other exec's end while a stream that nobody reads is full: it is closed first."""
        if not self.ended():
            deadline = time.monotonic() + KILLING
            while self.inner is None and self._reading and time.monotonic() < deadline:  # it has just been started
                wait_for_one(self, 0.2)
                for descriptor in self.outputs():
                    self.receive(descriptor)
            self.close()
            self._kill("all")

    def kill_below(self) -> None:
        """Beside the caller, who goes on reading."""
        threading.Thread(target=self._kill, args=("below",), daemon=True).start()

    def _kill(self, what: str) -> None:
        """From inside; where no process can be started any more (a fork bomb) all of the container's end."""
        if not self.inner:
            return
        api = client().api
        try:
            made = _asking(
                "kill", api.exec_create, self._sandbox._container, ["/bin/sh", "-c", KILL, "sh", str(self.inner), what]
            )
            _asking("kill", api.exec_start, made["Id"], detach=True)
            done, deadline = False, time.monotonic() + KILLING
            while not done and time.monotonic() < deadline:
                done = not _asking("kill", api.exec_inspect, made["Id"])["Running"]
                time.sleep(0 if done else 0.01)
        except SandboxError:
            done = False
        if not done:
            with suppress(SandboxError):
                _asking("kill", api.kill, self._sandbox._container)

    def close(self) -> None:
        self._reading = self._writing = False
        with suppress(OSError):
            self._socket.close()
        with suppress(OSError, AttributeError):
            self._answer.close()


class _Images:
    """Where a Dockerfile's results are kept; see dockerfile.Keeper."""

    def __init__(self, label: Label) -> None:
        self._label = label

    def identity(self, image: str) -> str:
        return inspect_image(resolve(image, self._label))[0]

    def find(self, key: str) -> str | None:
        return f"{LAYERS}{key}" if _has(f"{LAYERS}{key}") else None

    def open(self, spec: SandboxSpec) -> DockerSandbox:
        return DockerSandbox(spec, self._label)

    def environment(self, sandbox: DockerSandbox) -> tuple[dict[str, str], str]:
        return dict(sandbox._config["env"]), sandbox._config["workdir"] or "/"

    def keep(self, sandbox: DockerSandbox, key: str, env: Mapping[str, str], workdir: str) -> str:
        changes = [f"ENV {name}={_quoted(value)}" for name, value in env.items()]
        changes.append(f"WORKDIR {workdir}")
        name = LAYERS.rstrip(":")
        _asking(
            "the image could not be kept", client().api.commit, sandbox._container, name, key,
            changes="\n".join(changes),
        )  # fmt: skip
        return f"{LAYERS}{key}"


def _quoted(value: str) -> str:
    return '"' + re.sub(r'(["\\$])', r"\\\1", value).replace("\n", " ") + '"'


def reconcile(run: str) -> list[str]:
    """Remove containers and snapshots whose makers, processes of this run on this boot, are dead."""
    return _clear(lambda label: label.run == run and not label.alive())


def remove_snapshots(own: Label) -> None:
    _clear(lambda label: label == own, containers=False)


def _clear(gone: Callable[[Label], bool], *, containers: bool = True) -> list[str]:
    try:
        api = client().api
    except SandboxError:
        return []  # no daemon, nothing of it to remove
    removed, wanted = [], {"label": ["clawrl.run"]}
    if containers:
        for each in _asking("containers", api.containers, all=True, filters=wanted):
            if (label := Label.read(each["Labels"])) is not None and gone(label):
                _asking("containers", _remove, each["Id"])
                removed.append(f"container {each['Names'][0].lstrip('/')}")
    for each in _asking("images", api.images, filters=wanted):
        tags = [tag for tag in each.get("RepoTags") or [] if tag.startswith(SNAPSHOTS)]
        if tags and (label := Label.read(each["Labels"] or {})) is not None and gone(label):
            for tag in tags:
                remove_image(tag)
                removed.append(f"image {tag}")
    return removed


def remove_image(tag: str) -> None:
    with suppress(errors.ImageNotFound):
        client().api.remove_image(tag, noprune=False)
