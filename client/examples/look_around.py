"""A first look at your own pictures, cell by cell, against a running service.

    python -m trainer.run folder --data FOLDER --output runs/mine      # train
    python -m service.run --bundle runs/mine/bundle --state state      # serve
    python -m client.examples.look_around FOLDER [--url URL]

If sub-folders name classes, the last cell asks how well the five nearest neighbours know them.
"""

# ruff: noqa: T201 - a notebook prints
# %% Add the folder (what is there already is replaced by itself)
import argparse
from collections import Counter
from pathlib import Path

from client import Client
from client.paths import pictures_in

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", type=Path)
parser.add_argument("--url", default="http://127.0.0.1:8000")
given = parser.parse_args()
service = Client(given.url)
added = service.add_folder(given.folder)
ids = [file.id for file in pictures_in(given.folder)]
print(f"{added.added + added.updated + added.already} pictures, {len(added.refused)} refused")

# %% Search: what is most similar to the first one?
for neighbour in service.neighbours(ids=ids[0], k=5).results[0]:
    print(f"{ids[0]} ~ {neighbour.similarity:.3f} {neighbour.id}")

# %% Groups: what does propagation reach from it, the least similar first?
group = service.groups(ids=ids[0], steps=2, order="hardest").results[0]
print(f"{group.reached} reached; the hardest positive is {group.members[0].id}")

# %% Probe: is the class of a picture that of most of its neighbours?
known = set(ids)
right = 0
for item_id, row in zip(ids, service.neighbours(ids=ids, k=5).results, strict=True):
    votes = Counter(Path(n.id).parts[0] for n in row if n.id in known)
    right += bool(votes) and votes.most_common(1)[0][0] == Path(item_id).parts[0]
print(f"{right / len(ids):.1%} of the pictures lie among their own class")
service.close()
