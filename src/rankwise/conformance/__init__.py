"""What every method promises, as checks that the tests and `rankwise check-method` run alike."""

from rankwise.conformance.checks import CHECKS, Case
from rankwise.conformance.plugin import check_method, load_plugin, too_late

__all__ = ["CHECKS", "Case", "check_method", "load_plugin", "too_late"]
