"""How XLA compiles in the tests: for eight simulated devices, and quickly.

The suite compiles thousands of small programs and runs each a few times, so XLA's effort is nearly
all of its time. Without the emitters of fused loops, without LLVM's optimizations and in one piece,
the program of an optimizer's step compiles five times faster.
"""

import importlib.metadata

DEVICES = {"xla_force_host_platform_device_count": "8"}
QUICK = {
    "xla_cpu_use_fusion_emitters": "false",
    "xla_backend_optimization_level": "0",
    "xla_cpu_parallel_codegen_split_count": "1",
}
# XLA ends the process at a flag that it does not know. Newer releases run without ``QUICK``, only
# slower, until someone has tried them and raises this bound.
LAST_TRIED = (0, 10)


def with_defaults(given: str) -> str:
    """Return the value of ``XLA_FLAGS`` for the tests; flags that are given stay as they are."""
    release = importlib.metadata.version("jaxlib").split(".")
    tried = (int(release[0]), int(release[1])) <= LAST_TRIED
    wanted = {**DEVICES, **(QUICK if tried else {})}
    added = [f"--{flag}={value}" for flag, value in wanted.items() if flag not in given]
    return " ".join([given, *added]).strip()
