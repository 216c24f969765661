"""How XLA compiles in the tests: for eight simulated devices, and quickly.

The suite compiles thousands of small programs and runs each a few times, so XLA's effort is nearly
all of its time. Without the emitters of fused loops, without LLVM's optimizations and in one piece,
the program of an optimizer's step compiles five times faster. With
``XLA_FLAGS=--xla_backend_optimization_level=3`` the tests compile as their users do.
"""

import importlib.metadata

DEVICES = "xla_force_host_platform_device_count"
LEVEL = "xla_backend_optimization_level"
# The value of each flag, and the last release of jaxlib that it was tried with: XLA ends the
# process at a flag that it does not know. 0.12 has no other emitters to choose.
QUICK = {
    "xla_cpu_use_fusion_emitters": ("false", (0, 10)),
    LEVEL: ("0", (0, 12)),
    "xla_cpu_parallel_codegen_split_count": ("1", (0, 12)),
}


def with_defaults(given: str) -> str:
    """Return the value of ``XLA_FLAGS`` for the tests, made of what is given and the defaults."""
    release = importlib.metadata.version("jaxlib").split(".")
    installed = int(release[0]), int(release[1])
    wanted = {name: value for name, (value, last) in QUICK.items() if installed <= last}
    wanted = {**({} if LEVEL in given else wanted), DEVICES: "8"}
    added = [f"--{name}={value}" for name, value in wanted.items() if name not in given]
    return " ".join([given, *added]).strip()
