"""Runs a benchmark without AMX, Intel's matrix unit (Linux, x86-64).

    python benchmarks/without_amx.py benchmarks/train_step.py

A process must request AMX from Linux before using it. A filter makes Linux deny that to
this process and its children, so libraries multiply bfloat16 by AVX-512 instead.
"""

import ctypes
import errno
import os
import sys

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM = 158, 0x1023  # the call, and the request for AMX
NUMBER_AT, ARGUMENT_AT = 0, 16  # in struct seccomp_data
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EOPNOTSUPP


class Instruction(ctypes.Structure):
    """struct sock_filter."""

    _fields_ = [
        ("code", ctypes.c_ushort),
        ("if_true", ctypes.c_ubyte),
        ("if_false", ctypes.c_ubyte),
        ("operand", ctypes.c_uint),
    ]


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [
        ("length", ctypes.c_ushort),
        ("instructions", ctypes.POINTER(Instruction)),
    ]


def refuse_amx() -> None:
    """Installs the filter in this process; its children inherit it."""
    instructions = [
        (LOAD, 0, 0, NUMBER_AT),
        (JUMP_IF_EQUAL, 0, 3, ARCH_PRCTL),
        (LOAD, 0, 0, ARGUMENT_AT),
        (JUMP_IF_EQUAL, 0, 1, ARCH_REQ_XCOMP_PERM),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]
    array = (Instruction * len(instructions))(*instructions)
    program = ctypes.byref(Program(len(array), array))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0),
    ):
        if libc.prctl(*call):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


if __name__ == "__main__":
    refuse_amx()
    print("Linux refuses AMX to this process.", flush=True)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
