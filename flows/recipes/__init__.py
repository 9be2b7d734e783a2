"""Recipes: named configurations of a whole run, as data.

`schema.Recipe` is their type, `registry.RECIPES` has them by name, `files.load_recipe` reads and overrides one.
"""
