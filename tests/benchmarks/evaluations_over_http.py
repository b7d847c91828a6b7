"""The same evaluations through HTTP and Celery, and by hand: equal numbers, and how good they are.

    python tests/benchmarks/evaluations_over_http.py [--broker filesystem|redis|amqp] [--output DIR]

In: `../shared/data`. For each of CIFAR-10, Fashion-MNIST and WM-811K an encoder is trained shortly
on a part of the set; then a service, a broker and `celery -A service.worker worker -Q cpu` run all
protocols of SETTINGS on it, and `python -m trainer.evaluate` runs them again. Out: a table, and
exit code 1 where any number differs, or where an interval of the gain over the untrained twin does
not lie above 0. --output keeps the encoders: another run there does not train them again.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import httpx2

from tests.benchmarks.real_sets import WRITE
from tests.faults import brokers

ROOT = Path(__file__).parents[2]
SEED = 0
RECIPES = {"cifar10": "folder", "fashion": "folder", "wm811k": "wm811k"}
SETTINGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "knn": ("knn", {"k": [20, 1]}),
    "linear_probe lbfgs": ("linear_probe", {"classifier": "lbfgs"}),
    "linear_probe sgd": ("linear_probe", {"classifier": "sgd", "lr": 0.1}),
    "semi_supervised, 10 %": ("semi_supervised", {"share": 0.1}),
    "transfer": ("transfer", {"epochs": 2}),
}
# What must be the same; the rest is durations and where files lie.
COMPARED = ("results", "curves", "facts", "headline", "settings", "model_id", "encoder")
NOT_BETTER, DIFFERENT = "not above its untrained twin", "differs from the run by hand"


def trained(name: str, root: Path, epochs: int) -> Path:
    """An encoder for a set, trained by the recipe that is for such images."""
    run = root / "run"
    if not (run / "bundle" / "manifest.json").is_file():
        subprocess.run(
            [sys.executable, "-m", "trainer.run", RECIPES[name], "--data", str(root / "train.npz"),
             "--output", str(run), "encoder.backbone=small", "encoder.image_size_px=32",
             f"epochs={epochs}", f"loss.warmup_epochs={max(1, epochs // 5)}",
             "loss.num_background=1024", "device=cpu", "data.workers=0",
             f"monitor.every_epochs={epochs}", "monitor.max_images=1000", "export.variants=[]"],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return run / "bundle"


@contextlib.contextmanager
def served(name: str, root: Path, bundle: Path, broker: str) -> Iterator[str]:
    """The URL of a service that has a worker, which comes by its jobs through a broker."""
    state = root / "state"
    state.mkdir()
    (root / "datasets.yaml").write_text(f"{name}: {{kind: npz, root: {root}}}\n")
    with contextlib.ExitStack() as stack:
        bell = brokers.MAKE[broker](root / "broker", state)
        stack.callback(bell.close)
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("INVPROP_")},
            "INVPROP_STATE": str(state),
            "INVPROP_BUNDLE": str(bundle),
            "INVPROP_DATASETS": str(root / "datasets.yaml"),
            **({} if bell.url is None else {"INVPROP_BROKER": bell.url}),
        }
        log = stack.enter_context((root / "log").open("w"))
        service = subprocess.Popen(
            [sys.executable, "-m", "service.run", "--port", "0"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        stack.callback(service.wait, 60)
        stack.callback(service.terminate)
        assert service.stdout is not None
        line = service.stdout.readline()
        if not line.startswith("ready: "):
            raise SystemExit((root / "log").read_text())
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "service.worker", "worker", "-Q", "cpu",
             "--loglevel", "warning"],
            cwd=ROOT, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
        stack.callback(worker.wait, 60)
        stack.callback(worker.terminate)
        yield line.split()[1]


def over_http(url: str, name: str) -> dict[str, dict[str, Any]]:
    """Submit all at once, wait for all: label of SETTINGS to the report."""
    places = {}
    for label, (protocol, settings) in SETTINGS.items():
        asked = {"protocol": protocol, "dataset": name, "settings": settings, "seed": SEED}
        answer = httpx2.post(f"{url}/evaluations", json=asked, timeout=30)
        if answer.status_code != 202:
            raise SystemExit(answer.text)
        places[label] = url + answer.headers["location"]
    reports = {}
    for label, place in places.items():
        while (found := httpx2.get(place, timeout=30).json())["finished_at"] is None:
            time.sleep(0.5)
        if found["status"] != "succeeded":
            raise SystemExit(json.dumps(found["error"], indent=1))
        page = httpx2.get(f"{place}/report", timeout=30)
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        reports[label] = found["report"]
    return reports


def by_hand(name: str, root: Path, bundle: Path) -> dict[str, dict[str, Any]]:
    """The same without server, queue and worker."""
    reports = {}
    for number, (label, (protocol, settings)) in enumerate(SETTINGS.items()):
        job = {
            "protocol": protocol, "bundle": str(bundle), "seed": SEED, "settings": settings,
            "dataset": {"name": name, "kind": "npz", "root": str(root)}, "device": "cpu",
        }  # fmt: skip
        (root / f"job-{number}.json").write_text(json.dumps(job))
        output = root / f"by-hand-{number}"
        subprocess.run(
            [sys.executable, "-m", "trainer.evaluate", "--job", str(root / f"job-{number}.json"),
             "--output", str(output)],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        reports[label] = json.loads((output / "report.json").read_text())
    return reports


def row(name: str, label: str, report: Mapping[str, Any], verdict: str) -> str:
    """A line of the table."""
    head = report["headline"]
    low, high = head["interval"]
    gain_low, gain_high = head["gain"]
    return (
        f"| {name} | {label}: {head['result']} | {head['value']:.1%} ({low:.1%} to {high:.1%}) "
        f"| {head['untrained']:.1%} | {100 * gain_low:.1f} to {100 * gain_high:.1f} | {verdict} |"
    )


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--broker", choices=list(brokers.MAKE), default="filesystem")
    parser.add_argument("--sets", nargs="+", choices=list(WRITE), default=list(WRITE))
    parser.add_argument("--train", type=int, default=300, help="images of each class")
    parser.add_argument("--test", type=int, default=150, help="images of each class")
    parser.add_argument("--epochs", type=int, default=15, help="of the encoders' training")
    parser.add_argument("--output", type=Path, help="default: a folder that is removed")
    asked = parser.parse_args()
    wrong = False
    with tempfile.TemporaryDirectory() as place:
        sys.stdout.write("| set | protocol | top-1 | untrained | gain in points | by hand |\n")
        sys.stdout.write("|---|---|---|---|---|---|\n")
        for name in asked.sets:
            root = Path(place) / name
            root.mkdir()
            kept = (asked.output or Path(place) / "kept") / name
            kept.mkdir(parents=True, exist_ok=True)
            WRITE[name](kept, {"train": asked.train, "test": asked.test})
            bundle = trained(name, kept, asked.epochs)
            for split in ("train", "test"):
                (root / f"{split}.npz").symlink_to((kept / f"{split}.npz").absolute())
            with served(name, root, bundle.absolute(), asked.broker) as url:
                through = over_http(url, name)
            direct = by_hand(name, root, bundle.absolute())
            for label, report in through.items():
                same = all(report[key] == direct[label][key] for key in COMPARED)
                better = report["headline"]["gain"][0] > 0
                verdict = "equal" if same else DIFFERENT
                if not better:
                    verdict += f"; {NOT_BETTER}"
                wrong |= not (same and better)
                sys.stdout.write(row(name, label, report, verdict) + "\n")
                sys.stdout.flush()
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
