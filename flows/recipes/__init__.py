"""Recipes: named configurations of a whole run, as data.

`schema.Recipe` is what a recipe is, `small.RECIPES` names all of them, `files.load_recipe` reads and overrides one.
"""
