"""The README.md of a bundle: what the encoder is, how it was made, how to use it, where it ends.

In: the facts of one run. Out: Markdown with the front matter that model hubs read.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.representation.bundle import Variant
from trainer.representation.preprocess import InputContract

_CARD = """\
---
license: unknown
library_name: invprop
pipeline_tag: image-feature-extraction
tags:
- self-supervised
- invariance-propagation
- image-embeddings
- onnx
---

# An image encoder trained without labels

It turns a picture into {feature_dim} features and a {embedding_dim}-d embedding of unit length: the
inner product of two embeddings is the similarity of their pictures, from -1 to 1. It was pretrained
on {images:,} unlabelled images by Invariance Propagation (Wang et al., NeurIPS 2020), and carries
their ids, embeddings and exact nearest-neighbour graph in `gallery/`.

## How it was trained

| fact | value |
|---|---|
{training}

The resolved recipe:

```json
{recipe}
```

Made with {provenance}.

## What goes in

The largest central square of the upright picture, reduced to {crop_fraction:g} of its side and
resized to {size_px} x {size_px} px ({resample}), as uint8 RGB. Transparent parts are laid on white.
Scaling and normalisation are inside the graph. Input `images`: uint8 (B, {size_px}, {size_px}, 3),
any B. Outputs: `features` float32 (B, {feature_dim}), `embedding` float32 (B, {embedding_dim}).

## How to use it

In this folder, with onnxruntime, and with invprop for the very preprocessing it was trained with:

```python
import numpy as np, onnxruntime
from trainer.representation.preprocess import InputContract, prepare
contract = {contract}
images = np.stack([prepare("picture.jpg", contract)])
encoder = onnxruntime.InferenceSession("encoder.onnx", providers=["CPUExecutionProvider"])
features, embedding = encoder.run(["features", "embedding"], {{"images": images}})
```

As a service that embeds, finds neighbours and propagates groups over HTTP:

```sh
python -m service.run --bundle . --state state
curl -H 'Content-Type: image/jpeg' --data-binary @picture.jpg http://127.0.0.1:8000/embed
```

`encoder.safetensors` holds the same network's weights for fine-tuning with torch.
{variants}
## Limits

- It knows the kinds of pictures it was trained on; for others, measure before you rely on it.
- It was trained to tell single images apart and to keep their neighbours near: neighbours share
  looks, which need not be what a person would call their class.
- Embeddings compare only with embeddings of this very bundle.
- Graph and network were compared on {parity_images} of the training images: they differ by at most
  {max_abs:.2g}, and the smallest cosine was {min_cosine:.7f}.
- Its licence is for those to choose who hold the rights in the training images.
"""

_VARIANTS = """
## Other precisions

The same input and outputs, for `python -m service.run --precision`: `fp16` for CUDA, `int8` for
CPUs. Compared with float32 on training images{apart}; kNN is the top-1 accuracy of their own labels
when each is asked in the float32 gallery of all others.

| file | smallest, mean cosine | kNN fp32 -> this | images |
|---|---|---|---|
{rows}
"""


def model_card(
    *,
    feature_dim: int,
    embedding_dim: int,
    images: int,
    contract: InputContract,
    recipe: Mapping[str, Any],
    training: Mapping[str, Any],
    parity: Mapping[str, Any],
    variants: Mapping[str, Variant],
    provenance: Mapping[str, Any],
) -> str:
    """Write the card; everything in it comes from the arguments, so equal runs have equal cards.

    Args:
        images: N, how many it was trained on.
        recipe, training: as JSON values; `training` becomes a table, nested names with dots.
        parity: as the export measured it: `images` and `outputs` {name: {batch: figures}}.
        variants: the other precisions with what `trainer.variants.measure` found.
        provenance: what made it, name to version; None values are left out.
    """
    measured = [row for by_batch in parity["outputs"].values() for row in by_batch.values()]
    return _CARD.format(
        **dataclasses.asdict(contract),
        contract=contract,
        feature_dim=feature_dim,
        embedding_dim=embedding_dim,
        images=images,
        training="\n".join(f"| {name} | {_cell(value)} |" for name, value in _flat(training)),
        recipe=json.dumps(recipe, indent=1, ensure_ascii=False),
        variants=_variants_table(variants),
        provenance=", ".join(f"{name} {value}" for name, value in provenance.items() if value),
        parity_images=parity["images"],
        max_abs=max(row["max_abs"] for row in measured),
        min_cosine=min(row["min_cosine"] for row in measured),
    )


def _variants_table(variants: Mapping[str, Variant]) -> str:
    if not variants:
        return ""
    rows = []
    for precision, variant in variants.items():
        if variant.graph is None:
            rows.append(f"| no {precision}: {_cell(variant.reason)} | - | - | - |")
            continue
        cosine, knn = variant.figures["cosine"], variant.figures["knn"]
        accuracy = "-" if knn is None else f"{knn['fp32']:.4f} -> {knn['variant']:.4f}"
        rows.append(
            f"| `encoder.{precision}.onnx` | {cosine['min']:.5f}, {cosine['mean']:.5f} "
            f"| {accuracy} | {variant.figures['images']} |"
        )
    apart = all(variant.figures.get("held_apart", True) for variant in variants.values())
    return _VARIANTS.format(rows="\n".join(rows), apart=" that calibrated nothing" if apart else "")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _cell(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
