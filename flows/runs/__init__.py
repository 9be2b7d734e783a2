"""Runs: what they are asked for, their records in the store, their history and their progress.

`run_request.RunRequest` is everything a run was asked for; `journal.RunRecord` holds it and says what became of the
run, `journal.Journal` writes it, `history` reads all of a store.
"""
