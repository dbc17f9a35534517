"""Compiles every Triton kernel of the pack for GPUs that this machine need not have, and refuses register spills, too
much shared memory and lost matrix instructions.

    python bench/aot.py                       the small set: specs without "extra"
    python bench/aot.py --all --jobs 2        everything
    python bench/aot.py --targets sm90,gfx942 --only block_sparse --json out.json

Exit 1 when one compilation is refused. Every module below kernels/ that has a function aot_specs() -> list[dict] takes
part; nothing else has to be registered. Keys of a spec:

    kernel      name of the @triton.jit function in the module
    args        {argument: type}: "*bf16" pointer, "i32", "i64", "fp32" scalar, "tensordesc<bf16[64, 128]>" descriptor
    const       {constexpr argument: value}; args and const together name every argument
    warps, stages   as in a launch (4 and 3 when left out)
    tag         words that tell this spec from the module's others
    per_target  optional {target: {"warps": .., "stages": .., "const": {..}}}: what the launcher takes on that GPU
    expect      optional {target: regex over instruction classes, e.g. "HGMMA"}
    targets     optional, the only targets it is meant for
    unaligned   optional, pointers and integers NOT known to be multiples of 16 (those of do_not_specialize)
    extra       optional, compiled with --all only: True, or the targets for which that holds

TRITON_INTERPRET must be unset. Only the triton wheel is needed: it ships ptxas and cuobjdump.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bootstrap"))
from pack import load_pack

Row = dict[str, Any]

TARGETS: dict[str, tuple[str, int | str, int]] = {  # name: (backend, architecture, threads of a warp)
    "sm80": ("cuda", 80, 32),
    "sm86": ("cuda", 86, 32),
    "sm89": ("cuda", 89, 32),
    "sm90": ("cuda", 90, 32),
    "sm100": ("cuda", 100, 32),
    "sm120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED = {  # bytes of shared memory that one block may take
    "sm80": 166912,
    "sm86": 101376,
    "sm89": 101376,
    "sm90": 232448,
    "sm100": 232448,
    "sm120": 101376,
    "gfx942": 65536,
}
NVIDIA = {
    "HGMMA": r"\bHGMMA",
    "QGMMA": r"\bQGMMA",
    "IGMMA": r"\bIGMMA",
    "HMMA": r"\bHMMA",
    "IMMA": r"\bIMMA",
    "QMMA": r"\bQMMA",
    "UTCMMA": r"\bUTC[HQIO]+MMA",
    "LDGSTS": r"\bLDGSTS",
    "UTMALDG": r"\bUTMALDG",
}
FEWEST = 8  # registers on NVIDIA: a kernel that the compiler takes for undefined comes out empty, without an error
AMD = {"mfma": r"v_mfma_", "wmma": r"v_wmma_", "buffer_load": r"buffer_load_", "scratch": r"scratch_(load|store)"}


def modules() -> list[Any]:
    """Every module below kernels/ that defines aot_specs, imported."""
    pack = load_pack()
    names = (
        m.name for m in pkgutil.walk_packages([str(Path(p) / "kernels") for p in pack.__path__], "tessera.kernels.")
    )
    found = map(importlib.import_module, names)
    return [m for m in found if hasattr(m, "aot_specs") and m.aot_specs.__module__ == m.__name__]


def jobs(targets: list[str], everything: bool, only: str) -> list[tuple[str, int, str]]:
    """(module, number of the spec, target) of every compilation asked for; specs that come to the same machine code,
    as two modules that launch one kernel alike have them, give one."""
    found = {}
    for module in modules():
        for i, spec in enumerate(module.aot_specs()):
            words = f"{module.__name__} {spec['kernel']} {spec.get('tag', '')}"
            extra = spec.get("extra", False)
            if re.search(only, words):
                for target in targets:
                    asked = everything or not (extra if isinstance(extra, bool) else target in extra)
                    if asked and target in spec.get("targets", TARGETS):
                        found.setdefault(_identity(module, spec, target), (module.__name__, i, target))
    return list(found.values())


def _identity(module: Any, spec: Row, target: str) -> str:
    """The same for compilations that differ in their tags alone."""
    const, options = _launch(spec, target)
    unordered = (const, options, spec["args"], dict.fromkeys(spec.get("unaligned", ())))
    rest = [sorted(given.items()) for given in unordered]
    return f"{id(getattr(module, spec['kernel']))} {target} {spec.get('expect', {}).get(target)} {rest}"


def _launch(spec: Row, target: str) -> tuple[Row, Row]:
    """Constants and options of the launch on that GPU."""
    own = spec.get("per_target", {}).get(target, {})
    options = {
        "num_warps": own.get("warps", spec.get("warps", 4)),
        "num_stages": own.get("stages", spec.get("stages", 3)),
    }
    return {**spec.get("const", {}), **own.get("const", {})}, options


def compile_one(job: tuple[str, int, str]) -> Row:
    """One kernel for one target: registers, spilled bytes, shared bytes, instruction classes, or the error."""
    load_pack()
    module = importlib.import_module(job[0])
    spec, target = module.aot_specs()[job[1]], job[2]
    const, options = _launch(spec, target)
    row: Row = {"kernel": spec["kernel"], "tag": spec.get("tag", ""), "target": target, **options}
    start = time.perf_counter()
    try:
        compiled = _compile(getattr(module, spec["kernel"]), spec, const, target, options)
        row |= (
            _amd(compiled) if target.startswith("gfx") else _nvidia(compiled, target, target in spec.get("expect", {}))
        )
        row["shared"] = compiled.metadata.shared
        row["error"] = _refusal(row, spec.get("expect", {}).get(target))
    except Exception as e:  # one broken kernel must not hide the others
        row["error"] = f"{type(e).__name__}: {str(e).strip()[-300:]}"
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def _compile(fn: Any, spec: Row, const: Row, target: str, options: Row) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    while not hasattr(fn, "params"):  # an autotuner or heuristics around the function
        fn = fn.fn
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in const:
            signature[name], constexprs[(i,)] = "constexpr", const[name]
            continue
        signature[name] = kind = spec["args"][name]
        if (kind.startswith("*") or kind in ("i32", "i64")) and name not in spec.get("unaligned", ()):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=fn, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def _nvidia(compiled: Any, target: str, disassemble: bool) -> Row:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    arch = int(target[2:])
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "k.ptx", Path(folder) / "k.cubin"
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        ptxas = tools / ("ptxas-blackwell" if arch >= 100 else "ptxas")
        name = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        log = subprocess.run([ptxas, "-v", name, ptx, "-o", f"{folder}/x"], capture_output=True, text=True).stderr
        sass = ""
        if disassemble:
            sass = subprocess.run([tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True).stdout
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    if not spills or not registers:
        raise RuntimeError(f"ptxas gave no register report: {log[-200:]}")
    return {
        "registers": int(registers[1]),
        "spills": int(spills[1]) + int(spills[2]),
        "instructions": _count(NVIDIA, sass),
    }


def _amd(compiled: Any) -> Row:
    text = compiled.asm["amdgcn"]

    def read(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    return {
        "registers": read("vgpr_count"),
        "spills": read("vgpr_spill_count"),  # a spilled scalar register goes into a vector lane, not to memory
        "instructions": _count(AMD, text),
    }


def _count(classes: dict[str, str], text: str) -> dict[str, int]:
    return {name: n for name, pattern in classes.items() if (n := len(re.findall(pattern, text)))}


def _refusal(row: Row, expect: str | None) -> str:
    if row["spills"]:
        return f"spills {row['spills']}"
    if row["target"].startswith("sm") and row["registers"] < FEWEST:
        return f"takes {row['registers']} registers: the compiler has dropped its work"
    if row["shared"] > SHARED[row["target"]]:
        return f"takes {row['shared']} bytes of shared memory, {row['target']} has {SHARED[row['target']]}"
    if expect and not re.search(expect, " ".join(row["instructions"])):
        return f"has no {expect}: {row['instructions']}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--only", default="", help="regex over module, kernel and tag")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("Unset TRITON_INTERPRET: interpreted kernels cannot be compiled.")
    targets = args.targets.split(",")
    unknown = [name for name in targets if name not in TARGETS]
    if unknown:
        parser.error(f"unknown target {unknown[0]!r}; there are {', '.join(TARGETS)}")
    todo = jobs(targets, args.all or os.environ.get("TESSERA_AOT") == "all", args.only)
    rows: list[Row] = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for row in pool.map(compile_one, todo):
            rows.append(row)
            found = (
                f"registers {row['registers']} shared {row['shared']} {row['instructions']}" if "shared" in row else ""
            )
            verdict = f"REFUSED {row['error']}" if row["error"] else "ok"
            print(
                f"{row['kernel']} [{row['tag']}] {row['target']} warps {row['num_warps']} {found} {verdict}", flush=True
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    refused = sum(bool(row["error"]) for row in rows)
    print(f"{len(rows)} compilations, {refused} refused")
    return 1 if refused or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
