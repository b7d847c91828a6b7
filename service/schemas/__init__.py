"""The shapes of requests and answers, as they stand in openapi.json: one file for each subject.

Options are validated through these models. Vectors are not: lists of floats go from orjson straight
to numpy and back (a list of pydantic floats costs 35 times as much), so their fields are `Any` here
and an array of numbers in the document.
"""
