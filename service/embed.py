"""Embed many images without a server: python -m service.embed SOURCE --bundle DIR --output DIR

SOURCE: a folder of images, WebDataset's .tar shards, or parquet tables with a column of images or
paths. Out: DIR/part-00000.npy and .parquet, ..., rejected.parquet and manifest.json, of which
service.bulk.parts says what they hold. Run again it goes on where it was stopped, whatever stopped
it. Settings of encoder and decoders are those of the service, from the environment. Exit code 0
done, 1 it failed and can be run again, 2 for what the caller can put right, 130 or 143 after Ctrl-C
or SIGTERM.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError

from service.bulk.embedding import BulkEmbedder
from service.bulk.parts import Output, OutputError, Plan
from service.bulk.progress import Progress
from service.bulk.sources import Source, SourceError, open_source
from service.bulk.tables import TableError
from service.decoder_child import DecoderUnavailable
from service.embedder import Embedder, EmbedderError
from service.serving import load_embedder
from service.settings import Settings
from trainer.representation.bundle import BundleError, open_bundle

DONE, FAILED, WRONG_USE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
PARTITION_IMAGES = 10_000  # of 128 numbers: 5 MB; what a kill costs at most


def main(arguments: Sequence[str] | None = None) -> int:
    """Embed; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m service.embed",
        description="Embed a folder of images, .tar shards or parquet tables into files. Run "
        "again, it goes on where it was stopped.",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="folder, .tar, .parquet, or a {0..9} of them"
    )
    parser.add_argument("--bundle", type=Path, required=True, help="the exported bundle")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for the parts")
    parser.add_argument(
        "--vectors", choices=("embedding", "features"), default="embedding", help="which output"
    )
    parser.add_argument("--column", help="of parquet tables: holds the images or their paths")
    parser.add_argument("--images", type=Path, help="where the paths of a parquet table start")
    parser.add_argument(
        "--partition-images", type=int, default=PARTITION_IMAGES, help="images in one part"
    )
    parser.add_argument("--precision", help="as of the service; INVPROP_PRECISION")
    parser.add_argument("--execution-provider", help="as of the service")
    given = parser.parse_args(arguments)
    if given.partition_images < 1:
        return _fail(f"--partition-images is {given.partition_images}, wanted 1 or more", WRONG_USE)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _embed(given)
    except (BundleError, SourceError, TableError, OutputError, _WrongUse) as error:
        return _fail(str(error), WRONG_USE)
    except (EmbedderError, DecoderUnavailable) as error:
        return _fail(str(error), FAILED)
    except OSError as error:
        return _fail(f"{error}: put this right and run it again; whole parts are kept", FAILED)
    except KeyboardInterrupt as error:
        code = TERMINATED if isinstance(error, _Terminated) else INTERRUPTED
        return _fail("interrupted; run it again to go on", code)
    finally:
        signal.signal(signal.SIGTERM, before)


class _WrongUse(Exception):
    """Settings that do not go here; says which."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM, where Ctrl-C would be a KeyboardInterrupt."""


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the second one kills
    raise _Terminated


def _embed(given: argparse.Namespace) -> int:
    settings = _settings(given)
    source = open_source(given.source, column=given.column, images=given.images)
    try:
        embedder = load_embedder(open_bundle(given.bundle), settings)
    except EmbedderError as error:  # a precision or provider that is not there
        raise _WrongUse(str(error)) from error
    plan = _plan(given, source, embedder)
    with Output(given.output, plan) as output:
        for problem in output.damaged:
            sys.stderr.write(f"made again: {problem}\n")
        missing = output.missing()
        images = sum(len(_range(plan, number)) for number in missing)
        progress = Progress("images", len(source), done=len(source) - images)
        if missing:
            with BulkEmbedder(embedder, given.vectors, settings) as bulk:
                for number in missing:
                    rows = _range(plan, number)
                    found = bulk.embed(source, rows.start, rows.stop, progress.advance)
                    output.write(number, found.ids, found.vectors, found.rejected)
        output.finish()
        progress.end()
        vectors, rejected = output.counts
    others = f", {source.other_files:,} other files passed over" if source.other_files else ""
    sys.stdout.write(
        f"{given.output}: {vectors:,} vectors of {plan.dim} in {len(plan.fingerprints)} parts, "
        f"{rejected:,} images rejected (rejected.parquet){others}\n"
    )
    return DONE


def _settings(given: argparse.Namespace) -> Settings:
    values: dict[str, Any] = {"bundle": given.bundle, "state": Path()}
    for name in ("precision", "execution_provider"):
        if getattr(given, name) is not None:
            values[name] = getattr(given, name)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        told = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise _WrongUse("; ".join(told)) from None


def _plan(given: argparse.Namespace, source: Source, embedder: Embedder) -> Plan:
    firsts = range(0, len(source), given.partition_images)
    wants_features = given.vectors == "features"
    return Plan(
        model_id=embedder.model_id,
        vectors=given.vectors,
        dim=embedder.feature_dim if wants_features else embedder.embedding_dim,
        precision=embedder.precision,
        source=source.kind,
        images=len(source),
        partition_images=given.partition_images,
        fingerprints=tuple(
            source.fingerprint(first, min(first + given.partition_images, len(source)))
            for first in firsts
        ),
    )


def _range(plan: Plan, number: int) -> range:
    first = number * plan.partition_images
    return range(first, min(first + plan.partition_images, plan.images))


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
