#!/usr/bin/env python3
"""Finds kernels that write a register while a `wgmma` that reads it may still be running.

    cargo build --release --features cuda
    scripts/kernels/wgmma_registers.py target/release/build/trainer-*/out/*_sm90-*.o

`wgmma` multiplies beside the program. Where its first operand lies in registers, those may not change before a
`wgmma.wait_group` that waits for it (PTX ISA, "wgmma.mma_async"); the compiler does not prevent it, and results are then wrong
only where tensor cores are busy. This follows every path of the machine code of compute capability 9.0: HGMMA with a register
operand puts that operand's four registers in flight, `gsb0` closes a group, DEPBAR.LE waits for all but the last groups. Calls of
what lies in the same kernel are followed into it and back; other calls and computed branches are not, and one that is met while a
product runs is named.

Needs `cuobjdump` of the CUDA toolkit (CUOBJDUMP names it if it is not on the path). Exit code 1: there are such writes, or kernels that cannot be followed.
"""
import os
import re
import subprocess
import sys

# Instructions without a destination among the general registers, by how they begin.
NO_RESULT = re.compile(
    r"(ST|RED|BRA|BRX|BSSY|BSYNC|BAR|SYNCS|HGMMA|WARP|UBLK|EXIT|NOP|CCTL|MEMBAR|ERRBAR|DEPBAR|LDGSTS|LDGDEPBAR|ISETP|FSETP|"
    r"HSETP|DSETP|PLOP3|R2UR|U|VOTEU|BREAK|CALL|RET)"
)
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);")
GUARDED = re.compile(r"(?:@!?U?P\d+ )?([A-Z0-9_.]+)\s*(.*)")
PRODUCT = re.compile(r"HGMMA\S* R\d+, R(\d+), gdesc")
COMPUTED = re.compile(r"(?:@!?U?P\d+ )?(BRX|JMX|CALL|RET)\b")
CALLED = re.compile(r"(@!?U?P\d+ )?CALL\.REL\S* 0x([0-9a-f]+)\s*$")
BRANCH = re.compile(r"(?:@!?U?P\d+ )?(?:BRA|BRX)\b.*0x([0-9a-f]+)\s*$")


def written(text):
    """The general registers that an instruction writes."""
    match = GUARDED.match(text)
    if not match or NO_RESULT.match(match[1]):
        return []
    name, operands = match[1], [part.strip() for part in match[2].split(",")]
    # Some have a predicate before the register.
    first = next((part for part in operands[:2] if re.match(r"R\d+", part)), None)
    if first is None:
        return []
    wide = ".128" in name or name.startswith(("HMMA", "LDSM"))  # the widest of them
    double = ".64" in name or ".F64" in name or name.startswith(("DADD", "DMUL", "DFMA")) or ".WIDE" in name or (name.startswith("CS2R") and ".32" not in name)
    number = int(re.match(r"R(\d+)", first)[1])
    return range(number, number + (4 if wide else 2 if double else 1))


def faults(lines):
    """Writes to registers of running products: (address, instruction)."""
    at = {address: index for index, (address, _) in enumerate(lines)}
    found, seen, paths = set(), set(), [(0, (), frozenset(), ())]
    while paths:
        index, groups, open_group, callers = paths.pop()
        while index < len(lines):
            state = (index, groups, open_group, callers)
            if state in seen:
                break
            seen.add(state)
            address, text = lines[index]
            called = CALLED.match(text)
            if called and int(called[2], 16) in at and len(callers) < 4:
                if called[1]:
                    paths.append((index + 1, groups, open_group, callers))
                index, callers = at[int(called[2], 16)], callers + (index + 1,)
                continue
            if text.startswith("RET") and callers:
                index, callers = callers[-1], callers[:-1]
                continue
            if "HGMMA" in text:
                product = PRODUCT.search(text)
                if product:
                    open_group |= set(range(int(product[1]), int(product[1]) + 4))
                if "gsb0" in text:
                    groups, open_group = groups + (open_group,), frozenset()
                    if len(groups) > 8:  # of a loop that never waits; no kernel leaves so many
                        groups = (groups[0] | groups[1],) + groups[2:]
            elif "DEPBAR.LE gsb0" in text:
                left = int(re.search(r"gsb0, 0x([0-9a-f]+)", text)[1], 16)
                groups = groups[-left:] if left else ()
            else:
                running = open_group.union(*groups)
                if any(register in running for register in written(text)) or (running and COMPUTED.match(text)):
                    found.add((address, text))
            branch = BRANCH.match(text)
            if branch and int(branch[1], 16) in at:
                paths.append((at[int(branch[1], 16)], groups, open_group, callers))
            if text.startswith(("BRA", "BRX", "EXIT", "RET")):
                break
            index += 1
    return sorted(found)


# A loop that loads into the operand of the product before it has waited, and the same with the wait first.
WAIT, LOAD = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "LDG.E.128 R68, desc[UR14][R56.64]"
LOOP = ["HGMMA.64x32x16.F32.BF16 R24, R68, gdesc[UR16], R24, gsb0", "@P0 BRA 0x40", WAIT, LOAD, "@!P0 BRA 0x0", WAIT, "EXIT"]


def check_itself():
    """That the one is found and the other is not, whichever way the fault is reached."""
    def of(program):
        return [text for _, text in faults([(16 * index, text) for index, text in enumerate(program)])]

    assert of(LOOP) == [] and of([LOOP[0], LOAD, WAIT, "EXIT"]) == [LOAD]
    assert of([LOAD, LOOP[0], "@!P0 BRA 0x0", WAIT, "EXIT"]) == [LOAD]
    called = [LOOP[0], "CALL.REL.NOINC 0x40", WAIT, "EXIT", "MOV R71, R2", "RET.REL.NODEC R4 0x0"]
    assert of(called) == ["MOV R71, R2"] and of(called[:4] + ["MOV R72, R2", called[5]]) == []
    assert of(called[:1] + ["CALL.ABS.NOINC R2"] + called[2:4]) == ["CALL.ABS.NOINC R2"]
    assert of([LOOP[0], "MOV R71, R2", WAIT, "EXIT"]) == ["MOV R71, R2"] and of([LOOP[0], "MOV R72, R2", WAIT, "EXIT"]) == []


def main(objects):
    check_itself()
    cuobjdump = os.environ.get("CUOBJDUMP", "cuobjdump")
    kernels = bad = 0
    for path in objects:
        listing = subprocess.run([cuobjdump, "-sass", path], capture_output=True, text=True, check=True).stdout
        for part in listing.split("Function : ")[1:]:
            lines = [(int(address, 16), text) for address, text in INSTRUCTION.findall(part)]
            if not any(PRODUCT.search(text) for _, text in lines):
                continue
            kernels += 1
            found = faults(lines)
            bad += bool(found)
            for address, text in found:
                print(f"{os.path.basename(path)}: {part.splitlines()[0]}: {address:x}: {text}")
    print(f"{kernels} kernels of {len(objects)} files with an operand of wgmma in registers, {bad} of them write it too early or cannot be followed")
    return 1 if bad or not kernels else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if len(sys.argv) > 1 else __doc__)
