"""Runs: their records in the store, their history and their progress.

`journal.RunRecord` is the record of a run, `journal.Journal` writes it, `history` reads all of a store.
"""
