"""Requests: arguments of a run, checked before any server starts or anything is written.

`checks` checks a whole run, `encode` and `generator` the smaller flows, `doctor` the machine.
"""
