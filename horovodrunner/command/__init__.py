"""``python -m horovodrunner run``: a script on every rank.

Runs in: the command line.
"""
