"""Attacks on initlab, seeded and counted: a few in every test run, thousands by `python -m tests.reliability`."""
