"""Find pictures of a folder that are nearly the same, and list all but one of each.

    python -m client.examples.deduplicate FOLDER [--url URL] [--similarity 0.98]

Adds the folder to the service's gallery (going on where it was stopped), asks for the neighbours of
every picture, joins those above the similarity and prints, for each such set, the file to keep and
those that could go. Deletes nothing. Out: lines `keep<TAB>file`, `copy<TAB>file<TAB>similarity`.
"""

import argparse
import sys
from pathlib import Path

from client import Client
from client.paths import pictures_in


def copies(
    service: Client, ids: list[str], similarity: float
) -> dict[str, list[tuple[str, float]]]:
    """For each id to keep: the ids that are nearly the same as it or as one of its copies."""
    keeper = {item_id: item_id for item_id in ids}
    found: dict[str, list[tuple[str, float]]] = {}
    near = service.neighbours(ids=ids, k=20).results
    for item_id, row in zip(ids, near, strict=True):
        for neighbour in row:
            other = keeper.get(neighbour.id)
            if neighbour.similarity >= similarity and other == neighbour.id != keeper[item_id]:
                if neighbour.id in found:
                    continue  # it keeps a set of its own already
                keeper[neighbour.id] = keeper[item_id]
                found.setdefault(keeper[item_id], []).append((neighbour.id, neighbour.similarity))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--similarity", type=float, default=0.98)
    options = parser.parse_args()
    with Client(options.url) as service:
        done = service.add_folder(options.folder)
        refused = {file.id for file in done.refused}
        for file in done.refused:
            sys.stderr.write(f"{file.id}: {file.reason}\n")
        ids = [f.id for f in pictures_in(options.folder) if f.id not in refused]
        for kept, others in copies(service, ids, options.similarity).items():
            sys.stdout.write(f"keep\t{kept}\n")
            for other, similarity in others:
                sys.stdout.write(f"copy\t{other}\t{similarity:.4f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
