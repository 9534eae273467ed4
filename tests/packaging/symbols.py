"""What an extension takes from outside: is it LibTorch's stable ABI and CPython's limited API only?

    python tests/packaging/symbols.py qadapter/_C_cpu.abi3.so

Reads the dynamic symbol table with readelf (binutils). Linux only.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# The module is empty (its operations are registered with torch), so it needs no more of Python.
PYTHON = {"PyModule_Create2", "PyModuleDef_Init"}
# Weak references that compilers put into every shared library.
ALWAYS = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
SYSTEM = re.compile(r"GLIBC|GLIBCXX|CXXABI|GCC")
# libstdc++ without a version: torch's libraries export some of it, too, and then those are linked.
STD = re.compile(r"_Z(T[ISV])?N?[KRO]*S[tabsiod]")
LIBRARIES = re.compile(
    r"(libtorch(_cpu|_cuda)?|libc10(_cuda)?|libstdc\+\+|libgcc_s|libm|libc|librt|libdl|libpthread"
    r"|ld-linux-\S+)\.so(\.\d+)*"
)


@dataclass(frozen=True)
class Needs:
    """What one shared library asks of its surroundings."""

    torch: list[str]
    """Functions of torch's C shim."""
    foreign: list[str]
    """Symbols that are none of torch's stable ABI, Python's limited API, libc or libstdc++."""
    exported: list[str]
    """Symbols that it offers to others, but those of std, which are always visible."""
    libraries: list[str]
    search_path: list[str]
    """Entries of RPATH and RUNPATH."""
    versions: dict[str, str]
    """The newest version of GLIBC, GLIBCXX, CXXABI and GCC that some symbol asks for."""


def readelf(option: str, path: Path) -> list[str]:
    command = ["readelf", "--wide", option, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def needs(path: Path) -> Needs:
    torch, foreign, exported = [], [], []
    newest: dict[str, tuple[int, ...]] = {}
    for line in readelf("--dyn-syms", path):
        # number, value, size, type, binding, visibility, section, name@version
        fields = line.split()
        if len(fields) < 8 or fields[6] == "Ndx":
            continue
        name, _, version = fields[7].replace("@@", "@").partition("@")
        if fields[6] != "UND":
            if fields[4] != "LOCAL" and "St" not in name:
                exported.append(name)
            continue
        family, _, number = version.partition("_")
        if SYSTEM.fullmatch(family):
            parts = tuple(int(part) for part in re.findall(r"\d+", number))
            newest[family] = max(newest.get(family, ()), parts)
        elif re.match(r"(aoti_)?torch_", name):
            torch.append(name)
        elif name not in PYTHON | ALWAYS and not STD.match(name):
            foreign.append(name)
    dynamic = readelf("--dynamic", path)
    entries = [re.search(r"\((\w+)\).*\[(.*)\]", line) for line in dynamic]
    found = [(entry[1], entry[2]) for entry in entries if entry]
    return Needs(
        sorted(torch),
        sorted(foreign),
        sorted(exported),
        [value for kind, value in found if kind == "NEEDED"],
        [value for kind, value in found if kind in ("RPATH", "RUNPATH")],
        {family: ".".join(map(str, parts)) for family, parts in sorted(newest.items())},
    )


def not_in_shim(functions: list[str], include: Path) -> list[str]:
    """Those that the headers of torch's C shim in ``include`` do not declare."""
    headers = [
        *include.glob("torch/csrc/stable/c/*.h"),
        *include.glob("torch/csrc/inductor/aoti_torch/c/*.h"),
    ]
    declared = set(re.findall(r"\w+", "\n".join(path.read_text() for path in headers)))
    return [name for name in functions if name not in declared]


def main() -> None:
    bad = False
    for path in map(Path, sys.argv[1:]):
        found = needs(path)
        versions = ", ".join(f"{family} {number}" for family, number in found.versions.items())
        print(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB")
        print(f"  torch shim functions  {len(found.torch)}")
        print(f"  needs at least        {versions}")
        print(f"  exported              {len(found.exported)}")
        print(f"  libraries             {', '.join(found.libraries)}")
        print(f"  search path           {', '.join(found.search_path) or 'none'}")
        print(f"  foreign symbols       {', '.join(found.foreign) or 'none'}")
        bad |= bool(found.foreign or found.search_path)
    sys.exit(bad)


if __name__ == "__main__":
    main()
