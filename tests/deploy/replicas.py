"""What is promised of two replicas on one log."""

import os
import re
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor

from load import Writers, searches
from stack import Broken, Report, Stack

CORES_WANTED = 4  # two replicas at full rate, the proxy and the caller


# Sockets in TIME_WAIT, of IPv4.
LEFT_BEHIND = "awk '$4 == \"06\" {n++} END {print n + 0}' /proc/net/tcp"
SUSTAINED_S = 60  # as long as the kernel keeps a port that was used


def replicas(stack: Stack, report: Report) -> None:
    """One and two replicas on one log: throughput, reading what was written, the loss of one."""
    item = stack.first_id()
    _connections(stack, report, item)
    rates: dict[int, list[float]] = {1: [], 2: []}
    spent: dict[int, dict[str, float]] = {1: {}, 2: {}}
    for _ in range(2):
        for count in (1, 2):
            stack.up("--scale", f"service={count}")
            time.sleep(2)  # the proxy asks for the addresses once a second
            before = _cpu_s(stack)
            done, failed, own = searches(stack.port, item, seconds=10, threads=8)
            if failed:
                raise Broken(f"{failed} searches failed with {count} replicas")
            rates[count].append(done / 10)
            spent[count] = {"caller": own} | {
                name: seconds - before.get(name, 0.0) for name, seconds in _cpu_s(stack).items()
            }
    one, two = max(rates[1]), max(rates[2])
    cores = "; ".join(
        f"{count}: " + ", ".join(f"{name} {s / 10:.2f}" for name, s in sorted(spent[count].items()))
        for count in (1, 2)
    )
    report.add(
        "two replicas: searches/s against one",
        f"{two:.0f} against {one:.0f}, {two / one:.2f} times (cores used with {cores})",
        f">= 1.8 times where cores allow: {CORES_WANTED} or more, here {os.cpu_count()}",
        two >= 1.8 * one or (os.cpu_count() or 1) < CORES_WANTED,
    )
    addresses = set(
        re.findall(r'"upstream":"([\d.:]+)"', stack.compose("logs", "proxy")[-200_000:])
    )
    report.add("replicas that answered", str(len(addresses)), "2", len(addresses) >= 2)
    missed = stale = 0
    writes = 100
    for number in range(writes):
        name = f"replicas-{number}.png"
        version = stack.add(name)["gallery_version"]
        try:
            stack.ask("GET", f"/items/{name}")
        except urllib.error.HTTPError:
            stale += 1
        try:
            headers = {"X-Min-Gallery-Version": str(version)}
            stack.ask("GET", f"/items/{name}", headers=headers)
        except urllib.error.HTTPError:
            missed += 1
    report.add(
        "own writes not read with X-Min-Gallery-Version",
        f"{missed} of {writes} (at once and without it: {stale})",
        "0",
        missed == 0,
    )
    worst = 0.0
    with Writers(stack, "stale") as writers:
        for _ in range(20):
            for index in (1, 2):
                worst = max(worst, _staleness_s(stack, index))
    report.add(
        "invprop_gallery_staleness_seconds of both replicas under load, largest of 40",
        f"{worst:.2f} s ({len(writers.acknowledged)} items added meanwhile)",
        "<= 10 s (max_staleness_s)",
        worst <= 10,
    )
    for how in ("post", "get"):
        stack.up("--scale", "service=2")
        with Writers(stack, f"one_of_two_{how}") as writers:
            time.sleep(1)
            stack.inside("service", "kill -9 -1", check=False, index=2)
            done, failed, _ = searches(stack.port, item, seconds=10, threads=2, how=how)
        lost = [name for name in writers.acknowledged if not stack.has(name)]
        report.add(
            f"one of two replicas killed: {how.upper()}s that failed; answered items lost",
            f"{failed} of {done + failed}; {len(lost)} of {len(writers.acknowledged)}",
            "no item lost, no GET failed",
            not lost and (how == "post" or not failed),
        )
    _stopped_one(stack, report, item)
    stack.up("--scale", "service=1")


def _cpu_s(stack: Stack) -> dict[str, float]:
    """CPU seconds of each container so far; cgroup v2 and v1."""
    script = (
        "sed -n 's/usage_usec //p' /sys/fs/cgroup/cpu.stat 2>/dev/null | grep . || "
        "echo $(($(cat /sys/fs/cgroup/cpuacct/cpuacct.usage) / 1000))"
    )
    return {
        name.removeprefix(f"{stack.project}-"): int(
            stack.run("docker", "exec", name, "sh", "-c", script)
        )
        / 1e6
        for name in stack.containers()
    }


def _staleness_s(stack: Stack, index: int) -> float:
    """What a replica says of itself in /metrics."""
    script = (
        "import urllib.request as u\n"
        "print(u.urlopen('http://127.0.0.1:8000/metrics').read().decode())"
    )
    where = ("exec", "-T", "--index", str(index), "service", "python", "-c", script)
    (said,) = re.findall(r"^invprop_gallery_staleness_seconds (\S+)$", stack.compose(*where), re.M)
    return float(said)


def _connections(stack: Stack, report: Report, item: str) -> None:
    """The proxy keeps its connections: one for each request would use up its ports."""
    done, failed, _ = searches(stack.port, item, seconds=SUSTAINED_S, threads=8)
    left = int(stack.inside("proxy", LEFT_BEHIND))
    report.add(
        f"{SUSTAINED_S} s of searches: failed; connections the proxy left behind",
        f"{failed} of {done + failed}; {left}",
        "none; fewer than one for 20 searches",
        not failed and left < done / 20,
    )


def _stopped_one(stack: Stack, report: Report, item: str) -> None:
    """One of two replicas is stopped and started as by an operator: nobody notices."""
    stack.up("--scale", "service=2")
    name = f"{stack.project}-service-2"

    def stop_and_start() -> None:
        time.sleep(3)
        stack.run("docker", "stop", name)
        stack.run("docker", "start", name)

    with ThreadPoolExecutor(1) as beside:
        done_with_it = beside.submit(stop_and_start)
        done, failed, _ = searches(stack.port, item, seconds=30, threads=4)
        done_with_it.result()
    report.add(
        "one of two replicas stopped and started again: POSTs that failed",
        f"{failed} of {done + failed}",
        "0",
        not failed,
    )
