"""What is promised of another bundle, of backup and of restore."""

import base64
import time
from pathlib import Path

from load import Writers
from stack import ENDED_S, Broken, Report, Stack, picture, timed

PHOTOS = 64
SMALL = (
    *("epochs=2", "loss.warmup_epochs=1", "batch_size=16"),
    *("encoder.backbone=small", "encoder.image_size_px=32"),
)


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


def own_images(stack: Stack, report: Report, folder: Path) -> None:
    """From the built-in sample to a bundle of the operator's own images, as the README says it."""
    where = folder / "photos"
    where.mkdir()
    for number in range(PHOTOS):
        name = where / f"{number:03d}.png"
        name.write_bytes(base64.b64decode(picture(f"photo {number}")))
        name.chmod(0o644)
    stack.add("kept.png")
    before = stack.ask("GET", "/info")
    train = ("folder", "--data", "/data", "--output", "/bundles/photos", *SMALL)
    mount = ("--volume", f"{where}:/data:ro")
    _stopped(stack, report, mount, train)
    stack.compose("run", "--rm", "-T", *mount, "train", *train)
    _link_current(stack, "photos/bundle")
    stack.compose("kill", "--signal", "HUP", "service")
    began = time.monotonic()
    said: dict[str, str] = {}
    while said.get("state") != "refused" and time.monotonic() - began < 60:
        time.sleep(0.2)
        said = stack.ask("GET", "/info")["gallery"]["switch"]
    wanted = "--drop-missing"
    report.add(
        "own images: SIGHUP while the gallery is the sample's",
        f"{said.get('state')}: {said.get('reason', '')[-200:]}",
        f"refused, names {wanted}",
        said.get("state") == "refused" and wanted in said["reason"],
    )
    for bundle in ("photos/bundle", "sample/bundle"):
        stack.compose("stop", "service")
        _link_current(stack, bundle)
        switch = ("python", "-m", "service.switch", "--bundle", "/bundles/current", wanted)
        done = stack.compose("run", "--rm", "-T", "--no-deps", "service", *switch)
        stack.up()
        info = stack.ask("GET", "/info")
        is_sample = info["model"] == before["model"]
        report.add(
            f"own images: service.switch --drop-missing to {bundle}",
            done.strip().splitlines()[-1],
            "the new model, the added picture kept",
            is_sample == (bundle == "sample/bundle") and stack.has("kept.png"),
        )
        own = stack.has("000.png")
        report.add(
            f"own images: in the gallery with {bundle}",
            str(own),
            str(not is_sample),
            own != is_sample,
        )


def _stopped(stack: Stack, report: Report, mount: tuple[str, str], train: tuple[str, ...]) -> None:
    """A training that is stopped saves first, says where, and can go on."""
    name = f"{stack.project}-stopped"
    for processes, resume in (("1", ()), ("1", ("--resume",)), ("2", ())):
        options = ("--detach", "--name", name, "--env", f"INVPROP_TRAIN_PROCESSES={processes}")
        long = ("epochs=100000", "--output", f"/bundles/stopped-{processes}", *resume)
        stack.compose("run", *options, *mount, "train", *train, *long)
        began = time.monotonic()
        while "epoch 1" not in stack.run("docker", "logs", name):  # or 10, or 1234
            if time.monotonic() - began > 120:
                raise Broken(f"no epoch was ended: {stack.run('docker', 'logs', name)[-2000:]}")
            time.sleep(0.5)
        stack.run("docker", "stop", name)
        said = stack.run("docker", "logs", name).strip().splitlines()[-1]
        code = stack.run("docker", "inspect", "--format", "{{.State.ExitCode}}", name).strip()
        stack.run("docker", "rm", name)
        report.add(
            f"train{' --resume' if resume else ''}, stopped, processes: {processes}",
            f"exit code {code}: {said}",
            "143, the state is saved",
            code == "143" and said.startswith("stopped; the state is in"),
        )


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


def _link_current(stack: Stack, bundle: str) -> None:
    """Let `current` lead to another bundle; an expression of the shell."""
    script = f"cd /bundles && ln -sfn {bundle} current"
    what = ("--entrypoint", "sh", "train", "-c", script)
    stack.compose("run", "--rm", "-T", "--no-deps", *what)
