"""The `sftok` command line: one module per command, each importing what is heavy when it runs.

`main.main` is the entry point.
"""
