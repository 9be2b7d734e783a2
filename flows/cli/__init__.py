"""The `sftok` command line: one module per command, each importing what is heavy when it runs.

`main.main` is the entry point, `config_options` makes options from the fields of configs.
"""
