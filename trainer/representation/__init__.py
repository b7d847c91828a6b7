"""What trainer and service must agree on: how an image enters a model, what an exported model is on
disk, what a neighbour graph is, how positives propagate on it, how frozen features are scored.

Entry rule: meaningful for frozen features without knowing how they were trained. No torch here.
"""
