"""The residual streams of mHC around one site: enter, leave, both at once, and the read-out at the end."""

from byrote.kernels.hyper_mix.reference import hyper_enter, hyper_leave, hyper_read, hyper_step

__all__ = ["hyper_enter", "hyper_leave", "hyper_read", "hyper_step"]
