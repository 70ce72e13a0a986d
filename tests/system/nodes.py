"""Nodes on one machine: each a set of namespaces with its own address, host name, processes and sshd.

    with cluster(["node-a", "node-b"], tmp_path) as (login, nodes):
        login.run("ssh", "node-a", "hostname", "-I")
        nodes["node-b"].cut()

They share the file system, as the nodes of a cluster share the folder of a run, and nothing else. `login` holds the
switch between them. Everything lives in namespaces of child processes and goes with them, however the test ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")

SSHD = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PidFile none
MaxStartups 100
"""
# A node that is cut off answers no more, and says so to nobody: without the two last lines ssh would wait for ever.
SSH = """
IdentityFile {folder}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
ConnectTimeout 5
ServerAliveInterval 2
ServerAliveCountMax 3
"""
BOOT = """
mount -t tmpfs tmpfs /run && mkdir /run/sshd
mount -t tmpfs tmpfs /dev/shm
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/ssh_config" /etc/ssh/ssh_config
hostname "$2"
ip link set lo up
exec "$3" -D -e -f "$1/sshd_config"
"""


@dataclass(frozen=True)
class Node:
    """One node; `pid` is its first process, as its maker sees it."""

    name: str
    address: str
    pid: int
    switch: int | None  # the process in whose network the other end of its cable is

    def words(self, *words: object) -> list[str]:
        """The command that runs `words` on this node, in the repository's root."""
        return ["nsenter", f"--target={self.pid}", *NAMESPACES, f"--wd={ROOT}", *map(str, words)]

    def run(self, *words: object, timeout: float = 300, **options) -> subprocess.CompletedProcess[str]:
        """Run a command here; status and both outputs."""
        return subprocess.run(self.words(*words), capture_output=True, text=True, timeout=timeout, **options)

    def cut(self) -> None:
        """Pull the network cable: packets vanish, nobody is told."""
        self._link("down")

    def mend(self) -> None:
        """Plug it in again."""
        self._link("up")

    def _link(self, state: str) -> None:
        subprocess.run([*_network(self.switch), "ip", "link", "set", self.name, state], check=True)

    def kill(self) -> None:
        """All its processes die at once."""
        os.kill(self.pid, signal.SIGKILL)


def missing() -> str | None:
    """Why no such nodes can be built here; None where they can."""
    if os.geteuid() != 0:
        return "nodes are made of namespaces and run sshd: needs root"
    packages = {"ip": "iproute2", "unshare": "util-linux", "sshd": "openssh-server", "ssh": "openssh-client"}
    for command, package in packages.items():
        if shutil.which(command, path=_PATH) is None:
            return f"nodes need the command {command} (Debian: {package})"
    tried = subprocess.run(
        [*_unshare(), "ip", "link", "add", "switch", "type", "bridge"], capture_output=True, text=True
    )
    return f"namespaces are not permitted here: {tried.stderr.strip()}" if tried.returncode else None


@contextmanager
def cluster(names: Sequence[str], folder: Path) -> Iterator[tuple[Node, dict[str, Node]]]:
    """A login node and the nodes `names`, which reach one another by name through ssh; gone at the end of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    addresses = {name: f"10.77.0.{number}" for number, name in enumerate(["login", *names], 1)}
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in addresses.items()))
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)

    with ExitStack() as stack:
        login = Node("login", addresses["login"], stack.enter_context(_booted("login", folder)), None)
        network = [*_network(login.pid), "ip"]
        for words in ("link add switch type bridge", f"addr add {login.address}/24 dev switch", "link set switch up"):
            subprocess.run([*network, *words.split()], check=True)
        nodes = {}
        for name in names:
            pid = stack.enter_context(_booted(name, folder))
            nodes[name] = node = Node(name, addresses[name], pid, login.pid)
            cable = f"link add {name} type veth peer name eth0 netns {pid}"
            for words in (cable, f"link set {name} master switch", f"link set {name} up"):
                subprocess.run([*network, *words.split()], check=True)
            for words in (f"addr add {node.address}/24 dev eth0", "link set eth0 up"):
                subprocess.run([*_network(pid), "ip", *words.split()], check=True)
        for name in names:
            _await(lambda name=name: login.run("ssh", name, "true").returncode == 0, f"{name} answers no ssh")
        yield login, nodes


@contextmanager
def _booted(name: str, folder: Path) -> Iterator[int]:
    """The first process of a new node: its sshd, which everything that runs on it descends from."""
    words = [*_unshare(), "sh", "-euc", BOOT, "boot", folder, name, shutil.which("sshd", path=_PATH)]
    with open(folder / f"{name}.log", "w") as log:
        boot = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    children = Path(f"/proc/{boot.pid}/task/{boot.pid}/children")
    try:
        _await(lambda: children.read_text() != "", f"{name} did not start")
        yield int(children.read_text())
    finally:
        for child in children.read_text().split():
            os.kill(int(child), signal.SIGKILL)  # the first process, and so all of the node; unshare buries it
        boot.wait()


def _unshare() -> list[str]:
    # Whoever dies first, the test or unshare, takes the node along.
    alone = [*NAMESPACES, "--fork", "--mount-proc", "--kill-child"]
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *alone]


def _network(pid: int | None) -> list[str]:
    return ["nsenter", f"--target={pid}", "--net"]


def _await(holds, otherwise: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(0.05)


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
