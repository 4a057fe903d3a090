"""Patch files per pinned package version; `dualpath_sgl.launch.setup.patching` applies them."""
