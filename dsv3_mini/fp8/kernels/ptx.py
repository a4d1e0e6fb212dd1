"""Read in a kernel's machine code how long the tensor core adds up by itself before FP32 takes over. Text in, facts out.

Hopper multiplies with one instruction, and PTX, NVIDIA's assembly, shows everything the recipe asks of it:

    wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%r1, ...}, %rd1, %rd2, %p1, 1, 1;
                                       |         |                                 |
             32 products for a number of c   E4M3 by E4M3                   keep what is in %r1, ...?

Where the predicate %p1 is false the sum begins anew. So promotion every 128 looks like this: four instructions, the first
with a false predicate and three with a true one; a wait for them; and then ordinary FP32 arithmetic, one addition or
multiply-add (`fma.rn.f32`) for every number of c that the thread holds, before the loop begins again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

WGMMA = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m\d+n\d+k(?P<k>\d+)\.f32\.(?P<operands>\w+\.\w+)\s*"
    r"\{[^}]*\},\s*%\w+,\s*%\w+,\s*(?P<keep>%?\w+),"
)
ADDITION = re.compile(r"^\s*(fma|add)(\.rn)?\.f32\s")
JUMP = re.compile(r"^\s*(@!?%p\d+\s+)?(bra|ret)\b|^\$?\w+:")


@dataclass(frozen=True)
class TensorCoreSum:
    """One sum that the tensor core makes by itself, as PTX shows it.

    operands: such as "e4m3.e4m3".
    products: how many along k it adds up, as far as the code runs straight on.
    from_zero: whether it begins at 0. If not, it goes on from what was there, and `products` is no bound.
    promoted: FP32 additions and multiply-adds that a thread makes of it before the next sum, or the next jump.
    """

    operands: str
    products: int
    from_zero: bool
    promoted: int = 0


def tensor_core_sums(ptx: str) -> list[TensorCoreSum]:
    """The tensor core's sums in the order of the code; none where it is not used."""
    sums: list[TensorCoreSum] = []
    adding = waited = False
    for line in ptx.splitlines():
        if found := WGMMA.search(line):
            k, from_zero = int(found["k"]), _value(ptx, found["keep"]) is False
            if adding and not from_zero:
                sums[-1] = replace(sums[-1], products=sums[-1].products + k)
            else:
                sums.append(TensorCoreSum(found["operands"], k, from_zero))
            adding, waited = True, False
        elif "wgmma.wait_group" in line:
            waited = True
        elif JUMP.search(line):
            adding = waited = False
        elif waited and ADDITION.search(line):
            sums[-1] = replace(sums[-1], promoted=sums[-1].promoted + 1)
    return sums


def _value(ptx: str, predicate: str) -> bool | None:
    """What a predicate is throughout; None where it is found out only while the kernel runs."""
    if predicate.isdigit():
        return predicate != "0"
    name = re.escape(predicate)
    constants = {value != "0" for value in re.findall(rf"mov\.pred\s+{name},\s*(-?\d+);", ptx)}
    computed = re.search(rf"setp\.\S+\s+{name},", ptx)
    return constants.pop() if len(constants) == 1 and not computed else None
