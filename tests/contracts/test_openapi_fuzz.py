"""schemathesis over the OpenAPI file against the running service, with keys: no failures.

All phases (coverage, fuzzing, stateful) with data that fit the schema and data that do not: no 5xx,
every status, header, media type and shape documented, bad data refused, methods as told.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.keys import make_key
from service.settings import Settings
from tests.service.conftest import build_bundle, serving

CONFIG = Path(__file__).with_name("schemathesis.toml")
SEED = 20261126


@pytest.mark.parametrize(
    "examples",
    [4, pytest.param(150, marks=[pytest.mark.long, pytest.mark.timeout(2400)])],
)
def test_service__does_what_its_openapi_file_says(tmp_path: Path, examples: int) -> None:
    key, line = make_key("fuzzer", "write")
    settings = Settings(
        bundle=build_bundle(tmp_path / "bundle"),
        state=tmp_path / "state",
        decoder_processes=1,
        api_keys=line,
        max_catch_up_s=0.0,
    )
    with serving(settings) as url:
        command: list[Any] = [
            Path(sys.executable).with_name("schemathesis"), "--config-file", CONFIG,
            "run", f"{url}/openapi.json", "--seed", SEED, "--max-examples", examples,
            "--header", f"Authorization: Bearer {key}", "--continue-on-failure",
            "--max-response-time", 10, "--warnings", "off", "--no-color",
            "--generation-database", "none",
        ]  # fmt: skip
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, f"seed {SEED}\n{done.stdout[-20_000:]}{done.stderr[-2000:]}"
    assert "Tested: " in done.stdout
