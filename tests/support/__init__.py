"""Helpers of the tests: servers, fakes, toy models and toy datasets."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
