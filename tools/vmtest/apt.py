"""Debian packages of any suite, without touching this machine's own package state.

apt-get runs with its state, cache and sources in our cache directory, and against an empty dpkg status, so
nothing is installed and nothing of the machine's own lists changes. The archive's address is the one this
machine uses. Every file is checked against the SHA-256 of apt's signed index when it is fetched and again
whenever it is used.

Rejected: downloading by URL (the address would be ours to keep right, and no signature is checked).
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vmtest.cache import kernels_dir, sha256
from vmtest.errors import VmtestError

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
SUITES = ("bookworm", "trixie", "sid")


@dataclass(frozen=True)
class Package:
    """One downloaded package."""

    name: str
    version: str
    sha256: str
    file: Path


def _run(command: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise VmtestError(
            f"{command[0]} is not here: kernels come from Debian packages through apt"
        ) from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise VmtestError(f"{command[0]} failed: {said[-1] if said else 'no message'}")
    return done.stdout


def _archives() -> tuple[str, str | None]:
    # (main archive, security archive) as this machine's own sources name them.
    main = security = None
    for line in _run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(SUITE)"]).splitlines():
        uri, _, suite = line.partition(" ")
        name = uri.rstrip("/").rsplit("/", 1)[-1]
        if name == "debian-security":
            security = uri
        elif name == "debian" and "-" not in suite:
            main = uri
    if main is None:
        raise VmtestError("this machine's apt sources name no Debian archive: run apt-get update first")
    return main, security


class Apt:
    """apt with a root of its own, for one set of suites."""

    def __init__(self, suites: tuple[str, ...] = SUITES) -> None:
        self.root = kernels_dir() / ("apt-" + "-".join(suites))
        self._suites = suites
        self._options = [
            f"-oDir::State={self.root}/state",
            f"-oDir::Cache={self.root}/cache",
            f"-oDir::Etc::sourcelist={self.root}/sources.list",
            "-oDir::Etc::sourceparts=/dev/null",
            "-oDir::State::status=/dev/null",
            "-oAPT::Sandbox::User=",
            "-oAPT::Architecture=amd64",
            "-oAPT::Install-Recommends=false",
            "-qq",
        ]

    def update(self) -> None:
        """Fetches the package lists anew."""
        for sub in ("state/lists/partial", "cache/archives/partial"):
            (self.root / sub).mkdir(parents=True, exist_ok=True)
        main, security = _archives()
        signed = f"[signed-by={KEYRING}]" if Path(KEYRING).exists() else ""
        lines = []
        for suite in self._suites:
            lines.append(f"deb {signed} {main} {suite} main")
            if suite != "sid":
                lines.append(f"deb {signed} {main} {suite}-updates main")
                if security:
                    lines.append(f"deb {signed} {security} {suite}-security main")
        (self.root / "sources.list").write_text("\n".join(lines) + "\n")
        _run(["apt-get", *self._options, "update"])

    def names(self, pattern: str) -> list[str]:
        """Names of packages that match `pattern` (whole name), oldest version first."""
        found = _run(["apt-cache", *self._options, "pkgnames"]).split()
        return sorted((n for n in found if re.fullmatch(pattern, n)), key=natural)

    def closure(self, name: str) -> list[str]:
        """`name=version` of a package and all it depends upon."""
        lines = _run(["apt-get", *self._options, "--simulate", "install", name]).splitlines()
        found = (re.match(r"Inst (\S+) \((\S+)", line) for line in lines)
        return [f"{m[1]}={m[2]}" for m in found if m]

    def _about(self, names: list[str]) -> list[dict[str, str]]:
        # In one go: each start of apt-cache reads all of the lists.
        text = _run(["apt-cache", *self._options, "show", "--no-all-versions", *names])
        records = [
            dict(line.split(": ", 1) for line in record.splitlines() if re.match(r"[\w-]+: ", line))
            for record in text.strip().split("\n\n")
        ]
        if len(records) != len(names):
            raise VmtestError(f"apt-cache knows {len(records)} of {len(names)} packages: run it once more")
        return records

    def download(self, names: list[str], into: Path) -> list[Package]:
        """Downloads packages (`name` or `name=version`) into a directory; returns them with their hashes."""
        into.mkdir(parents=True, exist_ok=True)
        _run(["apt-get", *self._options, "download", *names], cwd=into)
        done = []
        for about in self._about(names):
            file = into / (
                f"{about['Package']}_{about['Version'].replace(':', '%3a')}_{about['Architecture']}.deb"
            )
            if not file.exists() or sha256(file) != about["SHA256"]:
                raise VmtestError(f"{file.name} does not match the archive's hash: remove it and fetch again")
            done.append(Package(about["Package"], about["Version"], about["SHA256"], file))
        return done


def natural(text: str) -> list[tuple[int, str]]:
    """Sort key that orders 6.9 before 6.12."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", text)]


def unpack(package: Path, into: Path) -> None:
    """Unpacks a package's files; nothing is installed, no script of it runs."""
    into.mkdir(parents=True, exist_ok=True)
    _run(["dpkg-deb", "-x", str(package), str(into)])
