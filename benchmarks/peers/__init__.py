"""What the project is compared with: one small adapter per peer."""

import importlib


def why_not(module: str, package: str) -> str:
    """Why a package cannot be used; "" if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # not installed, or for another version of something
        return f"{package} cannot be imported ({type(error).__name__}: {error})"
    return ""
