"""Loads the C core, libpagelens.so, with ctypes.

A plain shared library beside the package: no Python.h, so one build serves every Python. Callers declare
argtypes and restype of the functions they use, once, where they wrap them.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from pagelens.vm.errors import CapabilityMissingError

ABI_VERSION = 1


def lib_dir() -> Path:
    """Where the compiled parts are (libpagelens.so, the BPF object, the oracle child).

    $PAGELENS_LIB_DIR overrides it: that is how the tests load the build with sanitizers.
    """
    override = os.environ.get("PAGELENS_LIB_DIR")
    return Path(override) if override else Path(__file__).resolve().parent.parent / "_lib"


@functools.cache
def library() -> ctypes.CDLL:
    """The C core, with errno kept per thread (ctypes.get_errno).

    Raises CapabilityMissingError where it was not built.
    """
    path = lib_dir() / "libpagelens.so"
    try:
        lib = ctypes.CDLL(str(path), use_errno=True)
    except OSError as error:
        raise CapabilityMissingError(
            f"the C core cannot be loaded ({error})", capability="native", fix="./dev build"
        ) from None
    lib.pl_abi_version.restype = ctypes.c_int
    found = lib.pl_abi_version()
    if found != ABI_VERSION:
        raise CapabilityMissingError(
            f"the C core at {path} has interface {found}, this pagelens needs {ABI_VERSION}",
            capability="native",
            fix="./dev build",
        )
    return lib
