"""What is promised of the overlay deploy/compose.gpu.yaml: with a GPU, and without one."""

import json
from pathlib import Path

from bad_input import GIVEN, line_of, other_stack, overlay_file
from stack import ENDED_S, ROOT, Report, Stack

GPU = f"{ROOT}/docker-compose.yml:{ROOT}/deploy/compose.gpu.yaml"
NO_TOOLKIT = 'could not select device driver "nvidia"'
NO_CUDA = "execution_provider = cuda was asked for, but"
AUTO = "services: {service: {environment: {INVPROP_EXECUTION_PROVIDER: auto}}}\n"
ASKED = {"protocol": "linear_probe", "dataset": "digits", "device": "cuda"}


def gpu(report: Report, folder: Path) -> None:
    """The GPU is used; where there is none, the start or the evaluation ends with a line on it."""
    given = overlay_file(folder / "given-gpu.yaml", GIVEN)
    with other_stack(COMPOSE_FILE=f"{GPU}:{given}") as other:
        said = other.up(check=False)
        log = other.compose("logs", "--no-log-prefix", "service", check=False)
        if NO_TOOLKIT in said:
            line_of(report, "GPU overlay without NVIDIA's container toolkit", said, NO_TOOLKIT)
            report.leave_out("a GPU", "no container toolkit here")
        elif NO_CUDA in log:
            line_of(report, "GPU overlay with a toolkit and no usable GPU", log, NO_CUDA)
            auto = overlay_file(folder / "auto.yaml", AUTO)
            other.environment["COMPOSE_FILE"] += f":{auto}"
            other.up()
            ended = _evaluated(other)
            said = json.dumps(ended.get("error"))
            wanted = "device_unavailable"
            line_of(report, "an evaluation on a GPU that is none", said, wanted)
            report.leave_out("a GPU", "the toolkit gives none that CUDA can use")
        else:
            info = other.ask("GET", "/info")
            used = f"{info['execution_provider']}, search on {info['search']['device']}"
            wanted = "CUDAExecutionProvider, search on gpu"
            report.add("GPU overlay: in use", used, wanted, used == wanted)
            status = _evaluated(other)["status"]
            report.add(
                "GPU overlay: an evaluation on it", status, "succeeded", status == "succeeded"
            )


def _evaluated(stack: Stack) -> dict[str, str]:
    """An evaluation that asked for a GPU, as it ended."""
    evaluation = str(stack.ask("POST", "/evaluations", json.dumps(ASKED).encode())["id"])
    ended: dict[str, str] = stack.until_ended([evaluation], ENDED_S)[evaluation]
    return ended
