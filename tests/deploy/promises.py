"""What a running stack promises: each function adds what came of it to the report."""

import json
import re
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path

from load import Evaluators, Writers, searches, slow_sockets
from stack import ANSWERS_AGAIN_S, Broken, Report, Stack, query, timed

RUNNING = ("proxy", "service", "worker-cpu", "redis", "postgres")
FLUSH = 'REDISCLI_AUTH="$(cat /run/invprop/redis-password)" redis-cli --no-auth-warning flushall'
# A worker that was killed is missed when its lease ends: 60 s, and 15 s until the next sweep.
ENDED_S = 240.0


def build(stack: Stack, report: Report) -> None:
    """Build both images and say how large they are."""
    took: list[float] = []
    with timed(took):
        stack.compose("build")
    size = ("docker", "image", "inspect", "--format", "{{.Size}}")
    sizes = [
        f"{image} {int(stack.run(*size, image)) / 1e9:.2f} GB"
        for image in ("invprop-service", "invprop-trainer")
    ]
    report.add(
        "build (cached layers are used)",
        f"{took[0]:.0f} s, {', '.join(sizes)}",
        "<= 600 s",
        took[0] <= 600,
    )


def up(stack: Stack, report: Report, what: str, limit_s: float) -> None:
    """Bring the stack up; the first query goes through the proxy."""
    took: list[float] = []
    with timed(took):
        stack.up()
    report.add(what, f"{took[0]:.1f} s", f"<= {limit_s:.0f} s", took[0] <= limit_s)
    with timed(took):
        stack.until_answers()
    report.add(f"first query after {what}", f"{took[1]:.2f} s", "answered", True)


def up_again(stack: Stack, report: Report) -> None:
    """Down and up with the volumes that are there."""
    stack.compose("down", "--timeout", "60")
    up(stack, report, "up, warm: volumes kept", 30)


def contained(stack: Stack, report: Report) -> None:
    """Nobody is root, no root is writable, nothing leads out, one port is published."""
    for service in RUNNING:
        user = stack.inside(service, "id -u").strip()
        report.add(f"{service}: uid", user, "not 0", user != "0")
        wrote = stack.inside(service, "touch /written 2>&1 && echo WRITTEN", check=False)
        report.add(
            f"{service}: root",
            "writable" if "WRITTEN" in wrote else "read-only",
            "read-only",
            "WRITTEN" not in wrote,
        )
        able = stack.inside(service, "grep -E 'CapEff|NoNewPrivs' /proc/self/status").split()
        report.add(
            f"{service}: capabilities, no-new-privileges",
            f"{able[1]}, {able[3]}",
            "0, 1",
            int(able[1], 16) == 0 and able[3] == "1",
        )
    for service in ("secrets", "sample", "train"):
        said = stack.compose("run", "--rm", "-T", "--no-deps", "--entrypoint", "id", service, "-u")
        user = said.split()[-1]
        report.add(f"{service}: uid", user, "not 0", user != "0")
    script = (
        "import socket,sys\ns=socket.socket(); s.settimeout(3)\n"
        "try:\n s.connect(('1.1.1.1', 443)); print('OUT')\nexcept OSError as e: print('no:', e)"
    )
    for service in ("service", "worker-cpu", "redis", "postgres"):
        routes = stack.inside(service, "cat /proc/net/route").splitlines()[1:]
        out = [line for line in routes if line.split()[1] == "00000000"]
        report.add(
            f"{service}: way out of the internal networks",
            f"{len(out)} default routes",
            "none",
            not out,
        )
    for service in ("service", "worker-cpu"):
        said = stack.compose("exec", "-T", service, "python", "-c", script)
        report.add(f"{service}: connect outside", said.strip(), "refused", "OUT" not in said)
    listed = stack.run(
        "docker",
        "ps",
        "--filter",
        f"label=com.docker.compose.project={stack.project}",
        "--format",
        '{{.Label "com.docker.compose.service"}} {{.Ports}}',
    )
    published = [line.split()[0] for line in listed.splitlines() if "->" in line]
    report.add("published by", ", ".join(published), "proxy, once", published == ["proxy"])
    shown = stack.run("docker", "inspect", *stack.containers())
    password = stack.inside("redis", "cat /run/invprop/redis-password")
    report.add(
        "passwords in docker inspect",
        "seen" if password in shown else "none",
        "none",
        password not in shown,
    )
    refused = stack.inside("redis", "redis-cli ping", check=False)
    report.add("redis without a password", refused.strip()[:60], "refused", "NOAUTH" in refused)


def evaluates(stack: Stack, report: Report) -> None:
    """An evaluation from the request to its report, through the proxy."""
    before = stack.ask("GET", "/datasets")["items"]
    names = [each["name"] for each in before]
    report.add("data sets without any configuration", ", ".join(names), "digits", "digits" in names)
    took: list[float] = []
    with timed(took):
        evaluation = stack.evaluate(0)
        ended = stack.until_ended([evaluation], ENDED_S)[evaluation]
    results = (ended.get("report") or {}).get("results", ())
    found = [(each["name"], each["metrics"]["top1"]) for each in results] or ended.get("error")
    report.add(
        "POST /evaluations until its report",
        f"{ended['status']} after {took[0]:.1f} s: {found}",
        "succeeded",
        ended["status"] == "succeeded",
    )
    page = stack.read("GET", f"/evaluations/{evaluation}/report").decode()
    report.add("its page", f"{len(page):,} characters", "HTML", "<html" in page)
    events = stack.read("GET", f"/evaluations/{evaluation}/events").decode()
    report.add("its events", events.strip()[-60:], "the last one: succeeded", "succeeded" in events)
    body = json.dumps({"protocol": "detection", "dataset": "digits"}).encode()
    try:
        stack.ask("POST", "/evaluations", body)
        said = "accepted"
    except urllib.error.HTTPError as error:
        said = f"{error.code} {json.loads(error.read()).get('code')}"
    wanted = "no worker of the queue gpu: refused"
    report.add("an evaluation that wants a GPU", said, wanted, said.startswith(("409", "422")))


def loses(stack: Stack, report: Report, name: str, blow: Callable[[], object]) -> None:
    """Strike the stack under load; nothing that was answered may be missing afterwards."""
    with Writers(stack, name.replace(" ", "_")) as writers, Evaluators(stack) as evaluators:
        evaluators.until_running()
        before = len(writers.acknowledged)
        began = time.monotonic()
        blow()
        stack.until_answers()
        again = time.monotonic() - began
        while (
            len(writers.acknowledged) <= before + 2
            and time.monotonic() - began < 2 * ANSWERS_AGAIN_S
        ):
            time.sleep(0.1)
        writes = time.monotonic() - began
        time.sleep(1)
    for what, seconds in (("searches answered", again), ("changes taken", writes)):
        report.add(
            f"{name}: {what} again",
            f"{seconds:.1f} s",
            f"<= {ANSWERS_AGAIN_S:.0f} s",
            seconds <= ANSWERS_AGAIN_S,
        )
    ended = stack.until_ended(evaluators.accepted, ENDED_S)
    statuses = sorted(each["status"] for each in ended.values())
    report.add(
        f"{name}: accepted evaluations",
        f"{', '.join(statuses)}; the last {time.monotonic() - began:.0f} s after the blow"
        f" (refused meanwhile: {', '.join(evaluators.refused[-3:]) or 0})",
        "all succeeded",
        len(statuses) == len(evaluators.accepted) > 0 and set(statuses) == {"succeeded"},
    )
    stack.up()
    lost = [item for item in writers.acknowledged if not stack.has(item)]
    report.add(
        f"{name}: answered items lost",
        f"{len(lost)} of {len(writers.acknowledged)} (meanwhile refused: {writers.refused or 0})",
        "0",
        not lost and len(writers.acknowledged) > 0,
    )


def losses(stack: Stack, report: Report) -> None:
    """Everything is killed once, Redis forgets all, PostgreSQL is restarted."""
    for service in RUNNING:
        loses(stack, report, f"{service} killed", kill(stack, service))
    loses(stack, report, "postgres restarted", lambda: stack.compose("restart", "postgres"))
    loses(stack, report, "redis flushed", lambda: stack.inside("redis", FLUSH))


def one_loss(stack: Stack, report: Report) -> None:
    """The service is killed."""
    loses(stack, report, "service killed", kill(stack, "service"))


def kill(stack: Stack, service: str) -> Callable[[], object]:
    """SIGKILL to all but the init of a container, which then ends: the engine restarts it."""
    return lambda: stack.inside(service, "kill -9 -1", check=False)


def slow_callers(stack: Stack, report: Report, heads: int = 400, bodies: int = 100) -> None:
    """500 sockets that never finish, from the very address of the honest caller."""
    item = stack.first_id()
    quiet: list[float] = []
    beside: list[float] = []
    failed = 0
    for _ in range(3):
        failed += _honest(stack, item, quiet)
        with slow_sockets(stack.port, heads, bodies):
            failed += _honest(stack, item, beside)
    before, after = (sorted(each)[int(0.99 * len(each))] for each in (quiet, beside))
    report.add(
        f"{heads + bodies} slow sockets at the proxy: p99 of {len(beside)} honest searches",
        f"{1e3 * after:.1f} ms, quiet {1e3 * before:.1f} ms: {after / before:.2f} times",
        "<= 2 times",
        after <= 2 * before,
    )
    report.add("honest searches that failed meanwhile", str(failed), "0", failed == 0)


def _honest(stack: Stack, item: str, took: list[float], seconds: float = 15.0) -> int:
    """20 searches a second; appends their durations, returns how many failed."""
    failed, begin = 0, time.monotonic()
    for number in range(int(20 * seconds)):
        time.sleep(max(0.0, begin + number / 20 - time.monotonic()))
        began = time.monotonic()
        try:
            stack.ask("POST", "/neighbours", query(item))
        except (OSError, ValueError):
            failed += 1
        took.append(time.monotonic() - began)
    return failed


def replicas(stack: Stack, report: Report) -> None:
    """One and two replicas on one log: throughput, reading what was written, the loss of one."""
    item = stack.first_id()
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
        ">= 1.8 times where cores allow",
        True,
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


def upgrade(stack: Stack, report: Report) -> None:
    """Train a second bundle and take it over while the service runs."""
    before = stack.ask("GET", "/info")
    took: list[float] = []
    with timed(took):
        stack.compose(
            "run",
            "--rm",
            "-T",
            "train",
            "--data",
            "digits",
            "--output",
            "/bundles/second",
            "epochs=4",  # with the seed of the first: the same digits are held out
            "loss.warmup_epochs=1",
        )
    report.add("train: a second bundle, 4 epochs of digits", f"{took[0]:.0f} s", "exported", True)
    _link_current(stack, "second/bundle")
    count = before["gallery"]["items"]
    stack.compose("kill", "--signal", "HUP", "service")
    began = time.monotonic()
    failures = 0
    while time.monotonic() - began < 180:
        try:
            info = stack.ask("GET", "/info")
            if info["model"] != before["model"]:
                break
            if info["gallery"]["switch"].get("state") == "refused":
                raise Broken(f"the second bundle was refused: {info['gallery']['switch']}")
        except OSError:
            failures += 1
        time.sleep(0.2)
    else:
        raise Broken(f"the second bundle was not taken over: {info['gallery']}")
    report.add(
        "upgrade by SIGHUP: the new model answers",
        f"{time.monotonic() - began:.1f} s, {failures} failed requests",
        "no failed request",
        failures == 0,
    )
    after = info["gallery"]["items"]
    report.add("upgrade: items", f"{count} -> {after}", "kept", count == after)
    evaluation = stack.evaluate(1)
    ended = stack.until_ended([evaluation], ENDED_S)[evaluation]
    report.add(
        "upgrade: an evaluation of the new model",
        ended["status"],
        "succeeded",
        ended["status"] == "succeeded",
    )
    # Back to the first one, by a service that was stopped before it could.
    stack.compose("stop", "service")
    _link_current(stack, "sample/bundle")
    where = ("run", "--rm", "-T", "--no-deps", "service")
    said = stack.run("timeout", "60", "docker", "compose", *where, check=False)
    wanted = "python -m service.switch"
    lines = [line.strip() for line in said.splitlines() if wanted in line] or [said]
    report.add("a bundle that is not the gallery's", lines[-1][-200:], wanted, wanted in said)
    switch = ("python", "-m", "service.switch", "--bundle", "/bundles/current")
    stack.compose(*where, *switch)
    stack.up()
    info = stack.ask("GET", "/info")
    report.add(
        "back to the first bundle by service.switch",
        f"{after} -> {info['gallery']['items']} items",
        "the first model, all items",
        info["model"] == before["model"] and info["gallery"]["items"] == after,
    )


def _link_current(stack: Stack, bundle: str) -> None:
    """Let `current` lead to another bundle; an expression of the shell."""
    script = f"cd /bundles && ln -sfn {bundle} current"
    what = ("--entrypoint", "sh", "train", "-c", script)
    stack.compose("run", "--rm", "-T", "--no-deps", *what)


def backup(stack: Stack, report: Report, folder: Path) -> None:
    """Back up under load, lose everything, restore, compare everything."""
    took: list[float] = []
    with Writers(stack, "backup") as writers:
        time.sleep(1)
        before = list(writers.acknowledged)
        with timed(took):
            stack.run("./deploy/backup", str(folder / "under-load"))
    report.add(
        "deploy/backup under load",
        f"{took[0]:.1f} s, {len(writers.acknowledged) - len(before)} items added meanwhile",
        "made",
        True,
    )
    # `current` leads to a bundle that was not taken over: it is not the gallery's.
    _link_current(stack, "$([ -e second ] && echo second/bundle || echo sample/bundle)")
    with timed(took):
        stack.run("./deploy/backup", str(folder / "backup"))
    _link_current(stack, "sample/bundle")
    report.add("deploy/backup", f"{took[1]:.1f} s", "made", True)
    source = stack.items()
    stack.compose("down", "--volumes", "--timeout", "60")
    with timed(took):
        stack.run("./deploy/restore", str(folder / "backup"))
    report.add("deploy/restore into an empty stack, healthy", f"{took[2]:.1f} s", "made", True)
    restored = stack.items()
    same = source == restored
    report.add(
        "restored = source: ids, vectors, metadata",
        f"{len(restored)} of {len(source)} items, {'equal' if same else 'DIFFERENT'}",
        "equal",
        same,
    )
    said = stack.run("./deploy/restore", str(folder / "backup"), check=False).strip()
    wanted = "the service is running"
    report.add("deploy/restore over a running stack", said[-120:], wanted, wanted in said)
    stack.compose("stop", "service", "worker-cpu")
    said = stack.run("./deploy/restore", str(folder / "under-load"), check=False).strip()
    wanted = "nothing was restored"
    report.add("deploy/restore over a gallery", said[-160:], wanted, wanted in said)
    stack.up()
    kept = stack.items()
    report.add("and what was there", f"{len(kept)} items", "as before", kept == restored)
    stack.compose("down", "--volumes", "--timeout", "60")
    stack.run("./deploy/restore", str(folder / "under-load"))
    missing = [name for name in before if not stack.has(name)]
    report.add(
        "backup under load: items answered before it that are missing",
        f"{len(missing)} of {len(before)}",
        "0",
        not missing and bool(before),
    )
