"""Runs a command without AVX-512 (Linux, Intel's processors; needs a C compiler).

    python benchmarks/without_avx512.py qlora-jax train --config examples/smollm2.yaml

The command and its children see a processor with AVX2, but without AVX-512, products in
bfloat16 and AMX. Libraries that choose their code when they start, such as XLA, oneDNN
and OpenBLAS, then use AVX2. `hide_avx512.c` says how.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

SOURCE = pathlib.Path(__file__).with_name("hide_avx512.c")

if __name__ == "__main__":
    folder = tempfile.mkdtemp()
    library = f"{folder}/hide_avx512.so"
    subprocess.run(
        ["cc", "-O2", "-shared", "-fPIC", SOURCE, "-o", library, "-ldl"], check=True
    )
    print("CPUID hides AVX-512 from this command.", flush=True)
    # Programs that were compiled and cached for AVX-512 must not be used.
    environment = os.environ | {"LD_PRELOAD": library, "XDG_CACHE_HOME": folder}
    os.execvpe(sys.argv[1], sys.argv[1:], environment)
