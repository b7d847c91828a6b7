"""What is promised of the start, of the containers, and of an evaluation."""

import json
import urllib.error

from stack import ENDED_S, RUNNING, Report, Stack, timed


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
