"""Markers of tests that need what not every machine has."""

import importlib.util

import pytest


def libtpu(test):
    """Marks a test that compiles for a TPU, and is skipped without libtpu."""
    absent = importlib.util.find_spec("libtpu") is None
    return pytest.mark.libtpu(pytest.mark.skipif(absent, reason="libtpu is not installed")(test))
