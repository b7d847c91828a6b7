"""Stands in for trainer.evaluate: does at once what the job's settings say.

python tests/service/fake_evaluate.py --job FILE --output DIR
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def say(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main(job: Path, output: Path) -> int:
    values = json.loads(job.read_text())
    settings = values["settings"]
    if "pids" in settings:  # whoever tests wants to know what is left
        with Path(settings["pids"]).open("a") as file:
            file.write(f"{os.getpid()}\n")
    say({"stage": "work", "done": 1, "total": 2})
    sys.stdout.write("a line that is no JSON\n")
    sys.stdout.flush()
    sys.stderr.write("what people may want to read\n")
    sys.stderr.flush()
    what = settings.get("do", "succeed")
    if what == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "memory":
        bytearray(4 * 2**30)
    if what == "grandchild":  # and then an end that leaves it behind
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with Path(settings["pids"]).open("a") as file:
            file.write(f"{child.pid}\n")
        return 1
    if what in ("hang", "stubborn"):
        if what == "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path(settings["ready"]).touch()
        time.sleep(600)
    if what == "refuse":
        say({"error": {"code": "dataset_invalid", "message": "one class only"}})
        return 2
    if what == "interrupted":
        say({"error": {"code": "interrupted", "message": "interrupted; no report was written"}})
        return 143
    if what == "no report":
        return 0
    time.sleep(settings.get("seconds", 0))
    (output / "report.html").write_text("<p>fine</p>")
    report = {"seed": values["seed"], "job": values, "pid": os.getpid()}
    (output / "report.json").write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[2]), Path(sys.argv[4])))
