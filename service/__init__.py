"""The HTTP service: answers embeddings, neighbours and propagated groups from an exported bundle.

In: a bundle (what trainer exports) and a state directory. Out: the routes of openapi.json.
`python -m service.run --bundle DIR --state DIR` starts it; README.md is the operator's chapter.
"""
