"""Tests of one method stand together, so that one worker runs them and compiles its step once."""

import pathlib

SUITE = pathlib.Path(__file__).with_name("test_contract.py")


def pytest_collection_modifyitems(items):
    """Sort the contract's tests by method, in the places that they have among all tests."""
    places = [i for i, item in enumerate(items) if item.path == SUITE]
    suite = sorted((items[i] for i in places), key=lambda item: item.callspec.params["method"].name)
    for place, item in zip(places, suite, strict=True):
        items[place] = item
