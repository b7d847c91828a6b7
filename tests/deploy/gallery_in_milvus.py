"""What is promised of the overlay deploy/compose.milvus.yaml, and of moving there."""

import json
import os
import time
from pathlib import Path

from bad_input import GIVEN, line_of, other_stack, overlay_file
from losses import kill, loses
from stack import ENDED_S, ROOT, Report, Stack

OVERLAY = f"{ROOT}/deploy/compose.milvus.yaml"
LITE = "invprop-test-milvus-lite"
MOVE = 'python -m service.migrate --from "$INVPROP_DATABASE" --to "$INVPROP_GALLERY"'


def milvus(report: Report, folder: Path) -> None:
    """A gallery moves from PostgreSQL to Milvus and is served from there."""
    with other_stack() as other:
        other.environment["COMPOSE_FILE"] += f":{overlay_file(folder / 'given.yml', GIVEN)}"
        other.up()
        for number in range(20):
            other.add(f"before-{number}.png")
        before = other.items()
        other.compose("stop", "service")
        _overlay(other, report)
        other.up("milvus")
        began = time.monotonic()
        where = ("run", "--rm", "-T", "--no-deps", "--entrypoint", "with-secrets", "service")
        other.compose(*where, "sh", "-c", f"{MOVE} --without-pictures")
        other.up()
        other.until_answers()
        report.add(
            "Milvus: service.migrate from PostgreSQL, and served",
            f"{time.monotonic() - began:.1f} s, {other.ask('GET', '/info')['gallery']['database']}",
            "milvus",
            "milvus" in str(other.ask("GET", "/info")["gallery"]["database"]).lower(),
        )
        after = other.items()
        report.add(
            "Milvus: moved = source: ids, vectors, metadata",
            f"{len(after)} of {len(before)} items, {'equal' if after == before else 'DIFFERENT'}",
            "equal",
            after == before,
        )
        evaluation = other.evaluate(0)
        ended = other.until_ended([evaluation], ENDED_S)[evaluation]["status"]
        report.add("Milvus: an evaluation beside it", ended, "succeeded", ended == "succeeded")
        said = other.run("./deploy/backup", str(folder / "of-milvus"), check=False)
        line_of(report, "deploy/backup of a gallery in Milvus", said, "with Milvus' own tools")
        for service in ("service", "milvus"):
            loses(other, report, f"gallery in Milvus, {service} killed", kill(other, service))


def _overlay(stack: Stack, report: Report) -> None:
    """Add the overlay, with milvus-lite where Milvus' own image cannot be had."""
    stack.environment["COMPOSE_FILE"] += f":{OVERLAY}"
    stack.environment["COMPOSE_PROFILES"] = "milvus"
    shown = json.loads(stack.compose("config", "--format", "json"))
    image = shown["services"]["milvus"]["image"]
    if not stack.run("docker", "images", "--quiet", image).strip():
        said = stack.run("docker", "pull", "--quiet", image, check=False).strip()
        if not stack.run("docker", "images", "--quiet", image).strip():
            report.leave_out(image, f"no image, milvus-lite in its place: {said[-160:]}")
            stack.environment["INVPROP_MILVUS_IMAGE"] = _lite(stack)


def _lite(stack: Stack) -> str:
    """Build the image of milvus-lite; its name."""
    secrets = [
        f"--secret=id={name},src={path}"
        for name, path in (
            ("pip_conf", os.environ.get("PIP_CONF_FILE", "")),
            ("ca_bundle", os.environ.get("CA_BUNDLE_FILE", "")),
        )
        if path
    ]
    here = Path(__file__).parent
    file = ("--file", str(here / "milvus_lite.Dockerfile"))
    stack.run("docker", "build", "--quiet", *secrets, "--tag", LITE, *file, str(here))
    return LITE
