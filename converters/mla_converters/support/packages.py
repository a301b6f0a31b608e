"""Checks for packages that only some evaluations need."""

from importlib.util import find_spec

from mla_converters.errors import ConversionError


def require(module: str, purpose: str, remedy: str) -> None:
    """Check that ``module`` is installed, without importing it.

    Args:
        module: top-level import name.
        purpose: the option that needs it.
        remedy: advice to a user who does not have it.

    Raises:
        ConversionError: ``module`` is not installed.
    """
    if find_spec(module) is None:
        raise ConversionError(f"{purpose} needs the package {module}, which is not installed: {remedy}.")
