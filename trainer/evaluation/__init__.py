"""How good a bundle's encoder is on a labelled data set: one module for each protocol.

In: a bundle, a labelled data set, settings, a seed. Out: an `Outcome`, of which trainer.evaluate
makes report.json and report.html. No torch in job, its parts, datasets and outcome: those who only
ask for an evaluation, and the decoding processes, import them.
"""
