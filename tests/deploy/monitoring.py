"""What is promised of the profile `monitoring`."""

import json
import time
import urllib.error
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from stack import ROOT, Broken, Report, Stack, picture

DASHBOARD = ROOT / "deploy/monitoring/grafana/dashboards/invprop.json"


def monitoring(stack: Stack, report: Report) -> None:
    """Prometheus finds the service, every panel has data, an alert fires and ends; Grafana."""
    if not _is_at_hand(stack, report, "prometheus"):
        return
    stack.up("prometheus")
    up = _until(lambda: _values(stack, 'up{job="service"}') == [1.0], 60)
    report.add("Prometheus: the service is found and asked", f"{up:.1f} s", "<= 60 s", up <= 60)
    _until(lambda: all(rule["health"] == "ok" for rule in _rules(stack)), 30)  # each 10 s
    rules = _rules(stack)
    bad = [rule["name"] for rule in rules if rule["health"] != "ok"]
    report.add("Prometheus: alert rules", f"{len(rules)}, broken: {bad or 0}", "0", not bad)
    _panels(stack, report)
    stack.compose("stop", "service")
    fires = _until(lambda: "ServiceAway" in _firing(stack), 120)
    stack.up()
    ends = _until(lambda: "ServiceAway" not in _firing(stack), 120)
    report.add(
        "alert ServiceAway: fires once the service is stopped, ends when it is back",
        f"{fires:.0f} s, {ends:.0f} s",
        "<= 120 s each",
        max(fires, ends) <= 120,
    )
    _grafana(stack, report)
    stack.compose("--profile", "monitoring", "rm", "--stop", "--force", "prometheus", "grafana")


def _panels(stack: Stack, report: Report) -> None:
    """Every expression of the dashboard gives a series while there is traffic."""
    expressions = list(_expressions())
    empty = expressions
    began = time.monotonic()
    number = 0
    while empty and time.monotonic() - began < 120:
        for _ in range(10):
            number += 1
            stack.add(f"panel-{number}.png")
            stack.search()
            body = json.dumps({"images": [picture(f"panel {number}")]}).encode()
            stack.ask("POST", "/embed", body)
            try:
                stack.ask("GET", "/items/no-such-item")
            except urllib.error.HTTPError as error:
                if error.code != 404:
                    raise
        time.sleep(2)
        empty = [each for each in expressions if not _values(stack, each)]
    report.add(
        "dashboard: expressions that give no series under load",
        f"{len(empty)} of {len(expressions)}: {empty[:3] or 'none'}",
        "0",
        not empty,
    )


def _expressions() -> Iterator[str]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def _grafana(stack: Stack, report: Report) -> None:
    """Behind the proxy, with the dashboard in it."""
    if not _is_at_hand(stack, report, "grafana"):
        return
    stack.up("grafana")
    health = stack.ask("GET", "/grafana/api/health")
    report.add("Grafana behind the proxy", str(health), "database ok", health["database"] == "ok")
    script = (
        "curl -s -u admin:$(cat /run/invprop/grafana-password) "
        "http://127.0.0.1:3000/grafana/api/search"
    )
    found = [each["title"] for each in json.loads(stack.inside("grafana", script))]
    report.add("Grafana: dashboards", str(found), "invprop", "invprop" in str(found).lower())


def _is_at_hand(stack: Stack, report: Report, service: str) -> bool:
    """Whether the image of a service is there or can be had; a line of the report where not."""
    shown = json.loads(stack.compose("--profile", "monitoring", "config", "--format", "json"))
    image = shown["services"][service]["image"]
    said = ""
    if not stack.run("docker", "images", "--quiet", image).strip():
        said = stack.run("docker", "pull", "--quiet", image, check=False)
    found = bool(stack.run("docker", "images", "--quiet", image).strip())
    if not found:
        report.leave_out(service, f"no image: {said.strip()[-160:]}")
    return found


def _until(holds: Callable[[], bool], limit_s: float) -> float:
    """Seconds until it holds; infinity when it does not in time."""
    began = time.monotonic()
    while time.monotonic() - began < limit_s:
        if holds():
            return time.monotonic() - began
        time.sleep(1)
    return float("inf")


def _asked(stack: Stack, path: str, **query: str) -> Any:
    """What Prometheus answers, asked inside its container: it is not published."""
    address = f"http://127.0.0.1:9090/api/v1/{path}?{urllib.parse.urlencode(query)}"
    said = stack.inside("prometheus", f"wget -q -O - '{address}'")
    answer = json.loads(said[said.index("{") :])
    if answer["status"] != "success":
        raise Broken(f"Prometheus, {path} {query}: {answer}")
    return answer["data"]


def _values(stack: Stack, expression: str) -> list[float]:
    result = _asked(stack, "query", query=expression)["result"]
    return [float(each["value"][1]) for each in result]


def _rules(stack: Stack) -> list[dict[str, Any]]:
    return [rule for group in _asked(stack, "rules")["groups"] for rule in group["rules"]]


def _firing(stack: Stack) -> set[str]:
    alerts = _asked(stack, "alerts")["alerts"]
    return {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}
