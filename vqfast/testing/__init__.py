"""Shapes, error budgets, comparisons and timing, shared by the tests, the bench and `vqfast
check`."""

from vqfast.testing.cases import CASES, Case, cases
from vqfast.testing.check import Row, check_case, check_ops

__all__ = ["CASES", "Case", "Row", "cases", "check_case", "check_ops"]
