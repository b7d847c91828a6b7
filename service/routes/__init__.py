"""The routes: each parses a request, calls one thing, answers. No arithmetic here."""
