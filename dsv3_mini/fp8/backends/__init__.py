"""The ways to multiply FP8 matrices, one a file, all with the interface `fp8.gemm.Backend`.

exact            dequantize and multiply in FP32
hopper           Hopper's tensor core emulated: about 14 bits while it adds up, promoted to FP32 now and then
scaled_mm        torch.nn.functional.scaled_mm
deep_gemm        the package of that name
triton_backend   this project's own kernels, fp8/kernels/
"""
