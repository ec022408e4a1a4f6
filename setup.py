"""Builds the pure-Python package; pyproject.toml holds the metadata."""

from setuptools import setup

setup()
