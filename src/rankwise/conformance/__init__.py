"""What every method promises, as checks that the tests and `rankwise check-method` run alike."""

from rankwise.conformance.checks import CHECKS, Case
from rankwise.conformance.plugin import check_file, check_method

__all__ = ["CHECKS", "Case", "check_file", "check_method"]
