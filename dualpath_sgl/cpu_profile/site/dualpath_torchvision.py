"""Declares the operators that a CUDA-built torchvision lacks beside a CPU torch.

Its C++ library cannot load there, so `torchvision::nms` and `qnms` are undefined and
`import torchvision` fails in `torchvision._meta_registrations`, which describes them.  Runs in
every interpreter of the environment, so it imports nothing until that module is asked for.
"""

import sys

_LIBRARIES = []  # A torch.library.Library takes its definitions back when it is collected.


class _BeforeMetaRegistrations:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision._meta_registrations":
            sys.meta_path.remove(self)
            _declare_missing()
        return None


def _declare_missing():
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    _LIBRARIES.append(library)
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _BeforeMetaRegistrations())
