"""Checks of requests before any server starts or anything is written.

`checks` checks requests of every sort, `encode` and `generator` make those of the smaller flows, `doctor` checks the
machine.
"""
