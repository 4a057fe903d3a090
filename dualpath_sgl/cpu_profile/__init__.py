"""Lets the unmodified SGLang wheel run PD disaggregation and HiCache on a CPU.

No CPU build of `sgl_kernel` is published, and the CUDA build of torchvision does not import
beside a CPU torch.  `site/` holds stand-ins for both, which `install.py` puts at the end of
`sys.path` (a real `sgl_kernel` wins); `plugin.py` adjusts SGLang itself, through its own
entry point, when `SGLANG_USE_CPU_ENGINE=1`; `hybrid.py` has its part for sliding windows and linear attention.
"""
