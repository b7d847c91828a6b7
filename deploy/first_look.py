"""The last part of ./deploy/quickstart: wait for the service, say what to try, add the pictures.

In: where the service listens, and what it was trained on. Out: commands on standard output that
work as they are pasted; the pictures of the items, so that the page shows them.
"""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from client import Client, InvpropError, PictureNotFound
from client.progress import meter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PATIENCE_S = 120.0  # to load a model and a gallery; a million items take some ten seconds
POLL_S = 0.2
SAMPLES = 8  # digits written as pictures

GUIDE = """
{items:,} pictures can be asked. Open {url} in a browser ({url}/docs: every route), or paste:

# the embedding of a picture
curl -sw '\\n' -F {upload} {url}/embed

# the neighbours of an item
curl -sw '\\n' {json_header} -d {neighbours} {url}/neighbours

# its group: what propagation along the neighbours reaches
curl -sw '\\n' {json_header} -d {groups} {url}/groups

# the same from Python
{python} - <<'EOF'
from client import Client
with Client({url!r}) as service:
    print(service.embed({picture!r}).embeddings.shape)
    print(service.neighbours(images={picture!r}, k=5).results[0])
EOF
"""
EVALUATE = """
# how well the encoder tells the labels apart; watch it at {url}/#/evaluations
curl -sw '\\n' {json_header} -d {evaluation} {url}/evaluations
"""


def main() -> int:
    arguments = _parse()
    with Client(arguments.url, timeout_s=5.0) as service:
        deadline = time.monotonic() + PATIENCE_S
        while not service.ready():
            if not _runs(arguments.pid) or time.monotonic() > deadline:
                return 1
            time.sleep(POLL_S)
        count = service.info().gallery["items"]
        datasets = service.datasets()
        ids = (item.id for item in service.items())
        if arguments.folder is None:
            trained_on = set(ids)
            item, picture = min(trained_on), write_held_out_digits(arguments.samples, trained_on)
        else:
            # Items may have been added and deleted since: one that is still a file.
            item = next(i for i in ids if (arguments.folder / i).is_file())
            picture = arguments.folder / item
    query = {"ids": [item]}
    sys.stdout.write(
        GUIDE.format(
            items=count,
            url=arguments.url,
            upload=shlex.quote(f'images=@"{picture}"'),
            json_header="-H 'Content-Type: application/json'",
            neighbours=shlex.quote(json.dumps(query | {"k": 5})),
            groups=shlex.quote(json.dumps(query | {"k": 4, "steps": 2, "limit": 8})),
            python=shlex.quote(str(arguments.python)),
            picture=str(picture),
        )
    )
    if datasets:
        asked = json.dumps({"protocol": "knn", "dataset": datasets[0].name})
        sys.stdout.write(
            EVALUATE.format(
                url=arguments.url,
                json_header="-H 'Content-Type: application/json'",
                evaluation=shlex.quote(asked),
            )
        )
    sys.stdout.flush()
    with Client(arguments.url) as service:
        try:
            if arguments.folder is None:
                add_digits(service, sorted(trained_on))
            else:
                add_pictures(service, arguments.folder, arguments.samples.parent)
        except InvpropError as error:  # the service answers all the same
            sys.stderr.write(f"quickstart: not all pictures were added: {error}\n")
    return 0


def add_digits(service: Client, ids: list[str]) -> None:
    """Give the digits that were trained on their pictures, unless they have them."""
    from sklearn.datasets import load_digits

    try:
        service.image(ids[0])
    except PictureNotFound:
        images = load_digits().images
        named = [name for name in ids if name.isdecimal() and int(name) < len(images)]
        service.add([_pixels(images[int(name)]) for name in named], ids=named)


def add_pictures(service: Client, folder: Path, home: Path) -> None:
    """Give the items of a folder their pictures; what was added before is not sent again."""
    told = meter("quickstart: adding the pictures, so that the page shows them")
    try:
        added = service.add_folder(folder, journal=home / "pictures.journal", progress=told)
    finally:
        told.close()
    if added.refused:
        first = added.refused[0]
        sys.stderr.write(
            f"quickstart: {len(added.refused)} files were not added: {first.id}: {first.reason}\n"
        )


def _pixels(digit: "NDArray[np.float64]") -> "NDArray[np.uint8]":
    """(8, 8) of 0..16 -> (8, 8, 3) uint8."""
    import numpy as np

    return np.repeat(np.round(digit * (255 / 16)).astype(np.uint8)[..., None], 3, axis=2)


def write_held_out_digits(folder: Path, trained_on: set[str]) -> Path:
    """Write some digits that were held out of training as pictures; returns one of them."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder.mkdir(exist_ok=True)
    held_out = [i for i in range(len(digits.images)) if f"{i:04d}" not in trained_on]
    paths = []
    for index in held_out[:SAMPLES]:
        paths.append(folder / f"{index:04d}_is_a_{digits.target[index]}.png")
        Image.fromarray(_pixels(digits.images[index])).save(paths[-1])
    return paths[0]


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, required=True, help="process of the service")
    parser.add_argument("--python", required=True, help="interpreter to name in the commands")
    parser.add_argument("--samples", type=Path, required=True, help="where digits are written")
    parser.add_argument("--folder", type=Path, help="what was trained on, if not the digits")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # quickstart, which started this, ends the service
        sys.exit(130)
