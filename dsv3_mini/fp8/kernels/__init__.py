"""Own Triton kernels for the FP8 recipe: quantise activations, dequantise weights, multiply by tile and block.

    rounding         FP32 to fewer mantissa bits, by the rule, in integer arithmetic
    act_quant        x [m k] -> E4M3 and one scale per 1x128 tile                        (report section 3.3.2)
    weight_dequant   E4M3 and one scale per 128x128 block -> BF16 or FP32
    gemm             a @ b^T, promoted to FP32 with its scales after every 128 products  (report section 3.3.2)
    grouped_gemm     the same for all experts of a layer in one launch
    compile          each of them ahead of time for Hopper, without a GPU
    ptx              what the machine code shows: E4M3 on the tensor core, and how long its sums run

One source runs in three ways, and none of them is a branch in it: on a GPU; on any CPU in Triton's interpreter, which
is numpy (`TRITON_INTERPRET=1`, set before Python first imports triton); and compiled to PTX on a machine with no GPU.

Letters: a [m k] and b [n k] are multiplied, c [m n] comes out; the contraction k lies contiguous in both, as Hopper's
FP8 tensor cores want it. A kernel's arguments in capitals are sizes of its own blocks, powers of two known when it is
compiled. All modules here but `ptx` need triton; the rest of the package does not.

Where we simplify: no tensor memory accelerator, no warp specialisation, no tuning of block sizes per shape. DeepGEMM has
all three, and is used where it is installed.
"""
