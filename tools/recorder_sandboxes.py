"""Record inside real sandboxes, by runc: what works there, what is said of the rest, and do doctor's fixes help?

  python tools/recorder_sandboxes.py      (as root, with runc, golang-github-containers-common and systemd installed;
                                           exit code 1 where something does not hold)

Docker's and podman's default profile comes from the file that podman installs, with bpf and perf_event_open tied to
CAP_BPF and CAP_PERFMON as moby has them; then with the capabilities that doctor advises. A systemd unit is its filter
(`systemd-analyze syscall-filter @system-service`), a root without capabilities, no new privileges.
In each: doctor, `run`, and `attach` to a program of the same sandbox, which must end with 0 and untraced.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PROFILE = Path("/usr/share/containers/seccomp.json")
CAPS = [
    *(
        "CHOWN",
        "DAC_OVERRIDE",
        "FSETID",
        "FOWNER",
        "MKNOD",
        "NET_RAW",
        "SETGID",
        "SETUID",
        "SETFCAP",
        "SETPCAP",
    ),
    *("NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
]
TIED = {"bpf": "BPF", "perf_event_open": "PERFMON"}
ALLOW = "SCMP_ACT_ALLOW"
INSIDE = """
cd /tmp; P="$PYTHON -m pagelens.cli.main"
$P doctor --format json >doctor.json 2>/dev/null; cat doctor.json | tr '\\n' ' '; echo
$P run -q -c a.plens --summary-json a.json -- /usr/bin/python3 -c 'print(len(bytes(99)))' >out 2>err
echo "$? $(cat out)"
cat a.json 2>/dev/null | tr '\\n' ' '; echo
/usr/bin/python3 -c '
import time
x = []
for i in range(300): x.append(bytearray(b"1") * 200000); time.sleep(0.01); x[:-50] = []
' & T=$!; sleep 0.3
$P attach $T -q --duration 1 -c b.plens --summary-json b.json >/dev/null 2>err; echo $?
cat b.json 2>/dev/null | tr '\\n' ' '; echo
grep TracerPid /proc/$T/status; wait $T; echo $?
"""


def docker(caps: list[str]) -> dict[str, Any]:
    """The profile for a container with these capabilities, as dockerd works it out."""
    profile = json.loads(PROFILE.read_text())
    have = {f"CAP_{c}" for c in caps}
    rules: list[dict[str, Any]] = [{"names": [n], "action": ALLOW} for n, cap in TIED.items() if cap in caps]
    for rule in profile["syscalls"]:
        need, without = rule.get("includes", {}), rule.get("excludes", {})
        if not set(need.get("caps", ())) <= have or set(without.get("caps", ())) & have:
            continue
        if "amd64" not in need.get("arches", ["amd64"]) or "amd64" in without.get("arches", ()):
            continue
        names = [n for n in rule["names"] if n not in TIED]
        if names:
            kept = {key: rule[key] for key in ("action", "errnoRet") if rule.get(key) is not None}
            args = [
                {k: a[k] for k in ("index", "value", "valueTwo", "op") if k in a}
                for a in rule.get("args") or ()
            ]
            rules.append({"names": names, **kept, **({"args": args} if args else {})})
    return {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "syscalls": rules}


def systemd() -> dict[str, Any]:
    """SystemCallFilter=@system-service."""
    names: set[str] = set()
    groups = ["@system-service", "@default"]
    for group in groups:
        done = subprocess.run(
            ["systemd-analyze", "syscall-filter", group], capture_output=True, text=True, check=True
        )
        words = [line.strip() for line in done.stdout.splitlines()[1:] if line.startswith("    ")]
        groups += [w for w in words if w.startswith("@") and w not in groups]
        names |= {w for w in words if w[:1].isalpha()}
    # runc itself starts the program under the filter.
    rules = [{"names": sorted(names | {"execve", "capset", "setgroups"}), "action": ALLOW}]
    return {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "syscalls": rules}


def inside(work: Path, name: str, filter_: dict[str, Any], caps: list[str]) -> list[str]:
    """What INSIDE prints there."""
    (work / "config.json").unlink(missing_ok=True)
    subprocess.run(["runc", "spec"], cwd=work, check=True)
    config = json.loads((work / "config.json").read_text())
    process = config["process"]
    env = [f"PYTHON={sys.executable}", f"PYTHONPATH={ROOT / 'src'}", "HOME=/tmp", "PATH=/usr/bin:/bin"]
    process |= {"terminal": False, "cwd": "/tmp", "env": env, "args": ["sh", "-c", INSIDE]}
    process["noNewPrivileges"] = not caps
    process["capabilities"] = {k: [f"CAP_{c}" for c in caps] for k in ("bounding", "effective", "permitted")}
    process.pop("rlimits", None)
    config["root"] = {"path": str(work / "root"), "readonly": True}
    mounts = [m for m in config["mounts"] if m["destination"] != "/sys/fs/cgroup"]
    for path in {str(ROOT), str(Path(sys.executable).parents[1]), str(Path(sys.base_prefix))}:
        mounts.append({"destination": path, "type": "bind", "source": path, "options": ["rbind", "ro"]})
    mounts.append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]})
    config["mounts"] = mounts
    config["linux"] |= {"seccomp": {"architectures": ["SCMP_ARCH_X86_64"], **filter_}, "resources": {}}
    config["linux"]["namespaces"] = [n for n in config["linux"]["namespaces"] if n["type"] != "cgroup"]
    (work / "config.json").write_text(json.dumps(config))
    run = f"mount --bind / {work}/root && exec runc run pagelens-{os.getpid()}-{name}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", run], cwd=work, capture_output=True, text=True, timeout=120, check=False
    )
    if len(done.stdout.splitlines()) < 7:
        raise SystemExit(f"{name}: {done.stdout[-500:]} {done.stderr[-1000:]}")
    return done.stdout.splitlines()


def main() -> int:
    """All sandboxes."""
    bad = 0
    docked = {"": [], "PERFMON": ["PERFMON"], "BPF PERFMON": ["BPF", "PERFMON"]}
    trials = [(f"docker {more}".strip(), docker(CAPS + add), CAPS + add) for more, add in docked.items()]
    trials.append(("systemd", systemd(), []))
    with tempfile.TemporaryDirectory(prefix="pagelens-sandbox-") as name:
        work = Path(name)
        work.chmod(0o755)
        (work / "root").mkdir()
        for sandbox, filter_, caps in trials:
            said = inside(work, sandbox.replace(" ", "-"), filter_, caps)
            doctor = {row["capability"]: row for row in json.loads(said[0])}
            wrong = [c for c, row in doctor.items() if row["status"] != "yes" and not row["fix"]]
            wrong += [c for c, row in doctor.items() if row["fix"].startswith("run pagelens as root")]
            if said[1].split() not in (["0", "99"], ["3", "99"]) or said[-2:] != ["TracerPid:\t0", "0"]:
                wrong.append(f"{said[1]}; {said[-2:]}")
            for what, text in (("run", said[2]), ("attach", said[4])):
                faults = json.loads(text)["faults"]
                seen = faults["recorded"] + faults["gup"] + faults["lost"] + faults["kernel_mode_unseen"]
                if faults["unexplained"] or seen != faults["counted_minor"] + faults["counted_major"]:
                    wrong.append(f"{what}: {faults}")
                if sandbox == "docker BPF PERFMON" and (faults["lost"] or faults["kernel_mode_unseen"]):
                    wrong.append(f"{what} is not complete: {faults}")
                words = ", ".join(
                    f"{faults[k]:,} {k}" for k in ("recorded", "gup", "lost", "kernel_mode_unseen")
                )
                print(f"{sandbox}: {what}: {words}; {json.loads(text)['method']}")
            have = " ".join(
                c for c in ("ptrace", "perf-own", "perf-kernel", "bpf") if doctor[c]["status"] == "yes"
            )
            print(f"{sandbox}: works: {have or 'counters'}: {'; '.join(wrong) or 'holds'}")
            bad |= bool(wrong)
    return bad


if __name__ == "__main__":
    sys.exit(main())
