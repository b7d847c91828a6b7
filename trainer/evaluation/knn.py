"""`knn`: each test image takes the weighted vote of its nearest training images.

In: frozen embeddings or features. Out: accuracies for each k and output. Nothing is trained and
nothing is chosen.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation.context import Evaluation, Network
from trainer.evaluation.dataset_specs import TEST, TRAIN
from trainer.evaluation.features import extract, labels_of
from trainer.evaluation.outcome import Outcome, Result, classified
from trainer.evaluation.protocol_settings import KnnSettings
from trainer.evaluation.votes import knn_votes, unit_rows


def knn(evaluation: Evaluation, settings: KnnSettings) -> Outcome:
    """Weighted kNN on `embedding` and `features` of unit length, for each k."""
    dataset = evaluation.dataset
    trained, labels, rows = _votes(evaluation, evaluation.trained, settings)
    untrained, _, _ = _votes(evaluation, evaluation.untrained(), settings)
    results: list[Result] = []
    for (output, k), votes in trained.items():
        results.append(
            classified(
                f"{output}, k={k}",
                votes,
                labels,
                dataset.class_names,
                rows=rows,
                seed=evaluation.seed,
                untrained=untrained[output, k],
                facts={"output": output, "k": k, "temperature": settings.temperature},
            )
        )
    return Outcome(results, headline="top1")


def _votes(
    evaluation: Evaluation, network: Network, settings: KnnSettings
) -> tuple[dict[tuple[str, int], NDArray[np.float64]], NDArray[np.int64], NDArray[np.int64]]:
    """Votes for each output and k, labels and rows of the test items."""
    dataset = evaluation.dataset
    train = extract(evaluation, network, TRAIN, settings.outputs)
    test = extract(evaluation, network, TEST, settings.outputs)
    train_labels = labels_of(evaluation, TRAIN, train)
    votes: dict[tuple[str, int], NDArray[np.float64]] = {}
    for output in settings.outputs:
        done, total = 0, len(test.rows)

        def advance(count: int, output: str = output, total: int = total) -> None:
            nonlocal done
            done += count
            evaluation.progress(f"neighbours by {output}", done, total)

        found = knn_votes(
            unit_rows(test.values[output]),
            unit_rows(train.values[output]),
            train_labels,
            num_classes=len(dataset.class_names),
            ks=settings.k,
            temperature=settings.temperature,
            device=evaluation.device,
            advance=advance,
        )
        votes |= {(output, k): each for k, each in found.items()}
    return votes, labels_of(evaluation, TEST, test), test.rows
