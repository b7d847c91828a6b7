"""The gallery: the items that queries are compared with.

The operations log on disk is the truth, the search index in memory is a cache of it.
"""
